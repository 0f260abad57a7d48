"""Repetition against numpy, rows beside each other, the model in two halves, gradients, dtypes."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfhalf
from apps.audio import fastspeech

ATOL = {"float32": 2e-5, "mixed_float16": 2e-2}


def build(policy: str) -> keras.Model:
    keras.utils.set_random_seed(0)
    with tfhalf.PrecisionPlan(policy).scope():
        return fastspeech.build_model(9, 12, width=16, depth=2)


def inputs(random, lengths: list[int], longest: int) -> dict[str, np.ndarray]:
    own = np.arange(longest) < np.array(lengths)[:, np.newaxis]
    shape = own.shape
    return {
        "labels": np.where(own, random.integers(1, 10, shape), 0).astype("int32"),
        "durations": np.where(own, random.integers(0, 6, shape), 0).astype("int32"),
        "prosody": np.where(own[..., np.newaxis], random.normal(size=[*shape, 2]), 0).astype("float32"),
    }


def test_repetition_is_numpys():
    random = np.random.default_rng(0)
    x = random.normal(size=[4, 5, 3]).astype("float32")
    durations = random.integers(0, 4, [4, 5]).astype("int32")
    durations[2] = 0
    repeated, own = fastspeech.LengthRegulator()(x, durations)
    assert repeated.shape[1] == durations.sum(axis=1).max()
    for row in range(4):
        expected = np.repeat(x[row], durations[row], axis=0)
        assert np.count_nonzero(own[row]) == len(expected)
        np.testing.assert_array_equal(repeated[row, : len(expected)], expected)
        assert not np.any(repeated[row, len(expected) :])
    nothing, own = fastspeech.LengthRegulator()(x, np.zeros([4, 5], "int32"))
    assert nothing.shape == [4, 1, 3]
    assert not np.any(own)


def test_the_gradient_of_a_repetition_is_summed_in_float32():
    x = tf.Variable(np.ones([1, 1, 1], "float16"))
    with tf.GradientTape() as tape:
        repeated, _ = fastspeech.LengthRegulator()(x, np.array([[3000]], "int32"))
        total = tf.reduce_sum(repeated * (1 + 2**-9))  # float16 sums of it stop at 2048
    assert repeated.dtype == "float32"
    assert float(tape.gradient(total, x)[0, 0, 0]) == pytest.approx(3000 * (1 + 2**-9), rel=2**-10)


@pytest.mark.parametrize("policy", ATOL)
def test_rows_do_not_depend_on_each_other(policy):
    model, random = build(policy), np.random.default_rng(1)
    batch = inputs(random, [7, 3, 5], 7)
    together = model(batch)
    assert {name: output.dtype for name, output in together.items()} == {"mel": "float32", "prosody": "float32"}
    for row, length in enumerate([7, 3, 5]):
        alone = model({name: array[row : row + 1, :length] for name, array in batch.items()})
        frames = batch["durations"][row].sum()
        for name, size in (("mel", frames), ("prosody", length)):
            np.testing.assert_allclose(together[name][row, :size], alone[name][0, :size], atol=ATOL[policy])


def test_halves_are_the_model():
    model = build("float32")
    batch = {name: tf.constant(array) for name, array in inputs(np.random.default_rng(2), [4, 6], 6).items()}
    read, make_frames = fastspeech.halves(model)
    encoded, predicted = read(batch["labels"])
    whole = model(batch)
    np.testing.assert_array_equal(predicted, whole["prosody"])
    np.testing.assert_array_equal(make_frames([encoded, batch["durations"], batch["prosody"]]), whole["mel"])
    assert {id(weight) for half in (read, make_frames) for weight in half.weights} == {
        id(weight) for weight in model.weights
    }


def test_other_characters_make_other_frames_before_it_has_learned_anything():
    model, random = build("float32"), np.random.default_rng(5)
    batch = inputs(random, [40], 40)
    other = batch | {"labels": random.permutation(batch["labels"], axis=1)}
    one, two = (model(each)["mel"].numpy() for each in (batch, other))
    assert np.std(one - two) > 0.5 * np.std(one)


def test_prosody_is_heard_and_position_matters():
    model = build("float32")
    batch = inputs(np.random.default_rng(3), [6], 6)
    batch["labels"][:], batch["durations"][:] = 4, 2
    base = model(batch)
    assert np.abs(base["prosody"][0, 1] - base["prosody"][0, 4]).max() > 1e-4
    for column in range(2):
        other = batch | {"prosody": batch["prosody"] + np.eye(2, dtype="float32")[column]}
        assert np.abs(model(other)["mel"] - base["mel"]).max() > 1e-3


@pytest.mark.parametrize("policy", ATOL)
def test_every_weight_has_a_finite_gradient_even_of_padding_alone(policy):
    model = build(policy)
    batch = inputs(np.random.default_rng(4), [5, 0], 5)
    with tf.GradientTape() as tape:
        outputs = model(batch)
        total = tf.reduce_sum(outputs["mel"] ** 2) + tf.reduce_sum(outputs["prosody"] ** 2)
    gradients = tape.gradient(total, [weight.value for weight in model.trainable_weights])
    for weight, gradient in zip(model.trainable_weights, gradients, strict=True):
        assert np.isfinite(tf.convert_to_tensor(gradient)).all(), weight.path


def test_kernels_know_every_layer():
    model = tfhalf.accelerate(build("mixed_float16"))
    assert tfhalf.left_alone(model) == {}
