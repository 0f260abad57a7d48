"""Pitch and loudness of characters against what was sung, batches against numpy, silence and what has no voice."""

import numpy as np
import pytest

from apps.audio import prosody, spectra

RATE, HOP = 16_000, 160
FRONT = spectra.LogMel(RATE, window=0.04, normalize=False)


def sing(hertz: float, volume: float, frames: int) -> np.ndarray:
    time = np.arange(frames * HOP) / RATE
    return volume * sum(np.sin(2 * np.pi * harmonic * hertz * time) for harmonic in range(1, 9))


def example(parts: list[tuple[float, float, int]]) -> prosody.Example:
    """Each part a label: Hz, volume, frames."""
    waveform = np.concatenate([sing(*part) for part in parts]).astype("float32")
    durations = np.array([frames for *_, frames in parts], np.int32)
    durations[-1] += 1  # a clip has a frame more than strides
    features = FRONT(waveform[np.newaxis], np.array([len(waveform)]))[0].numpy()
    return prosody.examine(waveform, np.arange(1, len(parts) + 1, dtype=np.int32), durations, features, RATE)


def test_pitch_and_loudness_are_what_was_sung():
    seen = example([(100, 0.05, 40), (200, 0.1, 40), (150, 0.02, 40)])
    np.testing.assert_allclose(2**seen.pitch, [100, 200, 150], rtol=0.06)
    louder = example([(100, 0.02, 40), (100, 0.2, 40)]).loudness
    assert 1 < louder[1] - louder[0] < 2 * np.log(10)  # in bands between harmonics there is nothing to be louder
    assert seen.features.shape == (121, 80)


def test_what_has_no_voice_has_its_neighbours_pitch():
    # Frames at an edge still hear the neighbour, so silence has three labels.
    seen = example([(100, 0.05, 40), (1, 0.0, 10), (1, 0.0, 40), (1, 0.0, 0), (1, 0.0, 10), (200, 0.05, 40)])
    low, first, second, high = seen.pitch[1:5]
    assert low < first < second < high
    np.testing.assert_allclose([first - low, second - first], (high - low) / 3, atol=1e-4)
    assert np.isnan(example([(1, 0.0, 30)]).pitch).all()


def test_batches_are_standardised_and_say_what_is_a_rows_own():
    examples = [example(parts) for parts in ([(100, 0.05, 30), (200, 0.1, 20)], [(150, 0.02, 25)], [(1, 0.0, 12)])]
    scale = prosody.Scale.of(examples)
    part = prosody.Part(examples, scale)
    assert part.lengths.tolist() == [51, 26, 13]
    ((inputs, targets),) = part.in_batches(np.array([[0, 1, 2]]), 3)
    assert inputs["labels"].numpy().tolist() == [[1, 2], [1, 0], [1, 0]]
    assert inputs["durations"].numpy().tolist() == [[30, 21], [26, 0], [13, 0]]
    mel, told = targets["mel"].numpy(), targets["prosody"].numpy()
    assert mel[..., -1].sum(axis=1).tolist() == [51, 26, 13]
    frames = mel[..., :-1][mel[..., -1] > 0]
    np.testing.assert_allclose(frames.mean(axis=0), 0, atol=1e-3)
    np.testing.assert_allclose(frames.std(axis=0), 1, atol=1e-3)
    np.testing.assert_allclose(frames * scale.features[1] + scale.features[0],
                               np.concatenate([each.features for each in examples]), atol=1e-3)  # fmt: skip
    own = told[..., -1] > 0
    assert own.tolist() == [[True, True], [True, False], [True, False]]
    np.testing.assert_allclose(told[own][:, 0], [3.0, 2.1, 2.6, 1.3], rtol=1e-6)
    np.testing.assert_array_equal(told[..., 1:3], inputs["prosody"])
    assert told[2, 0, 1] == 0  # without a voice
    np.testing.assert_allclose(told[own][:3, 1].mean(), 0, atol=1e-5)


def test_one_clip_of_one_sound_is_finite():
    examples = [example([(1, 0.0, 12)])]
    ((inputs, targets),) = prosody.Part(examples, prosody.Scale.of(examples)).in_batches(np.array([[0]]), 1)
    for array in [*inputs.values(), *targets.values()]:
        assert np.isfinite(array).all()
    with pytest.raises(ValueError, match="at least one array"):
        prosody.Scale.of([])
