"""Reading sounds, against tones by their formula."""

import numpy as np
import pytest
import soundfile
import tensorflow_datasets as tfds

from tfhalf.datasets import DatasetError, sounds


def tone(hertz: float, rate: int, seconds: float = 0.5, amplitude: float = 0.5) -> np.ndarray:
    return amplitude * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


def test_samples_of_the_right_rate_stay_as_they_are(tmp_path):
    samples = np.random.default_rng(0).integers(-32767, 32768, 500).astype(np.int16)
    soundfile.write(tmp_path / "a.wav", samples, 16000, subtype="PCM_16")
    read = sounds.read(tmp_path / "a.wav", 16000)
    assert read.dtype == np.int16
    np.testing.assert_array_equal(read, samples)


def test_channels_become_their_mean(tmp_path):
    samples = np.random.default_rng(0).integers(-15000, 15000, [500, 2]).astype(np.int16) // 2 * 2
    soundfile.write(tmp_path / "a.wav", samples, 8000, subtype="PCM_16")
    np.testing.assert_array_equal(sounds.read(tmp_path / "a.wav", 8000), samples.astype(int).sum(axis=1) // 2)


@pytest.mark.parametrize("rate", [22050, 44100, 8000])
def test_other_rates_are_resampled(tmp_path, rate):
    samples = tone(440, rate) + tone(3000, rate, amplitude=0.25)
    soundfile.write(tmp_path / "a.wav", samples, rate, subtype="FLOAT")
    read = sounds.read(tmp_path / "a.wav", 16000)
    expected = (tone(440, 16000) + tone(3000, 16000, amplitude=0.25)) * 32768
    assert len(read) == 8000
    np.testing.assert_allclose(read[400:-400], expected[400:-400], atol=0.6)  # a tone breaks off at both ends


def test_what_the_rate_cannot_hold_is_filtered_out(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(10000, 44100), 44100, subtype="FLOAT")
    assert np.abs(sounds.read(tmp_path / "a.wav", 16000)[400:-400].astype(int)).max() <= 1  # else a tone of 6 kHz


def test_louder_than_full_scale_is_made_quieter_as_a_whole(tmp_path):
    samples = tone(440, 16000, amplitude=1.25)
    soundfile.write(tmp_path / "a.wav", samples, 16000, subtype="FLOAT")
    read = sounds.read(tmp_path / "a.wav", 16000)
    np.testing.assert_allclose(read, samples / np.abs(samples).max() * 32767, atol=0.51)


def test_ogg_is_read(tmp_path):
    samples = tone(440, 22050)
    soundfile.write(tmp_path / "a.ogg", samples, 22050, format="OGG", subtype="VORBIS")
    read = sounds.read(tmp_path / "a.ogg", 16000)
    assert len(read) == 8000
    spectrum = np.abs(np.fft.rfft(read[1000:-1000] * np.hanning(6000)))
    assert spectrum.argmax() * 16000 / 6000 == pytest.approx(440, abs=3)
    assert np.sqrt(np.mean((read / 32768.0) ** 2)) == pytest.approx(0.5 / np.sqrt(2), rel=0.02)


@pytest.mark.parametrize("name", ["a.ogg", "a.wav"])
def test_a_sound_of_nothing_has_no_samples(tmp_path, name):
    soundfile.write(tmp_path / name, np.zeros([0, 2]), 22050)
    read = sounds.read(tmp_path / name, 16000)
    assert read.dtype == np.int16
    assert read.shape == (0,)


@pytest.mark.parametrize("content", [None, b"", b"OggS", b"<html>not found</html>"])
def test_what_is_no_sound_is_named(tmp_path, content):
    path = tmp_path / "a.ogg"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DatasetError, match=r"a\.ogg: .*[^.]; remove the folder and fetch again"):
        sounds.read(path, 16000)


@pytest.mark.parametrize("samples", [[], [0], [-32768, -1, 0, 1, 32767, 10, 0, 0]])
def test_tfds_gives_back_what_it_stored(samples):
    samples = np.array(samples, np.int16)
    features = tfds.features.FeaturesDict({"speech": sounds.feature(8000)})
    assert features["speech"].sample_rate == 8000
    stored = features.serialize_example({"speech": sounds.encoded(samples)})
    assert len(stored) < 40 + 2 * len(samples)
    read = features.deserialize_example(stored)["speech"].numpy()
    assert read.dtype == np.int16
    np.testing.assert_array_equal(read, samples)
