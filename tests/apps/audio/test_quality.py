"""SI-SDR against float64 and by hand, hostile clips, STOI and PESQ against the packages' own answers."""

import sys

import numpy as np
import pesq
import pystoi
import pytest
import tensorflow as tf

from apps import runner
from apps.audio import quality

RATE = 8_000
# dB that float32 loses in a sum of squares; the loss' threshold stays away from where more is lost.
FLOAT32 = 2e-3


def oracle(clean, estimate) -> float:
    """Le Roux et al. 2019, the definition by the scaled reference, in float64."""
    clean, estimate = (np.asarray(clip, np.float64) for clip in (clean, estimate))
    target = np.dot(estimate, clean) / np.dot(clean, clean) * clean
    return 10 * np.log10(np.sum(target**2) / np.sum((target - estimate) ** 2))


def loss_oracle(clean, estimate) -> float:
    """Both ratios with a thousandth of the speech in what counts as wrong."""
    clean, estimate = (np.asarray(clip, np.float64) for clip in (clean, estimate))
    ratios = []
    for target in (clean * np.dot(estimate, clean) / np.dot(clean, clean), clean):
        wrong = np.sum((target - estimate) ** 2) + 1e-3 * np.sum(target**2)
        ratios.append(10 * np.log10(np.sum(target**2) / wrong))
    return -np.mean(ratios)


def speech(samples: int = 2 * RATE, seed: int = 0) -> np.ndarray:
    """Syllables of harmonics with pauses, at about the level of speech, float32."""
    random = np.random.default_rng(seed)
    time = np.arange(samples) / RATE
    pitch = 120 + 30 * np.sin(2 * np.pi * 1.3 * time)
    phase = 2 * np.pi * np.cumsum(pitch) / RATE
    voice = sum(np.sin(k * phase + random.uniform(0, 6)) / k for k in range(1, 20))
    return (0.1 * voice * np.clip(np.sin(2 * np.pi * 2 * time), 0, None)).astype("float32")


def noise(samples: int, seed: int = 1) -> np.ndarray:
    return 0.05 * np.random.default_rng(seed).normal(size=samples).astype("float32")


# In a graph


