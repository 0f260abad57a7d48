"""Convolutions against scipy in float64, and clips of a batch against themselves alone."""

import keras
import numpy as np
import pytest
import scipy.signal
import tensorflow as tf

from apps.audio import convolutions

KERNELS, STRIDES = [(5, 3), (3, 5)], [(2, 2), (2, 1)]


def build(policy="float32"):
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy(policy)
    try:
        x, counts = keras.Input([None, 8, 1]), keras.Input([], dtype="int32")
        y, after = x, counts
        for index, (kernel, strides) in enumerate(zip(KERNELS, STRIDES, strict=True)):
            y, after = convolutions.convolve(y, after, 4, kernel, strides, f"conv{index}")
        model = keras.Model([x, counts], [y, after])
    finally:
        keras.config.set_dtype_policy("float32")
    random = np.random.default_rng(1)
    for weight in model.weights:  # a bias behind the normalisation: what is behind a clip isn't 0 by itself
        weight.assign(random.normal(0.5, 0.5, weight.shape))
    return model


def by_scipy(model, x):
    """One clip, float64 `[frames, bands]`."""
    y = x[..., None]
    for index, (kernel, strides) in enumerate(zip(KERNELS, STRIDES, strict=True)):
        weights = model.get_layer(f"conv{index}").kernel.numpy().astype("float64")
        around = [[size // 2] * 2 for size in kernel]
        padded = np.pad(y, [*around, [0, 0]])
        outputs = [
            sum(scipy.signal.correlate2d(padded[..., i], weights[..., i, o], "valid") for i in range(y.shape[-1]))
            for o in range(4)
        ]
        y = np.stack(outputs, -1)[:: strides[0], :: strides[1]]
        norm = model.get_layer(f"conv{index}_norm")
        y = (y - y.mean((1, 2), keepdims=True)) / np.sqrt(y.var((1, 2), keepdims=True) + norm.epsilon)
        y = np.maximum(y * norm.gamma.numpy().reshape(y.shape[1:]) + norm.beta.numpy().reshape(y.shape[1:]), 0)
    return y


@pytest.mark.parametrize(("policy", "atol"), [("float32", 2e-5), ("mixed_float16", 3e-2)])
@pytest.mark.parametrize("behind", [0, 1, 2, 3])
def test_each_clip_of_a_batch_is_what_scipy_makes_of_it_alone(policy, atol, behind):
    model, random = build(policy), np.random.default_rng(2)
    counts = np.array([9, 1, 4, 7], "int32")
    x = np.zeros([4, 9 + behind, 8, 1], "float32")
    for row, count in zip(x, counts, strict=True):
        row[:count] = random.normal(size=[count, 8, 1])
    y, after = model([x, counts])
    assert after.numpy().tolist() == [3, 1, 1, 2]
    for row, clip, count, left in zip(y.numpy(), x, counts, after.numpy(), strict=True):
        expected = by_scipy(model, clip[:count, :, 0].astype("float64"))
        assert len(expected) == left
        np.testing.assert_allclose(row[:left], expected, atol=atol)
        assert not row[left:].any()


def test_mask_of_frames():
    mask = convolutions.SequenceMask()(tf.zeros([3, 4, 2]), tf.constant([0, 3, 9]))
    assert mask.numpy().astype(int).tolist() == [[0, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_frames_behind_a_stride(stride):
    counts = np.arange(9)
    assert convolutions.after(counts, stride).tolist() == [len(range(0, count, stride)) for count in counts]
