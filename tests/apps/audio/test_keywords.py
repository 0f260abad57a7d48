"""Tones told in another voice, clips beside each other, refusals."""

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

import tfhalf
from apps import runner
from apps.audio import keywords
from tests.conftest import options_for
from tfhalf.datasets import sounds

RATE = 16_000
NAMES = ["falling", "flat", "rising/up", "never"]
BEND = {"falling": -1.0, "flat": 0.0, "rising/up": 1.0}
ATOL = {"float32": 1e-4, "mixed_float16": 2e-2}


def sing(bend: float, hertz: float, random) -> np.ndarray:
    """A voice with ten harmonics whose pitch bends by half an octave, or not."""
    samples = int(random.uniform(0.25, 0.4) * RATE)
    octaves = bend * np.linspace(-0.25, 0.25, samples)
    phase = 2 * np.pi * np.cumsum(hertz * 2**octaves) / RATE
    wave = sum(random.uniform(0.3, 1) * np.sin(harmonic * phase) for harmonic in range(1, 11))
    return (2**15 * (0.05 * wave + 0.001 * random.normal(size=samples))).astype("int16")


class ToyTones(tfds.core.GeneratorBasedBuilder):
    """Low voices to train, high ones to test."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {"speech": sounds.feature(RATE), "label": tfds.features.ClassLabel(names=NAMES)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        parts = {"train": (192, 110, 150), "validation": (24, 110, 150), "test": (30, 220, 300)}
        return {split: self._generate_examples(*part) for split, part in parts.items()}

    def _generate_examples(self, num, lowest, highest):
        random = np.random.default_rng(num)
        for index in range(num):
            name = NAMES[index % 3]
            speech = sing(BEND[name], random.uniform(lowest, highest), random)
            yield index, {"speech": sounds.encoded(speech), "label": name}


class ToyTexts(ToyTones):
    """No label."""

    def _info(self):
        features = {"speech": sounds.feature(RATE), "text": tfds.features.Text()}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("data"))


def options(folder: str, *more: str):
    small = ["--dataset=toy_tones", "--width=8", "--depth=4", "--batch_size=16", *more]
    return options_for(keywords.TASK, f"--data_dir={folder}", *small)


@pytest.fixture(scope="module")
def learned(folder):
    settings = options(folder, "--epochs=12", "--learning_rate=1e-2")
    data = keywords.load_data(settings)
    model = runner.build(keywords.TASK, settings, data)
    for epoch in range(settings.epochs):
        model.fit(data.train(epoch), verbose=0)
    return model, data


# Learned, and served


def test_it_tells_tones_of_voices_an_octave_higher(learned):
    model, data = learned
    call = runner.answering(keywords.TASK, model, data)
    scores = keywords.score(call, data)
    assert scores["accuracy"] > 0.9
    assert keywords.describe(scores).startswith("Test loss: ")
    assert scores["total"] == 30


@pytest.mark.parametrize("features", ["pitch", "log_mel"])
@pytest.mark.parametrize("policy", ATOL)
def test_batch_of_mixed_lengths_answers_as_one_by_one(folder, learned, features, policy):
    settings = options(folder, f"--features={features}", f"--dtype_policy={policy}")
    model, data = runner.build(keywords.TASK, settings, learned[1]), learned[1]
    for weight in model.weights:  # biases too: what is behind a clip isn't 0 by itself
        weight.assign(weight + np.random.default_rng(0).normal(0, 0.1, weight.shape))
    call = tf.function(keywords.serve(model, data)[0], reduce_retracing=True)
    random = np.random.default_rng(2)
    clips = [random.normal(size=size).astype("float32") / 5 for size in (0, 1, 4000, 6399, 9001)]
    for samples in (9001, 9161):
        waveform = random.normal(size=[5, samples]).astype("float32")
        for row, clip in zip(waveform, clips, strict=True):
            row[: len(clip)] = clip
        together = call(waveform=waveform, length=[len(clip) for clip in clips])["probabilities"].numpy()
        assert np.isfinite(together).all()
        for row, clip in zip(together, clips, strict=True):
            alone = call(waveform=clip[np.newaxis], length=[len(clip)])["probabilities"][0]
            np.testing.assert_allclose(row, alone, atol=ATOL[policy])
    assert np.ptp(together, axis=0).max() > 10 * ATOL["float32"]  # they aren't all one


@pytest.mark.parametrize("features", ["pitch", "log_mel"])
def test_what_is_float32(folder, learned, features):
    model = runner.build(keywords.TASK, options(folder, f"--features={features}"), learned[1])
    assert tfhalf.left_alone(model) == {}
    front = {"pitch": "correlogram", "log_mel": "log_mel"}[features]
    inputs = next(iter(learned[1].test))[0]
    seen = keras.Model(model.input, model.get_layer("spec_augment").output)(inputs)
    layer = type(model.get_layer(front)).from_config(model.get_layer(front).get_config())
    np.testing.assert_array_equal(seen, layer(inputs["waveform"], inputs["length"]))
    assert set(tfhalf.coverage(model, inputs).islands) <= {front, "logits", "mean"}


# Data, what is shown, what is refused


def test_clips_of_training_are_played_at_speeds(learned):
    _, data = learned
    lengths = np.concatenate([inputs["length"].numpy() for inputs, _ in data.train(0)])
    assert lengths.min() < 0.2 * RATE
    assert lengths.max() > 0.42 * RATE
    unchanged = np.concatenate([inputs["length"].numpy() for inputs, _ in data.validation])
    assert unchanged.min() >= 0.25 * RATE


def test_what_is_shown(learned, tmp_path):
    model, data = learned
    shown = keywords.show(model, data)
    assert list(shown) == ["predictions", "spectrograms", "clip1", "clip2"]
    assert shown["clip2"].startswith(b"RIFF")
    concluded = keywords.conclude(runner.answering(keywords.TASK, model, data), data, tmp_path)
    assert list(concluded) == ["confusion_matrix", "test_falling", "test_flat"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["falling.wav", "flat.wav", "rising_up.wav"]
    assert concluded["test_falling"] == (tmp_path / "falling.wav").read_bytes()


def test_sets_without_labels_are_refused(folder):
    with pytest.raises(runner.AppError, match=r"keyword spotting needs speech \(Audio\) and label \(ClassLabel\)"):
        keywords.load_data(options(folder, "--dataset=toy_texts"))
