"""Speeds against scipy, SpecAugment's masks by their law, and what must stay as it is."""

import keras
import numpy as np
import pytest
import scipy.signal
import tensorflow as tf

from apps.audio import augmentation

RATE = 16_000


def tone(hertz: float, seconds: float) -> np.ndarray:
    return (8000 * np.sin(2 * np.pi * hertz * np.arange(round(RATE * seconds)) / RATE)).astype("int16")


# Speed


def test_versions_are_the_epochs_examples_at_speeds_that_seed_and_epoch_decide():
    def order(epoch):
        return np.random.default_rng(epoch).permutation(400).reshape(40, 10)

    versions = augmentation.at_random_speeds(order, 7, 3)
    for epoch in (0, 1):
        np.testing.assert_array_equal(versions(epoch) // 3, order(epoch))
        np.testing.assert_array_equal(versions(epoch), versions(epoch))
        assert np.bincount(versions(epoch).ravel() % 3).min() > 100
    assert np.any(versions(0) % 3 != versions(1) % 3)
    assert np.any(versions(0) != augmentation.at_random_speeds(order, 8, 3)(0))


def test_clips_are_played_at_their_speeds():
    clips = [tone(500, 0.3), tone(1000, 0.2)]
    read = tf.function(augmentation.reader(clips, RATE, (0.8, 1.0, 1.25)))
    waveforms, lengths = read(tf.constant([1, 3, 5, 0]))
    assert waveforms.dtype == tf.float32
    assert lengths.numpy().tolist() == [4800, 4000, 2560, 6000]
    assert waveforms.shape == (4, 2 * 5120 - 160)
    np.testing.assert_array_equal(waveforms[0, :4800], clips[0] / np.float32(2**15))
    for row, length, hertz in zip(waveforms.numpy(), lengths.numpy(), (500, 800, 1250, 400), strict=True):
        assert not row[length:].any()
        spectrum = np.abs(np.fft.rfft(row[:length] * np.hanning(length), 1 << 17))
        assert np.argmax(spectrum) * RATE / (1 << 17) == pytest.approx(hertz, abs=1)
    expected = scipy.signal.resample_poly(clips[1] / 2**15, 4, 5)
    np.testing.assert_allclose(waveforms[2, 100:2460], expected[100:-100], atol=1e-3)


@pytest.mark.parametrize(("samples", "padded"), [(1, 4960), (4960, 4960), (4961, 10_080), (10_080, 10_080)])
def test_lengths_of_batches_are_few(samples, padded):
    waveforms, lengths = augmentation.reader([np.ones(samples, "int16"), np.ones(0, "int16")], RATE)(
        tf.constant([0, 1])
    )
    assert waveforms.shape[1] == padded
    assert lengths.numpy().tolist() == [samples, 0]
    assert (-(-padded // 160) + 1) % 32 == 0


# SpecAugment


def masked(layer, counts, frames=60, bands=20):
    features = np.ones([len(counts), frames, bands], "float32")
    zero = layer(tf.constant(features), tf.constant(counts, tf.int32), training=True).numpy() == 0
    in_time, in_frequency = zero.all(axis=2), zero.all(axis=1)
    np.testing.assert_array_equal(zero, in_time[:, :, None] | in_frequency[:, None])
    return in_time, in_frequency


def test_masks_have_the_widths_and_places_of_the_paper():
    layer = augmentation.SpecAugment(bands=6, frames=10, share=0.2, masks=1, seed=3)
    counts = np.repeat([60, 20, 4], 4000)
    in_time, in_frequency = masked(layer, counts)
    for count, widest in ((60, 10), (20, 4), (4, 0)):  # a fifth of the frames, 10 at most
        mask = in_time[counts == count]
        assert not mask[:, count:].any()
        widths = mask.sum(axis=1)
        shares = np.bincount(widths, minlength=widest + 1) / 4000
        np.testing.assert_allclose(shares, 1 / (widest + 1), atol=0.03)
        assert np.all(np.diff(mask.astype(int), axis=1).clip(0).sum(axis=1) + mask[:, 0] == (widths > 0))
        if widest:  # each place that has room is as likely
            starts = mask.argmax(axis=1)[widths == widest]
            assert set(starts) == set(range(count - widest + 1))
    widths = in_frequency.sum(axis=1)
    np.testing.assert_allclose(np.bincount(widths) / len(widths), 1 / 7, atol=0.03)


def test_each_clip_gets_masks_of_its_own_and_several():
    in_time, in_frequency = masked(augmentation.SpecAugment(bands=3, frames=3, masks=3, seed=0), [60] * 50)
    for mask in (in_time, in_frequency):
        runs = np.diff(np.pad(mask, [[0, 0], [1, 0]]).astype(int), axis=1).clip(0).sum(axis=1)
        assert runs.max() == 3
        assert len({row.tobytes() for row in mask}) > 40


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_it_is_for_training_and_rounds_nothing(policy):
    keras.config.set_dtype_policy(policy)
    try:
        layer = augmentation.SpecAugment(seed=0)
    finally:
        keras.config.set_dtype_policy("float32")
    features = np.random.default_rng(0).normal(1000, 1, [2, 50, 80]).astype("float32")
    np.testing.assert_array_equal(layer(features, tf.constant([50, 20])), features)
    changed = layer(features, tf.constant([50, 20]), training=True).numpy()
    np.testing.assert_array_equal(changed[changed != 0], features[changed != 0])
    assert np.any(changed == 0)


def test_configuration_survives():
    layer = augmentation.SpecAugment(bands=5, frames=6, share=0.3, masks=4, seed=2, name="masks")
    assert augmentation.SpecAugment.from_config(layer.get_config()).get_config() == layer.get_config()
