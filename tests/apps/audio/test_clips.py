"""Clips of data sets: rates, padding, sounds as TensorBoard and readers of files get them, pictures of any clip."""

import io

import numpy as np
import pytest
import scipy.signal
import soundfile
import tensorflow as tf
import tensorflow_datasets as tfds
from matplotlib.figure import Figure

from apps import figures, runner
from apps.audio import clips, waveforms
from tfhalf.datasets import sounds

CLIPS = [np.arange(-5, 5, dtype="int16"), np.array([], "int16"), np.array([-(2**15), 2**15 - 1], "int16")]
TEXTS = ["čtyři", "", "a\nb"]


class FewClips(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    feature = sounds.feature(16_000)

    def _info(self):
        features = {"speech": self.feature, "text": tfds.features.Text(), "snr": np.float32}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def encoded(self, clip):
        return sounds.encoded(clip)

    def _generate_examples(self):
        for index, (clip, text) in enumerate(zip(CLIPS, TEXTS, strict=True)):
            yield index, {"speech": self.encoded(clip), "text": text, "snr": index / 2}


class AsOthersStoreThem(FewClips):
    """TFDS' own sets: integers of 64 bits."""

    feature = tfds.features.Audio(sample_rate=8_000)

    def encoded(self, clip):
        return clip.astype("int64")


class WithoutRate(AsOthersStoreThem):
    feature = tfds.features.Audio()


def prepared(builder_class, folder):
    builder = builder_class(data_dir=folder)
    builder.download_and_prepare()
    return builder


@pytest.mark.parametrize(("builder_class", "rate"), [(FewClips, 16_000), (AsOthersStoreThem, 8_000)])
def test_read(tmp_path, builder_class, rate):
    builder = prepared(builder_class, tmp_path)
    speech, texts, snrs = clips.read(builder, "train", ["speech", "text", "snr"], rate)
    order = [TEXTS.index(text.decode()) for text in texts]
    assert sorted(order) == [0, 1, 2]
    assert snrs.tolist() == [index / 2 for index in order]
    for index, clip in zip(order, speech, strict=True):
        assert clip.dtype == np.int16
        np.testing.assert_array_equal(clip, CLIPS[index])
    with pytest.raises(runner.AppError, match=r"the part train\[90%:\] is empty"):
        clips.read(builder, "train[90%:]", ["text"], rate)


def test_another_rate_is_what_scipy_makes(tmp_path, monkeypatch):
    wave = (1e4 * np.sin(2 * np.pi * 440 * np.arange(8_000) / 16_000)).astype("int16")
    monkeypatch.setattr(f"{__name__}.CLIPS", [wave])
    monkeypatch.setattr(f"{__name__}.TEXTS", ["a"])
    ((clip,),) = clips.read(prepared(FewClips, tmp_path), "train", ["speech"], 8_000)
    assert len(clip) == 4_000
    expected = scipy.signal.resample_poly(wave.astype(float), 1, 2)
    np.testing.assert_allclose(clip[200:-200], expected[200:-200], atol=20)


def test_a_set_without_a_rate_is_refused(tmp_path):
    with pytest.raises(runner.AppError, match="without_rate doesn't tell its sampling rate; choose another --dataset"):
        clips.read(prepared(WithoutRate, tmp_path), "train", ["speech"], 16_000)


def test_padding():
    waves, lengths = clips.pad(clips.to_ragged(CLIPS), 16_000)
    assert (waves.dtype, lengths.dtype) == (tf.float32, tf.int32)
    assert waves.shape == (3, 5120)
    assert lengths.numpy().tolist() == [10, 0, 2]
    for row, clip in zip(waves.numpy(), CLIPS, strict=True):
        np.testing.assert_array_equal(row[: len(clip)], clip / 2**15)
        assert not row[len(clip) :].any()
    assert clips.to_ragged([]).shape == (0, None)


def test_wav_is_read_by_another_reader(tmp_path):
    wave = np.linspace(-1.2, 1.2, 4_000)
    samples, rate = soundfile.read(io.BytesIO(waveforms.to_wav(wave, 8_000)))
    assert rate == 8_000
    np.testing.assert_allclose(samples, np.clip(wave, -1, 1), atol=2**-14)
    clips.write_examples([wave, wave[:7]], 8_000, tmp_path)
    assert [len(waveforms.read(tmp_path / f"clip{number}.wav", 8_000)) for number in (1, 2)] == [4_000, 7]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("length", [1, 300, 20_000])
def test_spectrograms(length):
    """Silence, one sample, and rows whose scale is the first one's."""
    tone = np.sin(2 * np.pi * 2_000 * np.arange(length) / 16_000)
    figure = clips.spectrograms([("silence", np.zeros(length)), ("tone", tone), ("quiet", tone / 100)], 16_000)
    images = [axes.images[0] for axes in figure.axes]
    assert len({image.get_clim() for image in images}) == 1
    assert all(np.isfinite(image.get_array()).all() for image in images)
    assert [axes.get_title() for axes in figure.axes] == ["silence", "tone", "quiet"]
    if length == 20_000:
        power = np.asarray(images[1].get_array())[::-1].mean(axis=1)
        assert np.argmax(power) == pytest.approx(2_000 * 400 / 16_000, abs=1)
        assert np.max(images[1].get_array()) - np.max(images[2].get_array()) == pytest.approx(40, abs=0.5)  # dB
    assert figures.to_png(figure).startswith(b"\x89PNG")


def test_labels_are_drawn_where_they_are_said():
    axes = Figure().add_subplot(xlim=(0, 1), ylim=(0, 8000))
    clips.draw_labels(axes, ["a", "b", "a"], np.array([0.08, 0.2, 0.4]))
    assert [(text.get_text(), round(text.get_position()[0], 3)) for text in axes.texts] == [
        ("a", 0.04),
        ("b", 0.14),
        ("a", 0.3),
    ]
    clips.draw_labels(axes, ["a", "b"], np.array([0.0, 0.0]))  # an impossible alignment
    assert len(axes.texts) == 3
