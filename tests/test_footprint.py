"""Bytes of small graphs by hand."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfhalf
from tfhalf.footprint import footprint


def batch(rows: int, inputs: int, outputs: int) -> tuple:
    return tf.ones([rows, inputs]), tf.ones([rows, outputs]), None


def chain(policy: str, *layers, inputs: int = 16) -> keras.Model:
    with tfhalf.PrecisionPlan(policy).scope():
        model = keras.Sequential([keras.Input([inputs]), *(layer() for layer in layers)])
    tfhalf.compile_model(model, keras.optimizers.SGD(), loss="mse")
    model.optimizer.build(model.trainable_variables)
    return model


def head(units: int = 4):
    return lambda: keras.layers.Dense(units, use_bias=False, dtype="float32", name="head")


def test_what_casts_write_by_hand():
    model = chain("mixed_bfloat16", lambda: keras.layers.Dense(32, use_bias=False, name="body"), head())
    told = footprint(model, batch(8, 16, 4), training=False)
    casts = 8 * 16 * 2 + 16 * 32 * 2 + 8 * 32 * 4  # the input, the kernel, and what the head takes in
    products = 8 * 32 * 2 + 8 * 4 * 4
    assert told.cast_share == pytest.approx(casts / (casts + products))
    assert told.kept_bytes == 0
    assert told.held_bytes == 4 * (16 * 32 + 32 * 4)
    plain = chain("float32", lambda: keras.layers.Dense(32, name="body"), head())
    assert footprint(plain, batch(8, 16, 4), training=False).cast_share == 0


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_kept_is_what_the_gradients_read(policy):
    """Of two ReLUs what they put out; in half also the casts of the kernels that the error passes through."""
    layers = [lambda name=name: keras.layers.Dense(512, use_bias=False, activation="relu", name=name) for name in "ab"]
    told = footprint(chain(policy, *layers, head()), batch(64, 16, 4), training=True)
    size = 4 if policy == "float32" else 2
    outputs, inputs, kernels = 2 * 64 * 512 * size, 0, 0
    if policy != "float32":
        inputs = 64 * 16 * 2 + 64 * 512 * 4  # casts of the batch, and of what the head takes in
        kernels = 512 * 512 * 2
    error = 64 * 4 * 4  # of the loss
    assert outputs + inputs + kernels <= told.kept_bytes <= outputs + inputs + kernels + 2 * error
    weights = 16 * 512 + 512 * 512 + 512 * 4
    assert told.held_bytes == pytest.approx(2 * 4 * weights, abs=64)  # with their gradients; SGD keeps none
    assert told.memory_bytes == told.kept_bytes + told.held_bytes


def test_reshaped_memory_counts_once():
    layers = [lambda: keras.layers.Dense(512, activation="relu", name="a")]
    around = [lambda: keras.layers.Reshape([16, 32]), lambda: keras.layers.Reshape([512])]
    plain, reshaped = (
        footprint(chain("float32", *some, head()), batch(64, 16, 4), training=True).kept_bytes
        for some in (layers, layers + around)
    )
    assert reshaped == pytest.approx(plain, abs=64)


def test_odd_sizes_are_named():
    body = [lambda: keras.layers.Dense(24, name="even"), lambda: keras.layers.Dense(30, name="odd")]
    told = footprint(chain("mixed_float16", *body, head(10)), batch(8, 16, 10), training=True)
    assert [name.replace("_1", "") for name in told.odd_sizes] == [
        "odd/MatMul: 8 x 24 x 30",
        "head/MatMul: 8 x 30 x 10",
    ]


def test_convolutions_count_by_their_channels():
    model = keras.Sequential([keras.Input([9, 9, 3]), keras.layers.Conv2D(16, 3, name="conv")])
    (name,) = footprint(model, (tf.ones([5, 9, 9, 3]), None, None), training=False).odd_sizes
    assert name.endswith(": 3 x 16")


def test_model_stays_as_it_was(build_convnet, pictures):
    model = build_convnet()
    tfhalf.compile_model(model, keras.optimizers.Adam(), loss="mse")
    model.optimizer.build(model.trainable_variables)
    before = [np.array(variable.value) for variable in model.variables]
    told = footprint(model, (tf.constant(pictures), tf.zeros([12, 3]), None), training=True)
    assert told.kept_bytes > 0
    for old, variable in zip(before, model.variables, strict=True):
        np.testing.assert_array_equal(old, variable.value)
    model.train_on_batch(pictures, np.zeros([12, 3]))


def test_regularised_activities_in_half_are_no_hindrance():
    body = [lambda: keras.layers.Dense(8, activity_regularizer="l2", name="body")]
    assert footprint(chain("mixed_float16", *body, head()), batch(8, 16, 4), training=True).kept_bytes > 0
