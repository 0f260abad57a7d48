"""Ranges by hand, islands with which float16 is finite, what no range tells."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

import tfhalf
from tests.test_search import Plant
from tfhalf import precision

ONES = np.ones([4, 2], "float32")


def chain(*layers, policy: str = "mixed_bfloat16", loss="mse") -> keras.Model:
    """Layers behind each other, and a float32 head; without a loss it isn't compiled."""
    with tfhalf.PrecisionPlan(policy).scope():
        made = [make() for make in layers]
        head = keras.layers.Dense(1, kernel_initializer="ones", dtype="float32", name="head")
        model = keras.Sequential([keras.Input([2]), *made, head])
    if loss:
        tfhalf.compile_model(model, keras.optimizers.SGD(), loss=loss)
    return model


def scaling(factor: float, name: str):
    return lambda: keras.layers.Rescaling(factor, name=name)


def in_float16(model: keras.Model, plan: tfhalf.PrecisionPlan, x) -> np.ndarray:
    """What the model puts out in float16 under a plan; it is left so."""
    for layer in [model, *precision.layers_by_path(model).values()]:
        if layer.compute_dtype == "bfloat16":
            layer.dtype_policy = "mixed_float16"
    return plan.apply(model).predict(x, verbose=0)


def test_ranges_by_hand():
    dense = lambda: keras.layers.Dense(2, kernel_initializer=keras.initializers.Constant(-3.0), name="dense")  # noqa: E731
    model = chain(scaling(8.0, "first"), dense, loss=lambda y, y_pred: y_pred)
    found = tfhalf.range_clearance(model, [(ONES, ONES[:, :1]), (5 * ONES, ONES[:, :1])])
    first, dense = found.layers
    assert (first.path, first.inputs, first.outputs, first.weights) == ("first", 5.0, 40.0, 0.0)
    assert (dense.inputs, dense.outputs, dense.weights) == (40.0, 240.0, 3.0)
    # The loss is the mean of 4 rows: each output's gradient is 1/4, the kernel's the sum of 4 times 40 of that.
    assert (dense.gradients, first.gradients) == (40.0, 0.0)  # nothing before the first layer is trained
    assert dense.headroom == pytest.approx(16 - np.log2(240.0))
    assert found.scale == 2.0 ** np.floor(14 - np.log2(40.0))
    assert found.islands == []
    assert found.plan == tfhalf.PrecisionPlan("mixed_float16")
    assert str(found).startswith("all layers have 2 bits to float16's end")
    assert tfhalf.range_clearance(model, [(5 * ONES, ONES[:, :1])], headroom_bits=9.0).islands == ["dense"]


@pytest.mark.parametrize("policy", ["mixed_bfloat16", pytest.param("mixed_float16", marks=pytest.mark.soak)])
def test_what_is_beyond_float16_becomes_an_island_and_the_rest_stays(policy):
    relu = lambda: keras.layers.ReLU(name="between")  # noqa: E731
    model = chain(
        scaling(2.0, "near"), scaling(1e5, "far"), relu, scaling(1e-5, "back"), scaling(1.0, "last"), policy=policy
    )
    before = [layer.dtype_policy.name for layer in model.layers]
    found = tfhalf.range_clearance(model, [(ONES, ONES[:, :1])])
    assert found.islands == ["far", "between", "back"]
    assert "outputs up to 2e+05, -1.6 bits to float16's end" in str(found)
    assert [layer.dtype_policy.name for layer in model.layers] == before
    expected = model.predict(ONES, verbose=0) if policy == "mixed_bfloat16" else None
    np.testing.assert_allclose(in_float16(model, found.plan, ONES), 4 * ONES[:, :1], rtol=1e-2)
    assert expected is None or np.isfinite(expected).all()
    json.dumps(found.to_json(), allow_nan=False)
    assert tf.io.decode_png(found.picture()).shape[1] > 100


def test_without_the_islands_it_is_not_finite():
    model = chain(scaling(1e5, "far"), scaling(1e-5, "back"))
    assert not np.isfinite(in_float16(model, tfhalf.PrecisionPlan(), ONES)).all()


def test_overflow_inside_a_layer_is_found_by_running_it():
    model = chain(lambda: Plant("overflow", name="inner"), loss=None)
    found = tfhalf.range_clearance(model, [ONES])
    assert found.layers[0].headroom >= 4  # of the 4096 that it holds as a weight
    assert found.islands == ["inner"]
    assert "it overflows in float16 (forward: its output)" in str(found)
    assert np.isfinite(in_float16(model, found.plan, ONES)).all()


