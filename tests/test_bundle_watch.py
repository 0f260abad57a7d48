"""Overflows inside a bundle, whose answers look fine, are found and named; and nothing is changed by looking."""

import shutil

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfhalf
from tfhalf.bundle_watch import layer_of, measure_saved_model, watch_saved_model

PICTURES = np.random.default_rng(1).normal(3, 2, [3, 5, 5, 3]).astype("float32")
LARGE = {
    "scaled": [[300.0, 1.0], [-300.0, 255.0], [2.0, 3.0]],  # times 256: two are above 65504
    "cast": [[1e5, 65504.0], [0.0, 0.0], [0.0, 0.0]],
    "root": [[4.0, -1.0], [1.0, 1.0], [1.0, 1.0]],
    "word": ["one", "many", "many"],  # the table has 300 for many
}


class Twice(keras.layers.Layer):
    """Calls one layer two times."""

    def __init__(self, inner, **kwargs):
        super().__init__(**kwargs)
        self.inner = inner

    def call(self, x):
        return self.inner(self.inner(x))


@pytest.fixture(scope="module")
def hiding(tmp_path_factory):
    """A bundle of branches, most with an overflow of its own for large inputs, that don't show in the answer.

    One branch's input is a number that a table has for a word; one, of a picture, has the layers of usual models.
    """
    table = tf.lookup.StaticHashTable(tf.lookup.KeyValueTensorInitializer(["one", "many"], [1.0, 300.0]), 0.0)
    holder = tf.Module()
    holder.table = table
    keras.utils.set_random_seed(0)
    with tfhalf.PrecisionPlan().scope():
        inputs = [keras.Input([2], name=name) for name in ("scaled", "cast", "root", "twice")]
        looked_up, picture = keras.Input([1], name="looked_up"), keras.Input([5, 5, 3], name="picture")
        within = keras.Input([2])
        block = keras.Model(within, keras.layers.Rescaling(256.0, name="dense_1")(within), name="block")
        shared = keras.layers.Dense(2, name="shared_7", kernel_initializer="identity")
        branches = [
            keras.layers.ReLU(6.0)(block(inputs[0])),
            keras.layers.Activation("tanh", name="after")(keras.layers.Rescaling(256.0, name="direct")(inputs[0])),
            keras.layers.ReLU(6.0, name="hides")(inputs[1]),
            keras.layers.Lambda(lambda x: tf.where(x < 0, tf.zeros_like(x), tf.sqrt(x)), name="safe")(inputs[2]),
            Twice(shared, name="pair")(shared(inputs[3])),
            keras.layers.ReLU(6.0)(keras.layers.Rescaling(256.0, name="from_table")(looked_up)),
        ]
        x = keras.layers.Conv2D(4, 3, bias_initializer="uniform", name="conv")(picture)
        x = keras.layers.Reshape([9, 4])(keras.layers.BatchNormalization(name="norm")(x))
        x = keras.layers.Bidirectional(keras.layers.GRU(2, return_sequences=True, name="gru"), name="both")(x)
        x = keras.layers.MultiHeadAttention(1, 2, name="attention")(x, x)
        branches.append(keras.layers.Dense(3, activation="gelu", name="dense")(keras.layers.Flatten()(x)))
        outputs = keras.layers.Dense(1, dtype="float32", name="y")(keras.layers.Concatenate()(branches))
        model = keras.Model([*inputs, picture, looked_up], outputs, name="small")

    def serve(word, **others):
        given = [others[tensor.name] for tensor in [*inputs, picture]]
        return {"y": model([*given, table.lookup(word)[:, tf.newaxis]], training=False)}

    directory = tmp_path_factory.mktemp("bundles") / "hiding" / "1"
    samples = {tensor.name: np.ones([3, 2], "float32") for tensor in inputs}
    samples |= {"word": np.array(["one", "none", "one"]), "picture": PICTURES}
    signature = {tensor.name: tf.TensorSpec([None, *tensor.shape[1:]]) for tensor in [*inputs, picture]}
    signature |= {"word": tf.TensorSpec([None], tf.string)}
    tfhalf.export_saved_model(
        model, directory, inputs=samples, serve=serve, input_signature=signature, resources=[holder]
    )
    return directory, samples


@pytest.fixture(scope="module")
def measured(hiding):
    """The operations for large inputs, and what the bundle answers before and after they are measured."""
    directory, samples = hiding
    inputs = samples | {name: np.array(rows) for name, rows in LARGE.items()}
    before = tfhalf.load_saved_model(directory)(inputs)["y"]
    operations = measure_saved_model(directory, inputs)
    return operations, before, tfhalf.load_saved_model(directory)(inputs)["y"]