def test_ratio_by_hand():
    clean = tf.constant([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [2.0, 2.0, 0.0]])
    estimate = tf.constant([[3.0, 0.3, 0.0], [-1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    np.testing.assert_allclose(quality.si_sdr(clean, estimate), [20, 0, 10 * np.log10(2)], atol=1e-4)


@pytest.mark.parametrize("factor", [1e-3, 0.5, 1, 30])
@pytest.mark.parametrize("snr", [-20, 0, 20, 45])
def test_metric_and_loss_agree_with_float64(snr, factor):
    clean, disturbance = speech(), noise(2 * RATE)
    disturbance *= np.sqrt(np.sum(clean**2) / np.sum(disturbance**2) / 10 ** (snr / 10))
    estimate = (factor * (clean + disturbance)).astype("float32")
    batch = np.stack([clean, speech(seed=5)]), np.stack([estimate, speech(seed=5) + noise(2 * RATE, 9)])
    expected = [oracle(*pair) for pair in zip(*batch, strict=True)]
    np.testing.assert_allclose(quality.si_sdr(*batch), expected, atol=20 * FLOAT32 if snr > 40 else FLOAT32)
    assert quality.si_sdr_of(clean, estimate) == pytest.approx(expected[0], abs=1e-3)
    losses = quality.SpeechDistortion(reduction=None)(*batch)
    np.testing.assert_allclose(losses, [loss_oracle(*pair) for pair in zip(*batch, strict=True)], atol=FLOAT32)


def test_long_clip_keeps_its_digits():
    clean = np.tile(speech(), 60)
    estimate = clean + noise(len(clean))
    np.testing.assert_allclose(quality.si_sdr([clean], [estimate]), oracle(clean, estimate), atol=FLOAT32)


def test_what_is_filled_up_counts_nothing():
    clean, estimate = speech(4_000)[np.newaxis], speech(4_000)[np.newaxis] + noise(4_000)
    longer = [np.pad(each, [[0, 0], [0, 12_345]]) for each in (clean, estimate)]
    loss = quality.SpeechDistortion()
    np.testing.assert_allclose(loss(*longer), loss(clean, estimate), atol=FLOAT32)
    np.testing.assert_allclose(quality.si_sdr(*longer), quality.si_sdr(clean, estimate), atol=FLOAT32)


def test_silence_has_a_loss_and_a_gradient():
    clean = np.stack([np.zeros(800), speech(800), np.zeros(800), speech(800), 1e-4 * speech(800)]).astype("float32")
    estimate = np.stack([noise(800), np.zeros(800), np.zeros(800), speech(800), noise(800)]).astype("float32")
    estimate = tf.constant(estimate)
    with tf.GradientTape() as tape:
        tape.watch(estimate)
        losses = quality.SpeechDistortion(reduction=None)(clean, estimate)
    gradient = tape.gradient(losses, estimate).numpy()
    assert np.isfinite(losses).all()
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(losses.numpy()[[0, 2]], 0)
    np.testing.assert_array_equal(gradient[[0, 2]], 0)
    assert float(losses[3]) == pytest.approx(-30, abs=0.01)  # no clip is better
    np.testing.assert_allclose(quality.si_sdr(clean, estimate)[:4], [0, -80, 0, 80], atol=0.1)
    assert quality.si_sdr(np.zeros([1, 0], "float32"), np.zeros([1, 0], "float32")).numpy().tolist() == [0]


def test_gradient_agrees_with_differences_in_float64():
    clean = speech(400, seed=3)
    estimate, direction = 0.7 * clean + noise(400), noise(400, 8)
    with tf.GradientTape() as tape:
        variable = tf.Variable(estimate[np.newaxis])
        loss = quality.SpeechDistortion()(clean[np.newaxis], variable)
    found = float(np.sum(tape.gradient(loss, variable).numpy() * direction))
    step = 1e-6 * direction.astype("float64")
    expected = (loss_oracle(clean, estimate + step) - loss_oracle(clean, estimate - step)) / 2e-6
    assert found == pytest.approx(expected, rel=1e-3)


def test_loss_tells_how_loud():
    clean = speech(800)[np.newaxis]
    estimate = clean + 0.2 * noise(800)
    loss = quality.SpeechDistortion()
    assert loss(clean, 0.5 * estimate) > loss(clean, estimate) + 1
    np.testing.assert_allclose(quality.si_sdr(clean, 0.5 * estimate), quality.si_sdr(clean, estimate), atol=FLOAT32)


# In a test


def columns(snrs: list[float]):
    cleans = [speech(RATE + 200 * row, seed=row) for row in range(len(snrs))]
    noisies = [clean + 2 * noise(len(clean), row) for row, clean in enumerate(cleans)]
    return cleans, noisies, [(2 * clean + noisy) / 3 for clean, noisy in zip(cleans, noisies, strict=True)]


def test_scores_are_the_packages_own():
    cleans, noisies, estimates = columns([5, 0, 5])
    scores = quality.compare(cleans, noisies, estimates, np.array([5, 0, 5], "float32"), RATE)
    reached = np.array([oracle(*pair) for pair in zip(cleans, estimates, strict=True)])
    gained = reached - [oracle(*pair) for pair in zip(cleans, noisies, strict=True)]
    assert scores["si_sdr"] == pytest.approx(reached.mean())
    assert scores["si_sdr_improvement"] == pytest.approx(gained.mean())
    assert scores["improvement_5dB"] == pytest.approx(gained[[0, 2]].mean())
    assert scores["improvement_0dB"] == pytest.approx(gained[1])
    pairs = list(zip(cleans, estimates, strict=True))
    assert scores["stoi"] == pytest.approx(np.mean([pystoi.stoi(*pair, RATE) for pair in pairs]))
    assert scores["pesq"] == pytest.approx(np.mean([pesq.pesq(RATE, *pair, "nb") for pair in pairs]))
    assert scores["total"] == 3
    assert all(isinstance(value, float) for name, value in scores.items() if name != "total")


def test_silent_and_short_clips_are_left_out():
    cleans, noisies, estimates = columns([np.nan] * 2)
    expected = quality.compare(cleans, noisies, estimates, np.full(2, np.nan), RATE)
    assert set(expected) == {"si_sdr", "si_sdr_improvement", "stoi", "pesq", "total"}
    silent = quality.compare(
        [*cleans, np.zeros(900)], [*noisies, noise(900)], [*estimates, noise(900)], np.full(3, np.nan), RATE
    )
    assert silent == expected
    short = [clip[2_000:2_500] for clip in cleans], [clip[2_000:2_500] for clip in noisies]
    scores = quality.compare(*short, short[1], np.full(2, np.nan), RATE)
    assert set(scores) == {"si_sdr", "si_sdr_improvement", "total"}
    assert scores["si_sdr_improvement"] == 0
    one = quality.compare([np.ones(1)], [np.ones(1)], [np.zeros(1)], np.array([0.0]), RATE)
    assert one == {"si_sdr": -80, "si_sdr_improvement": -160, "improvement_0dB": -160, "total": 1}


def test_part_without_speech_is_told():
    with pytest.raises(runner.AppError, match=r"is silent: it can't be scored; choose another --dataset"):
        quality.compare([np.zeros(9)], [np.ones(9)], [np.ones(9)], np.array([0.0]), RATE)


def test_missing_pesq_is_told_once(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pesq", None)
    quality._pesq.cache_clear()
    try:
        for _ in range(2):
            scores = quality.compare(*columns([0]), np.zeros(1), RATE)
    finally:
        quality._pesq.cache_clear()
    assert "pesq" not in scores
    assert "stoi" in scores
    assert capsys.readouterr().out.count("PESQ isn't measured") == 1


def test_hundred_clips_are_heard_and_all_are_scored():
    cleans = [speech(RATE, seed=row) for row in range(130)]
    estimates = [clean + noise(len(clean), row) for row, clean in enumerate(cleans)]
    snrs = np.repeat([5.0, 0.0], 65)
    scores = quality.compare(cleans, estimates, estimates, snrs, RATE)
    assert scores["total"] == 130
    chosen = np.r_[65:130, 0:65][np.linspace(0, 129, 100).round().astype(int)]
    assert sum(row >= 65 for row in chosen) == 50
    expected = np.mean([pystoi.stoi(cleans[row], estimates[row], RATE) for row in chosen])
    assert scores["stoi"] == pytest.approx(expected)
