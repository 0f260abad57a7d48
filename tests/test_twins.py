"""Twins that differ by half precision only, what is refused, and no trace left; what tests of both measures share."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfhalf
from tfhalf import precision, twins
from tfhalf.comparison import compare
from tfhalf.scale_window import loss_scale_window


class Factors(keras.layers.Layer):
    """Hands on what it gets, whose gradient it multiplies by 2^14 and 2^-14 in its own dtype, in the order given.

    Args:
        orders: for each half of the columns "up" (first times 2^28, then back), "down" (the other way) or "".
    """

    def __init__(self, *orders, **kwargs):
        super().__init__(**kwargs)
        self.orders = orders

    def build(self, input_shape):
        # Weights, for constants would be multiplied together beforehand.
        values = {"up": 2.0**14, "down": 2.0**-14}
        self.factors = {
            name: self.add_weight(shape=[], initializer=keras.initializers.Constant(value), trainable=False, name=name)
            for name, value in values.items()
        }

    def call(self, x):
        @tf.custom_gradient
        def through(x):
            def gradient(by_output):
                up, down = (tf.cast(self.factors[name].value, by_output.dtype) for name in ("up", "down"))
                parts = []
                for part, order in zip(tf.split(by_output, len(self.orders), 1), self.orders, strict=True):
                    factors = {"up": [up, up, down, down], "down": [down, down, up, up], "": []}[order]
                    for factor in factors:
                        part = part * factor
                    parts.append(part)
                return tf.concat(parts, 1)

            return x, gradient

        return through(x)


def chain(*layers, loss=None) -> keras.Model:
    """Layers in mixed_float16 between two Dense, of which the second is in float32."""
    keras.utils.set_random_seed(1)
    with tfhalf.PrecisionPlan().scope():
        made = [make() for make in layers]
        head = keras.layers.Dense(1, kernel_initializer="ones", dtype="float32", name="head")
        model = keras.Sequential([keras.Input([4]), keras.layers.Dense(4, name="body"), *made, head])
    model.compile("sgd", loss or (lambda y, y_pred: y_pred), auto_scale_loss=False)
    return model


def batch_of(model: keras.Model, num: int = 8):
    random = np.random.default_rng(3)
    x = random.normal(size=[num, *model.input_shape[1:]]).astype("float32")
    return x, np.zeros([num, *model.output_shape[1:]], "float32")


def convnet(build_convnet, **compiled) -> keras.Model:
    model = tfhalf.accelerate(build_convnet())
    tfhalf.compile_model(model, keras.optimizers.Adam(), loss="mse", metrics=["mae"], **compiled)
    return model


def test_nothing_is_left_behind(build_convnet, pictures):
    model, twin = convnet(build_convnet), convnet(build_convnet)
    targets = np.zeros([12, 3], "float32")
    for each in (model, twin):
        each.fit(pictures, targets, batch_size=12, verbose=0)
    layers = [model, *precision.layers_by_path(model).values()]
    before = [(layer.dtype_policy.name, dict(layer.__dict__)) for layer in layers]
    values = [np.array(variable) for variable in [*model.variables, *model.optimizer.variables]]
    loss_scale_window(model, [(pictures, targets)], scales=[1.0, 1024.0])
    compare(model, (pictures, targets))
    after = [np.array(variable) for variable in [*model.variables, *model.optimizer.variables]]
    for old, new in zip(values, after, strict=True):
        np.testing.assert_array_equal(old, new)
    for layer, (policy, own) in zip(layers, before, strict=True):
        assert layer.dtype_policy.name == policy
        assert layer.__dict__.get("call") is own.get("call")
    for each in (model, twin):
        each.fit(pictures, targets, batch_size=12, verbose=0)
    for mine, other in zip(model.get_weights(), twin.get_weights(), strict=True):
        np.testing.assert_array_equal(mine, other)


def test_what_raises_leaves_nothing_behind_either():
    def fails(y, y_pred):
        raise RuntimeError("planted")

    model = chain(lambda: keras.layers.Dropout(0.5, name="dropout"))
    model.compile("sgd", fails, auto_scale_loss=False)
    for look in (lambda batch: loss_scale_window(model, [batch]), lambda batch: compare(model, batch)):
        with pytest.raises(RuntimeError, match="planted"):
            look(batch_of(model))
        assert model.get_layer("body").compute_dtype == "float16"
        assert all("call" not in layer.__dict__ for layer in model.layers)


@pytest.mark.parametrize(
    "layer",
    [
        lambda: keras.layers.Dropout(0.5),
        lambda: keras.layers.GaussianNoise(1.0),
        lambda: keras.layers.AlphaDropout(0.5),
        lambda: keras.Sequential([keras.layers.Reshape([2, 2]), keras.layers.LSTM(4, dropout=0.5)]),
        lambda: keras.Sequential([keras.layers.Reshape([2, 2, 1]), keras.layers.RandomFlip(), keras.layers.Flatten()]),
    ],
    ids=["dropout", "noise", "alpha", "lstm", "flip"],
)
def test_random_layers_are_silenced_in_both_twins(layer):
    """Other draws would make errors of about 1; half makes some 2^-11."""
    model = chain(layer)
    compared = compare(model, batch_of(model, 64))
    assert max(one.error for one in compared.places) < 2.0**-7
    assert compared.forward is None
    assert compared.backward is None


def test_random_layers_draw_again_afterwards():
    model = keras.Sequential([keras.Input([64]), keras.layers.Dropout(0.5), keras.layers.Dropout(0.5)])
    x = np.ones([1, 64], "float32")
    model.layers[0].__dict__["call"] = own = model.layers[0].call  # as another watcher may have put there
    with twins.without_randomness(model):
        np.testing.assert_array_equal(model(x, training=True), x)
    assert model.layers[0].__dict__["call"] is own
    assert "call" not in model.layers[1].__dict__
    assert np.any(model(x, training=True) == 0.0)


def test_batches_become_tensors_as_in_fit():
    ragged = tf.ragged.constant([[1], [2, 3]])
    x, y, sample_weight = twins.tensors(({"a": np.float64([0.5]), "b": ragged}, np.int64([7]), 2.0))
    assert (x["a"].dtype, y.dtype, sample_weight.dtype) == (tf.float32, tf.int64, tf.float32)
    assert (x["a"].numpy().tolist(), y.numpy().tolist(), float(sample_weight)) == ([0.5], [7], 2.0)
    assert x["b"] is ragged


def test_first_of_the_dtypes_that_a_model_computes_in():
    layers = [keras.layers.Dense(1, dtype=f"mixed_{dtype}") for dtype in precision.HALF_DTYPES]
    model = keras.Sequential([keras.Input([1]), *layers])
    with pytest.raises(ValueError, match="isn't compiled"):
        twins.require_half(model, ["float16"])
    model.compile("sgd", "mse")
    assert twins.require_half(model, ["float16"]) == "float16"
    assert twins.require_half(model, ["bfloat16", "float16"]) == "bfloat16"
    with pytest.raises(ValueError, match="no layer computes in float64, but in bfloat16, float"):
        twins.require_half(model, ["float64"])