@pytest.mark.parametrize(("size", "islands"), [(2.0**28, []), (2.0**40, ["dense"])])
def test_gradients_that_no_scale_fits_make_an_island(size, islands):
    """The smallest loss scale is 2^-14, so that of 2^38, an output's, 2^24 is left."""
    model = chain(lambda: keras.layers.Dense(2, name="dense"), loss=lambda y, y_pred: size * y_pred)
    found = tfhalf.range_clearance(model, [(ONES, ONES[:, :1])])
    assert found.islands == islands
    assert islands or found.scale <= 2.0**-12


def test_weights_that_float16_cannot_hold_are_told():
    model = chain(lambda: keras.layers.Dense(2, name="heavy"), scaling(1.0, "after"))
    model.get_layer("heavy").set_weights([np.array([[1e5, 0.0], [-1e5, 0.0]]), np.zeros(2)])
    found = tfhalf.range_clearance(model, [(ONES, ONES[:, :1])])
    assert found.islands == ["heavy"]
    assert list(found.kept.values()) == [1e5]
    assert "a float16 file can't hold" in str(found)
    assert np.isfinite(in_float16(model, found.plan, ONES)).all()


class Block(keras.layers.Layer):
    """Adds what it is given to what its layer makes of it, in TensorFlow's words, which want one dtype."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inner = keras.layers.Rescaling(2.0**17, name="inner")
        self.back = keras.layers.Rescaling(2.0**-17, name="back")

    def call(self, x):
        return tf.raw_ops.AddV2(x=x, y=self.back(self.inner(x)))


def test_block_that_cannot_be_mixed_is_an_island_as_a_whole():
    model = chain(lambda: Block(name="block"))
    found = tfhalf.range_clearance(model, [(ONES, ONES[:, :1])])
    assert found.plan.layers == {"block": "float32"}
    assert "block/inner must be" in str(found) or "block/back must be" in str(found)
    np.testing.assert_allclose(in_float16(model, found.plan, ONES), 4 * ONES[:, :1], rtol=1e-3)


@settings(max_examples=3, deadline=None)
@given(st.lists(st.integers(-12, 12), min_size=2, max_size=5))
def test_any_chain_is_finite_under_its_plan(exponents):
    model = chain(*(scaling(2.0**each, f"layer{index}") for index, each in enumerate(exponents)), loss=None)
    plan = tfhalf.range_clearance(model, [ONES]).plan
    got = in_float16(model, plan, ONES)
    assert np.isfinite(got).all()
    sizes = np.cumsum([0, *exponents])
    beyond = {f"layer{index}" for index in range(len(exponents)) if max(sizes[index : index + 2]) > 14}
    assert set(plan.layers) == beyond


def test_what_cannot_be_cleared_is_told():
    model = chain(scaling(1.0, "fine"))
    with pytest.raises(ValueError, match="data is empty"):
        tfhalf.range_clearance(model, [])
    with pytest.raises(ValueError, match="headroom_bits must be 0 or more, got -1"):
        tfhalf.range_clearance(model, [ONES], headroom_bits=-1)
    with pytest.raises(ValueError, match=r"no layer of model .* computes in half; build it under"):
        tfhalf.range_clearance(chain(scaling(1.0, "x"), policy="float32"), [(ONES, ONES[:, :1])])
    with pytest.raises(ValueError, match=r"outputs of fine aren't finite in float32 either, in batch 1"):
        tfhalf.range_clearance(chain(scaling(1e38, "fine"), loss=None), [ONES, 1e3 * ONES])


class Casting(keras.Model):
    """Multiplies in its own call, where no layer is."""

    def __init__(self):
        super().__init__()
        self.body = keras.layers.Rescaling(1.0, name="body")
        self.head = keras.layers.Dense(1, dtype="float32", name="head")

    def call(self, x):
        return self.head(self.body(x) * 300.0 * 300.0)


def test_overflow_outside_of_the_layers_is_told():
    with tfhalf.PrecisionPlan("mixed_bfloat16").scope():
        model = Casting()
    model(ONES)
    with pytest.raises(ValueError, match="outside of the layers: no float32 island helps"):
        tfhalf.range_clearance(model, [ONES])
