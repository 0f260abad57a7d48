"""One version, loaded: the dtype that is chosen, what is refused, what may be joined."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfhalf
from tests.test_signing import write_keys
from tfhalf import engine, importing, rest, signing


@pytest.fixture(scope="module")
def loaded(bundle):
    return engine.Loaded(bundle)


def difference(seen, expected):
    return np.max(np.abs(seen - expected)) / max(1, np.max(np.abs(expected)))


def test_answers_are_the_bundles(loaded, bundle, samples):
    for signature in ("serving_float32", "serving_bfloat16"):
        expected = tfhalf.load_saved_model(bundle, signature)(samples)["logits"]
        np.testing.assert_array_equal(loaded.function(signature)({"picture": samples})["logits"], expected)
    chosen = loaded.function()({"picture": samples})["logits"]
    expected = tfhalf.load_saved_model(bundle, "serving_float32")(samples)["logits"]
    assert difference(chosen, expected) <= loaded.manifest.signatures[loaded.base]["tolerance"]


def test_all_dtypes_are_measured_and_the_fastest_sound_one_is_taken(loaded):
    assert [one.signature for one in loaded.table] == ["serving_float32", "serving_bfloat16", "serving_default"]
    assert loaded.table[0].error == 0
    assert all(one.one > 0 and one.many > 0 and one.rows == 6 for one in loaded.table)
    first = loaded.table[0]
    scores = {one.signature: (one.one / first.one + one.many / first.many) / 2 for one in loaded.table}
    best = min(scores, key=scores.get)
    assert loaded.base == (best if scores[best] < 0.9 else "serving_float32")
    lines = engine.as_table(loaded.table, loaded.base)
    assert len([line for line in lines if line.startswith("* ")]) == 1


@pytest.mark.parametrize(
    ("bfloat16", "float16", "chosen"),
    [((1, 1, 0.09), (1.5, 3, 0.001), "serving_float32"),  # wrong; slower
     ((1, 1, 0.07), (1.5, 1.5, 0.001), "serving_bfloat16"),
     ((1, 1, np.inf), (1.5, 1.5, 0.001), "serving_default"),
     ((1.9, 1.9, 0.0), (1.9, 1.9, 0.0), "serving_float32")],  # by less than noise
)  # fmt: skip
def test_faster_dtype_is_taken_if_it_is_right(bfloat16, float16, chosen):
    table = [
        engine.Timing("serving_float32", "float32", 2, 2, 6, 0, 0.01),
        engine.Timing("serving_bfloat16", "bfloat16", *bfloat16[:2], 6, bfloat16[2], 0.08),
        engine.Timing("serving_default", "float16", *float16[:2], 6, float16[2], 0.01),
    ]
    assert engine.fastest(table) == chosen


@pytest.mark.parametrize(
    ("dtype", "base"),
    [("float32", "serving_float32"), ("bfloat16", "serving_bfloat16"), ("float16", "serving_default")],
)
def test_dtype_that_is_asked_for(bundle, dtype, base):
    found = engine.Loaded(bundle, dtype)
    assert (found.base, found.table, found.notes) == (base, [], [])
    assert found.function("serving_default").name == base
    assert found.function("serving_float32").name == "serving_float32"
    with pytest.raises(rest.RequestError, match="there are serving_bfloat16, serving_default, serving_float32"):
        found.function("other")


def test_changed_and_wrong_bundles_are_refused(copy):
    with np.load(copy / "assets.extra" / "sample_outputs.npz") as file:
        outputs = {name: array + 0.5 for name, array in file.items()}
    np.savez(copy / "assets.extra" / "sample_outputs.npz", **outputs)
    with pytest.raises(tfhalf.ExportError, match=r"sample_outputs\.npz isn't the file that was exported"):
        engine.Loaded(copy)
    manifest = tfhalf.Manifest.read(copy)
    manifest.files.update(tfhalf.bundle.hashes(copy))
    manifest.write(copy)
    with pytest.raises(tfhalf.ExportError, match="logits differs from the training model by"):
        engine.Loaded(copy)


def test_only_what_the_key_signed_is_served(copy, tmp_path):
    private, public = write_keys(tmp_path, "ours")
    with pytest.raises(tfhalf.ExportError, match="isn't signed"):
        engine.Loaded(copy, "float32", str(public))
    signing.sign(copy, private)
    assert engine.Loaded(copy, "float32", str(public)).base == "serving_float32"
    with pytest.raises(tfhalf.ExportError, match=r"doesn't hold for theirs\.pub"):
        engine.Loaded(copy, "float32", str(write_keys(tmp_path, "theirs")[1]))


def test_values_that_the_graph_refuses_are_the_clients_fault(loaded):
    with pytest.raises(rest.RequestError) as caught:
        loaded.function()({"picture": np.ones([1, 8, 8, 3], "float32")})
    assert caught.value.code == "INVALID_ARGUMENT"
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("function", "spec", "is_joinable"),
    [
        (lambda x: {"y": x * 2}, tf.TensorSpec([None, 3], name="x"), True),
        (lambda x: {"y": tf.reduce_sum(x)}, tf.TensorSpec([None, 3], name="x"), False),
        (lambda x: {"y": x * 2}, tf.TensorSpec([2, 3], name="x"), False),
        (lambda x: {"y": tf.nn.relu(x)}, tf.TensorSpec([None, None], name="x"), True),
        (lambda x: {"y": tf.strings.length(x)}, tf.TensorSpec([None], tf.string, name="x"), True),
        # As long as the longest text.
        (lambda x: {"y": tf.strings.split(x).to_tensor()}, tf.TensorSpec([None], tf.string, name="x"), False),
    ],
)
def test_only_rows_that_may_stand_alone_are_joined(function, spec, is_joinable, tmp_path):
    module = tf.Module()
    tf.saved_model.save(module, str(tmp_path / "1"), signatures=tf.function(function, [spec], autograph=False))
    loaded = tf.saved_model.load(str(tmp_path / "1"))
    assert engine.Function(loaded.signatures["serving_default"], "f").is_joinable == is_joinable


def test_samples_of_other_signatures_are_left_alone(tmp_path):
    double = tf.function(lambda x: {"y": x * 2}, [tf.TensorSpec([None], name="x")], autograph=False)
    length = tf.function(lambda t: {"n": tf.strings.length(t)}, [tf.TensorSpec([None], tf.string, name="t")],
                         autograph=False)  # fmt: skip
    tf.saved_model.save(tf.Module(), str(tmp_path / "theirs"), signatures={"serving_default": double, "length": length})
    samples = {"x": np.array([1.0, 2.0], "float32"), "t": np.array([b"a", b"bc"])}
    importing.import_model(tmp_path / "theirs", tmp_path / "1", inputs=samples)
    loaded = engine.Loaded(tmp_path / "1")
    assert loaded.example() == {"x": (1.0, [])}
    assert loaded.function()(samples)["y"].tolist() == [2, 4]
    assert loaded.function("length")({"t": samples["t"].astype(object)})["n"].tolist() == [1, 2]


def test_rows_that_depend_on_each_other_are_not_joined(tmp_path):
    model = keras.Sequential([keras.Input([1]), keras.layers.Dense(1)])
    tfhalf.export_saved_model(
        model,
        tmp_path / "1",
        inputs={"x": np.array([[1.0], [5.0]], "float32")},
        serve=lambda x: {"y": x - tf.reduce_mean(x) + 0 * model(x)},
        input_signature={"x": tf.TensorSpec([None, 1], tf.float32)},
    )
    centred = engine.Loaded(tmp_path / "1", "float16")
    assert centred.base == "serving_float32"
    assert centred.notes[0] == "has no signature that computes in float16: serving_float32 is served"
    assert "a row's answer depends on the other rows" in centred.notes[1]
    assert not centred.function().is_joinable
    tfhalf.export_saved_model(
        model,
        tmp_path / "2",
        inputs={"x": np.array([[1.0], [5.0]], "float32")},
        serve=lambda x: {"y": x + 0 * model(x)},
        input_signature={"x": tf.TensorSpec([None, 1], tf.float32)},
        decide=lambda raw: {"above": raw["y"] > tf.reduce_mean(raw["y"])},
    )
    decided = engine.Loaded(tmp_path / "2", "float32")
    assert not decided.function().is_joinable
    assert not decided.function("serving_float32_raw").is_joinable


def test_example_is_a_row_that_works(loaded):
    assert loaded.example() == {"picture": (0.0, [16, 16, 3])}
