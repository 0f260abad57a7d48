"""What one layer loses by itself: numbers by hand, nothing handed on, blocks and what is inside."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfhalf
from tests.test_twins import Factors, chain
from tfhalf import precision, sensitivity


def test_error_of_one_layer_by_hand():
    """[4, 3] becomes [4 (1 + 2^-9), 3 (1 + 2^-10)] in float16, and stays what it is in float32."""

    def off(x):
        return x if x.dtype == tf.float32 else x * tf.cast([1 + 2.0**-9, 1 + 2.0**-10], x.dtype)

    with tfhalf.PrecisionPlan().scope():
        layers = [keras.layers.Lambda(off, name="off"), keras.layers.ReLU(name="after")]
        model = keras.Sequential([keras.Input([2]), *layers])
    found = sensitivity.measure(model, np.array([[4.0, 3.0]], "float32"))
    half = np.array([4.0, 3.0], "float16") * np.array([1 + 2.0**-9, 1 + 2.0**-10], "float16")
    assert found["off"].forward == pytest.approx(np.linalg.norm(half.astype("float64") - [4.0, 3.0]) / 5.0)
    assert found["after"] == sensitivity.Sensitivity(0.0, 0.0), "it is given what it is given in float32"


def test_gradients_are_told_apart_from_numbers_by_layer():
    model = chain(
        lambda: Factors("up", "down", name="gradients"),
        lambda: keras.layers.Dense(4, name="fine"),
        lambda: keras.layers.Rescaling(1e5, name="far"),
    )
    found = sensitivity.measure(model, (np.ones([8, 4], "float32"), np.zeros([8, 1], "float32")))
    assert list(found) == ["body", "gradients", "fine", "far"]
    assert (found["far"].forward, found["gradients"].backward) == (np.inf, np.inf)
    assert found["gradients"].forward < 2.0**-10
    fine = [error for path in ("fine", "body") for error in (found[path].forward, found[path].backward)]
    assert max(fine) < 2.0**-8, "their gradients, up to 2^18, are scaled into float16's range"
    assert found["far"].rank > found["fine"].rank


def test_blocks_and_what_is_inside_them():
    with tfhalf.PrecisionPlan().scope():
        inputs = keras.Input([5, 8])
        x = keras.layers.MultiHeadAttention(2, 4, name="attention")(inputs, inputs)
        x = keras.layers.Bidirectional(keras.layers.LSTM(3, name="lstm"), name="both")(x)
        inner = keras.Sequential([keras.Input([6]), keras.layers.Dense(4, name="dense")], name="inner")
        model = keras.Model(inputs, keras.layers.Dense(2, dtype="float32", name="head")(inner(x)))
    assert sensitivity.half_layers(model) == ["attention", "both", "inner/dense"]
    assert {"attention/query", "attention/key"} <= set(sensitivity.half_layers(model, "attention"))
    assert sensitivity.half_layers(model, "both") == ["both/forward_lstm", "both/backward_lstm"]
    assert sensitivity.half_layers(model, "both/forward_lstm") == []


def test_attention_is_measured_as_a_whole_and_in_parts():
    with tfhalf.PrecisionPlan().scope():
        inputs = keras.Input([5, 8])
        model = keras.Model(inputs, keras.layers.MultiHeadAttention(2, 4, name="attention")(inputs, inputs))
    model.compile("sgd", "mse", auto_scale_loss=False)
    data = np.random.default_rng(0).normal(size=[4, 5, 8]).astype("float32")
    found = sensitivity.measure(model, (data, np.zeros([4, 5, 8], "float32")))
    assert list(found) == sensitivity.all_half_layers(model)
    parts = [found[f"attention/{name}"] for name in ("query", "key", "value", "attention_output")]
    for one in (found["attention"], *parts):
        assert 2.0**-14 < one.forward < 2.0**-8
        assert 2.0**-14 < one.backward < 2.0**-6
    assert {layer.compute_dtype for layer in precision.layers_by_path(model).values()} == {"float16"}


def test_relative_error_by_hand():
    half, true = [tf.constant([3.0, 4.0]), tf.constant([[1.0]])], [tf.constant([3.0, 2.0]), tf.constant([[2.0]])]
    assert float(sensitivity.relative_error(half, true)) == pytest.approx(np.sqrt(5 / 17))
    assert float(sensitivity.relative_error([tf.constant(np.nan)], [tf.constant(0.0)])) == np.inf
    assert float(sensitivity.relative_error([tf.constant(1.0)], [tf.constant(0.0)])) == 0.0
    assert float(sensitivity.relative_error([], [])) == 0.0