def test_hidden_overflows_are_named_and_nothing_else(measured):
    operations, before, after = measured
    assert np.isfinite(before).all()
    bad = {(one.layer, one.kind): one for one in operations if one.overflows}
    # Keras casts the inputs of a model before its layers have them; the layers' products and roots come after.
    casts = [one for (_, kind), one in bad.items() if kind == "Cast"]
    assert [one.non_finite for one in casts] == [1]
    scaled, direct, root = bad["small/block/dense_1", "Mul"], bad["small/direct", "Mul"], bad["small/safe", "Sqrt"]
    assert len(bad) == len([one for one in operations if one.overflows]) == 5  # and the table's, below
    for one in (scaled, direct):
        assert (one.dtype, one.non_finite, one.largest) == ("float16", 2, 255.0 * 256)
        assert one.bits_left == pytest.approx(np.log2(65504 / (255 * 256)))
    assert (root.non_finite, root.largest) == (1, 2.0)
    matmuls = [one.layer for one in operations if one.kind == "MatMul"]
    assert sorted(matmuls) == ["small/dense", "small/pair/shared_7", "small/pair/shared_7", "small/shared_7"]
    assert not [one for one in operations if one.layer == "small/y"]  # it is in float32
    np.testing.assert_array_equal(after, before)


def test_watching_gives_those_that_overflow(hiding, measured):
    directory, samples = hiding
    inputs = samples | {name: np.array(rows) for name, rows in LARGE.items()}
    assert watch_saved_model(directory, inputs) == [one for one in measured[0] if one.overflows]


def test_tables_and_strings_survive(measured):
    (found,) = [one for one in measured[0] if one.overflows and one.layer == "small/from_table"]
    assert (found.kind, found.non_finite, found.largest) == ("Mul", 2, 256.0)


def test_other_signatures_are_sound_or_have_no_half(hiding):
    directory, samples = hiding
    inputs = samples | {name: np.array(rows) for name, rows in LARGE.items() if name != "root"}
    assert measure_saved_model(directory, inputs, "serving_float32") == []


@pytest.mark.slow
def test_sound_bundle_is_empty_and_measured(hiding):
    directory, _ = hiding
    operations = measure_saved_model(directory)
    assert not [one for one in operations if one.overflows]
    layers = {one.layer.partition("/")[2] for one in operations}
    assert {"conv", "norm", "both/forward_gru", "attention", "attention/query", "dense"} <= layers
    assert all(0 <= one.largest < 65504 for one in operations)
    # float64 numpy, of the stored weights: the first convolution's largest output.
    stored = [np.float64(variable) for variable in tf.saved_model.load(str(directory)).stored]
    at = next(index for index, value in enumerate(stored) if value.ndim == 4)
    kernel, bias = stored[at : at + 2]
    windows = np.lib.stride_tricks.sliding_window_view(np.float64(PICTURES), [3, 3], axis=(1, 2))
    convolved = np.einsum("bhwcij,ijco->bhwo", windows, kernel) + bias
    added = next(one for one in operations if one.kind == "BiasAdd" and one.layer.endswith("/conv"))
    assert added.largest == pytest.approx(np.abs(convolved).max(), rel=2.0**-8)


def test_refusals(hiding, tmp_path):
    with pytest.raises(tfhalf.ExportError, match="has no signature 'x'; it has serving_default, "):
        watch_saved_model(hiding[0], signature="x")
    copy = shutil.copytree(hiding[0], tmp_path / "1")
    (copy / "fingerprint.pb").unlink()
    with pytest.raises(tfhalf.ExportError, match=r"fingerprint\.pb is missing"):
        watch_saved_model(copy)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("StatefulPartitionedCall/small_1/dense_1/Tensordot/MatMul", ("small/dense", "Tensordot/MatMul")),
        ("StatefulPartitionedCall/PartitionedCall_2/small_1/dense_2_1/Relu_1", ("small/dense_2", "Relu_1")),
        ("small_1/block_1/dense_3/MatMul", ("small/block/dense", "MatMul")),
        ("StatefulPartitionedCall/Cast_1", ("", "Cast_1")),
        ("PartitionedCall", ("", "PartitionedCall")),
        ("x", ("", "x")),
    ],
)
def test_layers_are_read_from_scopes(name, expected):
    assert layer_of(name) == expected
