"""The correlogram against numpy's autocorrelation; pitch of voices whose frequency is known; noise and silence."""

import numpy as np
import pytest

from apps.audio import pitch

RATE = 16_000


def sing(hertz, seconds: float = 0.4) -> np.ndarray:
    """A voice with ten harmonics of one frequency, or of one for each sample."""
    phase = 2 * np.pi * np.cumsum(np.broadcast_to(hertz, round(seconds * RATE)) / RATE)
    random = np.random.default_rng(0)
    wave = sum(random.uniform(0.3, 1) * np.sin(harmonic * phase) for harmonic in range(1, 11))
    return (0.05 * wave + 0.001 * random.normal(size=len(wave))).astype("float32")


def test_correlogram_is_numpys_autocorrelation():
    layer = pitch.Correlogram(RATE, num_lags=30)
    clips = [sing(130), sing(np.geomspace(210, 300, 3200), 0.2)]
    lengths = np.array([len(clip) for clip in clips], "int32")
    # Behind them is noise, which doesn't count.
    waveform = np.random.default_rng(0).normal(size=[2, 7000]).astype("float32")
    for row, clip in zip(waveform, clips, strict=True):
        row[: len(clip)] = clip
    seen = layer(waveform, lengths).numpy()
    lags = RATE / np.geomspace(600, 60, 30)
    for row, clip in zip(seen, clips, strict=True):
        padded = np.pad(clip, [400, 8000])
        for frame in range(-(-len(clip) // 160) + 1):
            window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(800) / 800)
            spectrum = np.abs(np.fft.rfft(padded[160 * frame :][:800] * window, 1024))
            compressed = (spectrum + 1e-3) ** 0.67 * (np.arange(513) * RATE / 1024 < 3000)
            alike = np.fft.irfft(compressed, 1024 * 64)  # between whole lags too
            expected = np.interp(lags * 64, np.arange(1024 * 32), alike[: 1024 * 32]) / alike[0]
            np.testing.assert_allclose(row[frame], expected, atol=2e-3, err_msg=f"{frame}")
        assert not row[frame + 1 :].any()


@pytest.mark.parametrize("hertz", [70, 90, 160, 290, 480])
def test_pitch_of_a_voice(hertz):
    seen = pitch.track(sing(hertz), RATE)
    assert len(seen) == 41
    assert np.all(seen[5:-5] > 0)
    assert np.median(seen[5:-5]) == pytest.approx(hertz, rel=0.03)


def test_pitch_follows_a_voice():
    hertz = np.geomspace(100, 200, 16_000)
    seen = pitch.track(sing(hertz, 1.0), RATE)
    np.testing.assert_allclose(seen[5:-5], hertz[:: RATE // 100][5:-4], rtol=0.05)


def test_no_pitch_without_a_voice():
    noise = 0.05 * np.random.default_rng(0).normal(size=RATE).astype("float32")
    assert np.mean(pitch.track(noise, RATE) > 0) < 0.2
    assert not pitch.track(np.zeros(RATE, "float32"), RATE).any()
    assert len(pitch.track(np.zeros(1, "float32"), RATE)) == 2
