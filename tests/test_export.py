"""The bundle: what is in it, what it answers, and that nothing is ever half there."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tensorflow.core.protobuf import saved_model_pb2
from tensorflow_serving.apis import prediction_log_pb2

import tfhalf
from tfhalf import export

FLOAT16_ROUNDOFF = 2.0**-11


def graph_of(folder: Path):
    proto = saved_model_pb2.SavedModel()
    proto.ParseFromString((folder / "saved_model.pb").read_bytes())
    return proto.meta_graphs[0]


def test_answers_like_the_model_in_every_signature(bundle, trained_model, samples):
    # predict is stock Keras in mixed_float16; the float32 oracle is a twin with the same weights.
    mixed = trained_model.predict(samples, verbose=0)
    with tfhalf.precision.computing_in(trained_model, "float32"):
        trained_model.predict_function = None
        float32 = trained_model.predict(samples, verbose=0)
    trained_model.predict_function = None
    for signature, expected, roundoff in (
        ("serving_default", mixed, FLOAT16_ROUNDOFF),
        ("serving_float32", float32, FLOAT16_ROUNDOFF),
        ("serving_bfloat16", float32, 2.0**-8),
    ):
        outputs = tfhalf.load_saved_model(bundle, signature)(samples)
        assert outputs.keys() == {"logits"}
        assert outputs["logits"].dtype == np.float32
        np.testing.assert_allclose(outputs["logits"], expected, atol=8 * roundoff * np.abs(expected).max())


def test_signatures_compute_in_what_they_say(bundle):
    meta = graph_of(bundle)
    functions = {function.signature.name: function for function in meta.graph_def.library.function}
    calls = {
        node.name: node.attr["f"].func.name for node in meta.graph_def.node if node.op == "StatefulPartitionedCall"
    }
    dtypes = {}
    for name, signature in meta.signature_def.items():
        if name.startswith("__"):
            continue
        todo, seen = [calls[next(iter(signature.outputs.values())).name.split(":")[0]]], set()
        while todo:
            function = functions[todo.pop()]
            for node in function.node_def:
                if node.op in ("Conv2D", "BatchMatMulV2", "Einsum"):
                    seen.add(tf.as_dtype(node.attr["T"].type).name)
                todo += [a.func.name for a in node.attr.values() if a.func.name in functions]
        dtypes[name] = seen
    assert dtypes == {"serving_default": {"float16"}, "serving_float32": {"float32"}, "serving_bfloat16": {"bfloat16"}}


def test_variables_are_half_the_size_and_stored_once(bundle, trained_model, samples, tmp_path):
    full = tfhalf.export_saved_model(trained_model, tmp_path / "1", inputs=samples, storage_dtype="float32")
    half = tfhalf.Manifest.read(bundle)
    assert half.sizes["variables"] <= 0.52 * full.sizes["variables"]
    assert half.fingerprint == full.fingerprint  # the same interface
    stored = tf.train.list_variables(str(bundle / "variables" / "variables"))
    count = sum(int(np.prod(shape)) for name, shape in stored if "OBJECT_GRAPH" not in name)
    assert count == sum(int(np.prod(weight.shape)) for weight in trained_model.weights)
    outputs = tfhalf.load_saved_model(tmp_path / "1")(samples)["logits"]
    np.testing.assert_allclose(outputs, trained_model.predict(samples, verbose=0), rtol=1e-5, atol=1e-5)


def test_manifest_tells_what_it_is(bundle):
    manifest = tfhalf.verify(bundle)
    assert manifest.metadata == {"task": "test"}
    assert manifest.storage_dtype == "float16"
    assert manifest.versions["keras"] == keras.__version__
    assert manifest.signatures["serving_default"]["inputs"] == {
        "picture": {"dtype": "float32", "shape": [None, 16, 16, 3]}
    }
    assert manifest.signatures["serving_default"]["compute_dtypes"] == ["float16", "float32"]
    assert 0 < manifest.signatures["serving_default"]["max_error"]["logits"] < 1e-2
    assert manifest.files.keys() >= {"saved_model.pb", "fingerprint.pb", "assets.extra/tf_serving_warmup_requests"}
    assert json.loads((bundle / "assets.extra/manifest.json").read_text())["files"] == manifest.files


def test_warmup_requests_fit_the_signature(bundle, samples):
    path = str(bundle / "assets.extra" / "tf_serving_warmup_requests")
    logs = [prediction_log_pb2.PredictionLog.FromString(r.numpy()) for r in tf.data.TFRecordDataset(path)]
    served = tfhalf.load_saved_model(bundle)
    for log, sample in zip(logs, samples, strict=False):
        array = tf.make_ndarray(log.predict_log.request.inputs["picture"])
        np.testing.assert_array_equal(array, sample[np.newaxis])
        assert served(array)["logits"].shape == (1, 10)
    assert len(logs) == 4


def dense(weights: np.ndarray, name: str = "dense") -> keras.Model:
    """y = x W, in mixed_float16 with a float32 head."""
    with tfhalf.PrecisionPlan("float32").scope():
        model = keras.Sequential(
            [keras.Input([len(weights)], name="x"), keras.layers.Dense(weights.shape[1], use_bias=False, name=name)]
        )
    model.set_weights([weights])
    return model


def test_guard_keeps_what_float16_cannot_hold(tmp_path):
    with tfhalf.PrecisionPlan().scope():
        inputs = keras.Input([4], name="x")
        x = keras.layers.BatchNormalization(name="norm")(inputs)
        model = keras.Model(inputs, keras.layers.Dense(2, dtype="float32", name="y")(x))
    norm = model.get_layer("norm")
    norm.moving_variance.assign([1.0, 2.0, 70000.0, 1e9])
    norm.gamma.assign([1e-9, 2.0, 3.0, 4.0])
    inputs = 1000 * np.ones([3, 4], "float32")
    manifest = tfhalf.export_saved_model(model, tmp_path / "1", inputs=inputs)
    assert manifest.kept.keys() == {"norm/moving_variance", "norm/gamma"}
    assert "2 of its 4 values are too large" in manifest.kept["norm/moving_variance"]
    assert "25.0% of its values would become 0" in manifest.kept["norm/gamma"]
    served = tfhalf.load_saved_model(tmp_path / "1")(inputs)["y"]
    np.testing.assert_allclose(served, model.predict(inputs, verbose=0), rtol=1e-2)


@given(hnp.arrays(np.float32, hnp.array_shapes(max_dims=2), elements=st.floats(-1e6, 1e6, width=32)))
def test_guard_agrees_with_numpy(value):
    with np.errstate(over="ignore"):
        half = value.astype(np.float16)
    keep = bool(np.isinf(half).any()) or np.sum((value != 0) & (half == 0)) > 0.01 * max(1, np.sum(value != 0))
    assert bool(export.why_keep(value, "float16")) == keep


def test_a_decision_is_served_and_its_numbers_are_compared(tmp_path):
    # Both classes are equal but for a rounding: what is largest differs between dtypes, and that must not stop it.
    model = dense(np.array([[1.0, 1 + 2.0**-12], [1, 1]], "float32"))
    inputs = np.ones([3, 2], "float32")

    def decide(raw):
        return {"largest": tf.argmax(raw["dense"], axis=-1, output_type=tf.int32), "values": raw["dense"]}

    serve, signature = export._serve_model(model)
    manifest = tfhalf.export_saved_model(
        model, tmp_path / "1", inputs=inputs, serve=serve, input_signature=signature, decide=decide
    )
    names = ("serving_default", "serving_float32")
    assert manifest.signatures.keys() == {*names, *(f"{name}_raw" for name in names)}
    expected = np.argmax(inputs @ model.get_weights()[0], axis=-1)
    for name in names:
        decided, raw = manifest.signatures[name], manifest.signatures[f"{name}_raw"]
        assert decided["tolerance"] is None
        assert decided["max_error"]["largest"] == 1  # float16 can't hold the difference
        assert raw["tolerance"] == export.TOLERANCES["float16"]
        assert raw["outputs"].keys() == {"dense"}
        outputs = tfhalf.load_saved_model(tmp_path / "1", name)(inputs)
        assert outputs.keys() == {"largest", "values"}
        assert outputs["largest"].dtype == np.int32
        assert np.all(expected == 1)
        assert not np.any(outputs["largest"])
    assert tfhalf.verify(tmp_path / "1") == manifest


def test_a_decision_that_is_not_finite_or_whose_numbers_differ_is_refused(tmp_path):
    model, inputs = dense(np.array([[1.0, 1 + 2.0**-11 * 1.5], [1, 1]], "float32")), np.ones([1, 2], "float32")
    serve, signature = export._serve_model(model)

    def refused(message, decide, **arguments):
        with pytest.raises(tfhalf.ExportError, match=message):
            tfhalf.export_saved_model(
                model, tmp_path / "1", inputs=inputs, serve=serve, input_signature=signature, decide=decide, **arguments
            )
        assert not list(tmp_path.iterdir())

    refused("serving_default: bad has a non-finite value", lambda raw: {"bad": raw["dense"] / 0})
    refused("serving_default_raw: dense differs", lambda raw: {"one": tf.ones([1])}, tolerance=1e-6)
    refused("output half is float16", lambda raw: {"half": tf.cast(raw["dense"], tf.float16)})
    # In float16 the weight is rounded up. Of rows the length may differ, of pictures no side.
    refused(
        "map has .* another shape", lambda raw: {"map": tf.ones([1, tf.where(raw["dense"][0, 1] > 2.00085, 3, 2), 4])}
    )


def test_nothing_is_published_when(tmp_path):
    base, small = tmp_path / "model", dense(np.ones([2, 3], "float32"))

    def refused(message, model=small, **arguments):
        with pytest.raises(tfhalf.ExportError, match=message):
            tfhalf.export_saved_model(model, base / "1", **{"inputs": np.ones([1, 2], "float32"), **arguments})
        assert not base.exists() or not list(base.iterdir()), "something was left behind"

    refused("weight .*dense/kernel holds non-finite", dense(np.array([[1.0], [np.nan]], "float32")))
    overflow = dense(np.array([[3e38], [3e38]], "float32"))
    refused("serving_default: dense differs.*non-finite", overflow, inputs=np.full([1, 2], 9, "float32"))
    refused("storage_dtype must be one of", storage_dtype="float8")
    refused("inputs must be x", inputs={"image": np.ones([1, 2], "float32")})
    refused("more than the tolerance 1e-12", dense(np.full([2, 3], 0.1, "float32")), tolerance=1e-12)
    refused("output y is float16", serve=lambda x: {"y": tf.cast(x, tf.float16)}, inputs={"x": np.ones([1], "float32")},
            input_signature={"x": tf.TensorSpec([None], tf.float32)})  # fmt: skip
    refused("EagerPyFunc.*needs this Python process", inputs={"x": np.ones([1], "float32")},
            serve=lambda x: {"y": tf.ensure_shape(tf.py_function(lambda v: v, [x], tf.float32), [None])},
            input_signature={"x": tf.TensorSpec([None], tf.float32)})  # fmt: skip
    refused("ReadFile.*server's files", inputs={"x": np.array(["/etc/hostname"])},
            serve=lambda x: {"y": tf.map_fn(tf.io.read_file, x)},
            input_signature={"x": tf.TensorSpec([None], tf.string)})  # fmt: skip

    table = tf.lookup.StaticHashTable(tf.lookup.KeyValueTensorInitializer(["a"], [1.0]), 0.0)
    refused("isn't a weight of the model", inputs={"x": np.array(["a"])}, serve=lambda x: {"y": table.lookup(x)},
            input_signature={"x": tf.TensorSpec([None], tf.string)})  # fmt: skip
    refused("tolerance is a share of the largest output, 0 to below 1; got 1", tolerance=1)
    refused("metadata must hold JSON values", metadata={"accuracy": np.float32(1)})

    def lost(stage):
        assert (stage / "saved_model.pb").exists()
        raise tfhalf.ExportError("the metric fell")

    refused("the metric fell", metadata=lost)


def test_layers_of_one_name_keep_their_own_weights(tmp_path):
    class Block(keras.layers.Layer):
        def __init__(self):
            super().__init__(name="block")
            self.first = keras.layers.Dense(4, name="dense")
            self.second = keras.layers.Dense(4, name="dense")

        def call(self, inputs):
            return self.second(self.first(inputs))

    inputs = keras.Input([4], name="x")
    model = keras.Model(inputs, Block()(inputs))
    for weight in model.weights:
        weight.assign(1e6 * np.ones(weight.shape))  # all are kept, each by a name of its own
    x = np.eye(4, dtype="float32")
    manifest = tfhalf.export_saved_model(model, tmp_path / "1", inputs=x)
    assert len(manifest.kept) == len(model.weights) == 4
    np.testing.assert_allclose(
        tfhalf.load_saved_model(tmp_path / "1")(x)["block"], model.predict(x, verbose=0), rtol=1e-6
    )


def test_strings_in_and_out_and_awkward_names(tmp_path):
    model = dense(np.ones([1, 1], "float32"))

    def serve(file):
        return {"text": tf.strings.upper(file), "length": tf.strings.length(file)}

    texts = np.array([b"ab", "\u00e9\u00e9\u00e9".encode()], object)
    signature = {"file": tf.TensorSpec([None], tf.string)}
    tfhalf.export_saved_model(model, tmp_path / "1", inputs=texts, serve=serve, input_signature=signature)
    outputs = tfhalf.load_saved_model(tmp_path / "1")({"file": texts})
    assert outputs["text"].tolist() == [b"AB", "\u00e9\u00e9\u00e9".encode()]
    assert outputs["length"].tolist() == [2, 6]


class Words(tf.Module):
    """Texts to numbers by a table, which is no weight of a model."""

    def __init__(self):
        super().__init__()
        pairs = tf.lookup.KeyValueTensorInitializer(["no", "yes"], [-1.0, 1.0])
        self.table = tf.lookup.StaticHashTable(pairs, 0.0)


def test_tables_that_serve_uses_are_brought_along(tmp_path):
    model, words, texts = dense(np.full([1, 1], 3, "float32")), Words(), np.array([b"yes", b"what?", b"no"])
    given = {
        "inputs": texts,
        "serve": lambda text: {"value": model(words.table.lookup(text)[:, tf.newaxis])[:, 0]},
        "input_signature": {"text": tf.TensorSpec([None], tf.string)},
    }
    with pytest.raises(tfhalf.ExportError, match=r"isn't a weight of the model or one of `resources`"):
        tfhalf.export_saved_model(model, tmp_path / "1", **given)
    assert not list(tmp_path.iterdir())
    tfhalf.export_saved_model(model, tmp_path / "1", resources=[words], **given)  # runs in a fresh process
    np.testing.assert_array_equal(tfhalf.load_saved_model(tmp_path / "1")(texts)["value"], [3, 0, -3])


def test_several_decisions_are_served_by_their_names(tmp_path):
    # In float16 the weight is 1, so that the texts that are decided on differ, in length too.
    model, inputs = dense(np.array([[1 + 2.0**-12]], "float32")), np.ones([2, 1], "float32")
    serve, signature = export._serve_model(model)

    def name(raw):
        return {"name": tf.where(raw["dense"][:, 0] > 1, "above one", "one")}

    def sound(raw):
        return {"sound": tf.ones([tf.shape(raw["dense"])[0], tf.where(raw["dense"][0, 0] > 1, 5, 3)])}

    decide = {"": name, "_half": lambda raw: {"half": raw["dense"] / 2}, "_sound": sound}
    manifest = tfhalf.export_saved_model(
        model, tmp_path / "1", inputs=inputs, serve=serve, input_signature=signature, decide=decide
    )
    bases = ("serving_default", "serving_float32")
    assert manifest.signatures.keys() == {base + added for base in bases for added in ("", "_half", "_sound", "_raw")}
    for base in bases:
        tolerances = [manifest.signatures[base + added]["tolerance"] for added in ("", "_half", "_raw")]
        assert tolerances == [None, None, export.TOLERANCES["float16"]]
        assert tfhalf.load_saved_model(tmp_path / "1", base)(inputs)["name"].tolist() == [b"one"] * 2
        assert tfhalf.load_saved_model(tmp_path / "1", f"{base}_half")(inputs)["half"].tolist() == [[0.5]] * 2
        assert tfhalf.load_saved_model(tmp_path / "1", f"{base}_sound")(inputs)["sound"].shape == (2, 3)
        assert manifest.signatures[f"{base}_sound"]["max_error"] == {"sound": 1.0}  # the model in float32 has 5
    assert tfhalf.verify(tmp_path / "1") == manifest


def test_existing_versions_stay_as_they_are(copy, trained_model, samples):
    before = tfhalf.bundle.hashes(copy)
    with pytest.raises(tfhalf.ExportError, match="exists; choose another version"):
        tfhalf.export_saved_model(trained_model, copy, inputs=samples)
    assert tfhalf.bundle.hashes(copy) == before
    assert os.listdir(copy.parent) == ["1"]


def test_version_that_appears_meanwhile_is_not_replaced(tmp_path):
    def race(stage):
        (tmp_path / "1").mkdir()
        (tmp_path / "1" / "theirs").touch()
        return {}

    with pytest.raises(tfhalf.ExportError, match="exists"):
        tfhalf.export_saved_model(dense(np.eye(2)), tmp_path / "1", inputs=np.eye(2), metadata=race)
    assert os.listdir(tmp_path / "1") == ["theirs"]


def test_unwritable_place_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(tfhalf.ExportError, match=r"can't write .*file/1.*nothing was published"):
        tfhalf.export_saved_model(dense(np.eye(2)), tmp_path / "file" / "1", inputs=np.eye(2))


SCRIPT = """
import resource, signal, sys, time
import keras, numpy as np, tfhalf
model = keras.Sequential([keras.Input([512], name="x"), keras.layers.Dense(512, name="y")])
def slow(stage):
    print("staged", flush=True)
    time.sleep(60)
if sys.argv[2] == "full":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    tfhalf.export_saved_model(model, sys.argv[1], inputs=np.ones([2, 512], "float32"), metadata=slow)
except tfhalf.ExportError as error:
    print(error)
"""


def test_full_disk_leaves_nothing(tmp_path):
    # A limit on the size of files fails writes in the middle, as a full disk does.
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "model" / "1"), "full"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert "can't write" in result.stdout
    assert "nothing was published" in result.stdout
    assert os.listdir(tmp_path / "model") == []


def test_killed_export_publishes_nothing_and_is_swept_up(tmp_path):
    base, model = tmp_path / "model", dense(np.eye(2))
    killed = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(base / "1"), "kill"], stdout=subprocess.PIPE, text=True
    )
    assert killed.stdout.readline() == "staged\n"
    assert [name[:10] for name in os.listdir(base)] == [".staging-1"]
    # While that process lives, its folder is left alone.
    tfhalf.export_saved_model(model, base / "2", inputs=np.eye(2))
    assert len(os.listdir(base)) == 2
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    time.sleep(0.1)
    tfhalf.export_saved_model(model, base / "3", inputs=np.eye(2))
    assert sorted(os.listdir(base)) == ["2", "3"]
