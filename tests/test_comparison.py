"""Defects that were planted are where half and float32 part; numbers of one place by hand."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfhalf
from tests.test_twins import Factors, batch_of, chain, convnet
from tfhalf.comparison import compare


class Naive(keras.layers.Layer):
    """Sums 4096 numbers one after the other in its own dtype: in float16 ones end at 2048."""

    def __init__(self, phase, **kwargs):
        super().__init__(**kwargs)
        self.phase = phase

    def call(self, x):
        def total(value):
            many = tf.repeat(value, 1024, axis=1)  # of 4 columns
            return tf.cumsum(many, axis=1)[:, -1:]

        def spread(value):
            return tf.repeat(value, 4, axis=1)

        @tf.custom_gradient
        def through(x):
            forward = total(x) if self.phase == "forward" else x[:, :1]
            return spread(forward), lambda g: spread(total(g)) if self.phase == "backward" else g

        return through(x)


def vanishing(x):
    """1e-8 is 0 in float16, and so 0/0."""
    x = tf.nn.relu(x - 100.0)  # 0
    return (x + tf.cast(1e-8, x.dtype)) / (x + tf.cast(1e-8, x.dtype))


@pytest.mark.parametrize(
    ("phase", "defect"),
    [
        ("forward", lambda: Naive("forward", name="defect")),
        ("forward", lambda: keras.layers.Lambda(vanishing, name="defect")),
        ("backward", lambda: Naive("backward", name="defect")),
        ("backward", lambda: Factors("down", "down", name="defect")),
    ],
    ids=["sum", "epsilon", "sum of gradients", "flushed gradients"],
)
def test_planted_defect_is_where_the_twins_part(phase, defect):
    around = [lambda: keras.layers.Dense(4, name="before"), defect, lambda: keras.layers.Dense(4, name="after")]
    model = chain(*around, loss=lambda y, y_pred: 2.0**-6 * y_pred)
    model.get_layer("before").set_weights([np.zeros([4, 4]), np.ones([4])])
    model.get_layer("after").set_weights([np.ones([4, 4]), np.zeros([4])])
    compared = compare(model, batch_of(model))
    first = getattr(compared, phase)
    assert (first.layer, first.phase) == ("defect", phase)
    assert phase == "forward" or compared.forward is None
    marked = [line for line in str(compared).splitlines() if line.startswith(">")]
    assert marked[0].split()[1:3] == ["defect", phase]
    tfhalf.PrecisionPlan(layers={"defect": "float32"}).apply(model)
    mended = compare(model, batch_of(model))
    assert (mended.forward, mended.backward) == (None, None)


@pytest.mark.parametrize(("policy", "spacing"), [("mixed_float16", 2.0**-10), ("mixed_bfloat16", 2.0**-7)])
def test_numbers_of_one_place_by_hand(policy, spacing):
    """[4, 3] becomes [4 (1 + 2 spacings), 3 (1 + 1 spacing)]: 2 and 1.5 spacings of their binades."""

    def off(x):
        return x if x.dtype == tf.float32 else x * tf.cast([1 + 2 * spacing, 1 + spacing], x.dtype)

    with tfhalf.PrecisionPlan(policy).scope():
        layers = [keras.layers.Dense(2, dtype="float32"), keras.layers.Lambda(off, name="off")]
        model = keras.Sequential([keras.Input([2]), *layers, keras.layers.Activation("linear", dtype="float32")])
    model.layers[0].set_weights([np.eye(2), np.zeros(2)])
    model.compile("sgd", "mse", auto_scale_loss=False)
    compared = compare(model, (np.array([[4.0, 3.0]], "float32"), np.zeros([1, 2], "float32")))
    place = next(one for one in compared.places if one.layer == "off" and one.what == "its output")
    half = tf.cast(
        np.array([4.0, 3.0]) * tf.cast(tf.cast([1 + 2 * spacing, 1 + spacing], policy[6:]), "float64").numpy(),
        policy[6:],
    )
    true, half = np.array([4.0, 3.0]), tf.cast(half, "float64").numpy()
    assert place.error == pytest.approx(np.linalg.norm(half - true) / 5.0)
    assert place.ulps == pytest.approx(np.max(np.abs(half - true) / (np.array([4.0, 2.0]) * spacing)))
    assert 2.0 <= place.ulps <= 2.5
    assert place.cosine == pytest.approx(half @ true / np.linalg.norm(half) / 5.0, abs=1e-12)
    assert place.dtype == policy[6:]


def test_activities_are_regularised_in_float32_as_the_step_does():
    x = np.full([16, 4], 30.0, "float32")  # whose squares' sum, 57,600 times 4, float16 doesn't hold
    with tfhalf.PrecisionPlan().scope():
        body = keras.layers.Dense(16, kernel_initializer="ones", activity_regularizer="l2", name="body")
        model = keras.Sequential([keras.Input([4]), body, keras.layers.Dense(1, dtype="float32")])
    tfhalf.compile_model(model, keras.optimizers.SGD(), loss="mse", initial_scale=1.0)
    compared = compare(model, (x, np.zeros([16, 1], "float32")))
    assert compared.forward is None
    assert compared.backward is None


def test_scale_is_the_optimizers(build_convnet, pictures):
    batch = (pictures, np.zeros([12, 3], "float32"))
    assert compare(convnet(build_convnet, initial_scale=64.0), batch).scale == 64.0
    model = build_convnet()
    model.compile(keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(), initial_scale=32.0), "mse")
    model.optimizer.build(model.trainable_variables)
    model.optimizer.dynamic_scale.assign(8.0)
    assert compare(model, batch).scale == 8.0
    bfloat16 = build_convnet("mixed_bfloat16")
    bfloat16.compile("sgd", "mse")
    assert compare(bfloat16, batch).scale == 1.0


def test_models_that_cannot_be_compared(build_convnet):
    plain = build_convnet("float32")
    with pytest.raises(ValueError, match="'small' isn't compiled"):
        compare(plain, [])
    plain.compile("sgd", "mse")
    with pytest.raises(ValueError, match="no layer computes in float16 or bfloat16"):
        compare(plain, [])
    model = build_convnet("mixed_bfloat16")
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="tolerance must be above 0, got 0"):
        compare(model, [], tolerance=0)


def test_json_and_picture(build_convnet, pictures):
    compared = compare(convnet(build_convnet), (pictures * 1e38, np.zeros([12, 3], "float32")))
    told = json.loads(json.dumps(compared.to_json(), allow_nan=False))
    assert told["forward"]["layer"] == compared.forward.layer == "conv"
    assert told["forward"]["error"] == "inf"
    assert len(told["places"]) == len(compared.places)
    assert tf.io.decode_png(compared.picture()).shape[-1] in (3, 4)
