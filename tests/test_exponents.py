"""What is measured of numbers: against float64 numpy, and against the formats' own limits."""

import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from tfhalf import exponents
from tfhalf.exponents import Statistics

FORMATS = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def counted(values: np.ndarray, dtype: str) -> dict[str, float]:
    """The shares by numpy's and ml_dtypes' own rounding, which knows nothing of exponents."""
    kind, about = FORMATS[dtype], ml_dtypes.finfo(FORMATS[dtype])
    with np.errstate(over="ignore"):
        held = np.abs(values.astype(kind).astype("float64"))
    return {
        "zero": np.mean(held == 0),
        "subnormal": np.mean((held > 0) & (held < float(about.tiny))),
        "near_overflow": np.mean((held >= 2.0 ** (about.maxexp - 2)) & np.isfinite(held)),
        "non_finite": np.mean(~np.isfinite(held)),
    }


def statistics(*tensors, dtype: str) -> Statistics:
    return Statistics.of(exponents.measure([tf.constant(tensor) for tensor in tensors]).numpy(), dtype)


# Powers of 2 and a half more than one: no number at which a format's limit is rounded to.
SIZES = st.lists(st.tuples(st.integers(-44, 19), st.sampled_from([1.25, 1.5, -1.75])), min_size=1, max_size=40)


@settings(max_examples=60, deadline=None)
@given(sizes=SIZES, zeros=st.integers(0, 5), dtype=st.sampled_from(["float16", "bfloat16"]))
def test_shares_are_those_of_the_format(sizes, zeros, dtype):
    values = np.array([factor * 2.0**exponent for exponent, factor in sizes] + [0.0] * zeros, "float32")
    found = statistics(values, dtype=dtype)
    expected = counted(values, dtype)
    for name, share in expected.items():
        assert getattr(found, name) == pytest.approx(share, abs=1e-6), name
    assert found.count == len(values)
    assert found.maximum == np.max(np.abs(values))
    assert found.norm == pytest.approx(np.sqrt(np.sum(values.astype("float64") ** 2)), rel=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_number_that_a_format_has(dtype):
    values = np.arange(2**16, dtype=np.uint16).view(FORMATS[dtype])
    kept = np.abs(values.astype("float64"))
    finite = values[np.isfinite(kept)]
    for part in np.array_split(finite, 5):  # at most as many as are looked at
        found = statistics(part, dtype=dtype)
        expected = counted(part.astype("float32"), dtype)
        for name, share in expected.items():
            assert getattr(found, name) == pytest.approx(share, abs=1e-6), name
    assert statistics(values, dtype=dtype).non_finite == pytest.approx(np.mean(~np.isfinite(kept)))


def test_norm_of_numbers_whose_squares_overflow():
    found = statistics(np.full([4], 1e30, "float32"), np.zeros([3], "float32"), dtype="bfloat16")
    assert found.norm == pytest.approx(2e30)


def test_several_tensors_are_one_group_and_infinities_spoil_nothing():
    found = statistics(np.array([3.0, np.inf], "float32"), np.array([[4.0], [np.nan]], "float32"), dtype="float16")
    assert (found.count, found.non_finite, found.maximum, found.norm) == (4, 0.5, 4.0, 5.0)
    assert statistics(np.zeros([0], "float16"), dtype="float16").count == 0
    assert Statistics.of(exponents.measure([]).numpy(), "float16").non_finite == 0.0


def test_each_tensor_of_a_group_counts_by_its_size():
    kernel, bias = np.ones([300, 300], "float32"), np.zeros([300], "float32")
    found = statistics(kernel, bias, dtype="float16")
    assert found.zero == pytest.approx(300 / 90_300, rel=1e-3)
    assert found.exponent_shares[-exponents.LOWEST] == pytest.approx(90_000 / 90_300, rel=1e-3)


@pytest.mark.parametrize("channels", [3, 64, 96])
def test_sample_of_a_large_tensor_prefers_no_channel(channels):
    values = np.zeros([100_000, channels], "float16")
    values[:, 1] = 2.0**-20
    found = statistics(values, dtype="float16")
    assert found.subnormal == pytest.approx(1 / channels, rel=0.02)
    assert found.exponent_shares[-20 - exponents.LOWEST] == found.subnormal


def test_merged_parts_are_as_one():
    values = np.random.default_rng(0).normal(size=[1000]).astype("float32") * 2.0**-14
    values[::7] = 0.0
    values[5] = np.inf
    rows = np.stack([exponents.measure([tf.constant(part)]).numpy() for part in (values[:300], values[300:])])
    one, merged = (Statistics.of(row, "float16") for row in (exponents.measure([tf.constant(values)]).numpy(),
                                                              exponents.merged(rows)))  # fmt: skip
    for name, value in one.to_json().items():
        assert getattr(merged, name) == pytest.approx(value, rel=1e-5), name
    np.testing.assert_allclose(one.exponents, merged.exponents, rtol=1e-4)


def test_extremes_of_what_is_finite():
    tensors = [tf.constant([0.0, -3.0, np.nan, np.inf], tf.float16), tf.constant([[5e-7]], tf.float32)]
    np.testing.assert_allclose(exponents.extremes(tensors), [2.0, 3.0, 5e-7], rtol=1e-6)
    np.testing.assert_array_equal(exponents.extremes([tf.zeros([0])]), [0.0, 0.0, np.inf])


def test_a_graph_gets_a_call_for_each_tensor():
    specs = [tf.TensorSpec([size], dtype) for size in range(1, 41) for dtype in (tf.float16, tf.float32)]
    both = tf.function(lambda *tensors: (exponents.measure(list(tensors)), exponents.extremes(list(tensors))))
    operations = both.get_concrete_function(*specs).graph.get_operations()
    assert len(operations) < 10 * len(specs)
    # TensorFlow optimizes each call that has a constant for itself.
    calls = [operation for operation in operations if operation.type == "PartitionedCall"]
    assert len(calls) == 2 * len(specs) + 1
    assert not any(tensor.op.type == "Const" for call in calls for tensor in call.inputs)
    # Of a tensor, for each dtype: with the first shape, then with any.
    assert len({call.get_attr("f").name for call in calls}) <= 2 * 4 + 1
