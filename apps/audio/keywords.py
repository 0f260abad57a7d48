"""Keyword spotting: which of a few words is it, or which tone?

    python -m apps.audio.keywords --dataset=gcin_tones --features=pitch
    python -m apps.audio.keywords --dataset=spoken_words_en --features=log_mel
    python -m apps.audio.keywords --dataset=speech_commands --features=log_mel --epochs=20
    python -m apps.audio.recognition --task=keywords --dataset=gcin_tones --features=pitch

Expected of the first: 61% of another speaker's tones, where we aimed at 75%, and 98% of the same speaker's in other
syllables (mixed_float16, 2026-11-26; RESULTS.md says why).

Convolutions over time and frequency; then the largest value of all frequencies and the mean over a clip's own frames.
Features are log-mel bands, as words need them, or pitch, as tones need it: the autocorrelation of each frame at lags
whose logarithms are evenly spaced (`apps.audio.pitch`). Another voice is a translation along that axis, which
convolutions and the largest value don't see. In training clips are played at other speeds, of pitch at very different
ones, and masked.

Half precision: features, normalisation, the mean over frames, logits and loss are float32; convolutions are half.

Source: Sainath and Parada 2015, "Convolutional neural networks for small-footprint keyword spotting", Interspeech.
"""

import re
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from absl import flags
from sklearn import metrics

from apps import batches, figures, runner, scores, sets
from apps.audio import augmentation, clips, convolutions, pitch, spectra, waveforms

_SAMPLING_RATE = 16_000
_KERNEL, _STRIDES = (5, 5), ((1, 2), (2, 2), (2, 1), (1, 1))  # frames and bands; the last is that of all after it, too
_DROPOUT = 0.3
_LABEL_SMOOTHING = 0.05
_WEIGHT_DECAY = 0.01
_UNSAFE = r"[^\w-]"  # in the name of a file
# Versions of each clip. Voices differ by more than an octave; words at speeds that people don't have are no help.
_SPEEDS = {"log_mel": (0.9, 0.95, 1.0, 1.05, 1.1), "pitch": tuple(np.geomspace(0.75, 2.25, 11))}
_SHOWN, _HEARD = 16, 2  # clips in the table, and of them as sounds and pictures


# Flags


def define_flags(values: flags.FlagValues) -> None:
    """Defines what this task adds to the shared flags."""
    here = {"flag_values": values}
    flags.DEFINE_integer("width", 32, "Channels of each convolution, 8 to 1024.", 8, 1024, **here)
    flags.DEFINE_integer("depth", 4, "Convolutions, 1 to 12.", 1, 12, **here)
    define_features(values)


def define_features(values: flags.FlagValues) -> None:
    """Defines `--features`."""
    features_help = "Of keywords: pitch, which tells tones, or log_mel, which tells words."
    flags.DEFINE_enum("features", "pitch", list(_SPEEDS), features_help, flag_values=values)


# Model


def build_model(options, data: runner.Data) -> keras.Model:
    """Waveforms (float32) and their lengths (int32) to logits (float32)."""
    waveform = keras.Input([None], dtype="float32", name="waveform")
    length = keras.Input([], dtype="int32", name="length")
    if options.features == "pitch":
        front = pitch.Correlogram(_SAMPLING_RATE, name="correlogram")
    else:
        front = spectra.LogMel(_SAMPLING_RATE, num_mel_bins=64, name="log_mel")
    counts = spectra.num_frames(length, front.framing)
    x = augmentation.SpecAugment(bands=8, frames=8, masks=1, name="spec_augment")(front(waveform, length), counts)
    x = keras.ops.expand_dims(x, -1)
    for index in range(options.depth):
        strides, name = _STRIDES[min(index, len(_STRIDES) - 1)], f"conv{index}"
        x, counts = convolutions.convolve(x, counts, options.width, _KERNEL, strides, name, normalize=False)
    x = keras.ops.max(x, axis=2)
    own = convolutions.SequenceMask(name="own_frames")(x, counts)
    x = keras.layers.GlobalAveragePooling1D(dtype="float32", name="mean")(x, mask=own)
    x = keras.layers.Dropout(_DROPOUT, dtype="float32", name="dropout")(x)
    logits = keras.layers.Dense(len(data.about["class_names"]), dtype="float32", name="logits")(x)
    return keras.Model({"waveform": waveform, "length": length}, logits, name="spotter")


def build_optimizer(options, num_steps: int) -> keras.optimizers.Optimizer:
    """AdamW with warm-up and cosine decay."""
    return runner.adamw(options.learning_rate, num_steps, _WEIGHT_DECAY)


def build_loss(options) -> keras.losses.Loss:
    """Cross-entropy with label smoothing."""
    return keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=_LABEL_SMOOTHING)


def build_metrics(options) -> list[keras.metrics.Metric]:
    """Accuracy."""
    return [keras.metrics.CategoricalAccuracy(name="accuracy")]


# Data


def load_data(options) -> runner.Data:
    """Reads any TFDS set with sound and a class."""
    speech = clips.feature_of(sets.describe(options).info.features)
    features = sets.require_features(options, "keyword spotting", {speech: "Audio", "label": "ClassLabel"})
    builder = sets.prepare(options)
    train, validation, test = (
        clips.read(builder, split, [speech, "label"], _SAMPLING_RATE) for split in sets.split_names(builder)
    )
    names, speeds = features["label"].names, _SPEEDS[options.features]
    lengths = np.array([len(clip) for clip in train[0]])
    order, steps = batches.training_order(options, lengths)
    versions = augmentation.at_random_speeds(order, options.seed, len(speeds))
    shown = np.linspace(0, len(validation[1]) - 1, _SHOWN, dtype=int)
    one_hot = np.eye(len(names), dtype="float32")
    in_order = np.arange(len(validation[1]))
    return runner.Data(
        train=lambda epoch: _batches(train[0], one_hot[train[1]], versions(epoch), options.batch_size, speeds),
        steps_per_epoch=steps,
        validation=_batches(validation[0], one_hot[validation[1]], in_order, options.batch_size),
        test=_batches(*test, np.arange(len(test[1])), options.batch_size),
        about={"sampling_rate": _SAMPLING_RATE, "class_names": names},
        shown=_batches(*validation, shown, _SHOWN),
    )


def _batches(sounds, targets: np.ndarray, order: np.ndarray, batch_size: int, speeds=(1.0,)) -> tf.data.Dataset:
    """Batches of (waveforms, targets); `order` as of `augmentation.reader`."""
    read = augmentation.reader(sounds, _SAMPLING_RATE, speeds)

    def make(versions):
        waveforms, lengths = read(versions)
        return {"waveform": waveforms, "length": lengths}, tf.gather(targets, versions // len(speeds))

    return batches.in_batches(order, make, batch_size)


# What is served, how it is scored and shown


def serve(model: keras.Model, data: runner.Data):
    """The exported function: waveforms and their lengths to probabilities."""

    def classify(waveform, length):
        length = tf.clip_by_value(length, 0, tf.shape(waveform)[1])
        return {"probabilities": tf.nn.softmax(model({"waveform": waveform, "length": length}, training=False))}

    return classify, {"waveform": tf.TensorSpec([None, None], tf.float32), "length": tf.TensorSpec([None], tf.int32)}


def score(call: runner.Call, data: runner.Data) -> dict[str, float]:
    """Cross-entropy, accuracy and macro-averaged F1 over the test part."""
    probabilities, labels = predict(call, data.test)
    return scores.of_probabilities(labels, probabilities)


def predict(call: runner.Call, dataset: tf.data.Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Returns probabilities, float32 `[clips, classes]`, and labels."""
    rows = [(np.asarray(call(**inputs)["probabilities"]), labels.numpy()) for inputs, labels in dataset]
    return np.concatenate([row[0] for row in rows]), np.concatenate([row[1] for row in rows])


def describe(counts: dict[str, float]) -> str:
    """The line that ends a run."""
    return f"Test loss: {counts['loss']:.4f} | {scores.in_words(counts)}"


def show(model: keras.Model, data: runner.Data) -> dict[str, bytes | str]:
    """Some validation clips with what the model says of them; the first as sounds and pictures."""
    (inputs, labels), names = next(iter(data.shown)), data.about["class_names"]
    probabilities = serve(model, data)[0](**inputs)["probabilities"].numpy()
    sounds = clips.cut(**inputs)[:_HEARD]
    rows = [
        (str(number), names[label], f"{names[row.argmax()]} {row.max():.0%}")
        for number, (label, row) in enumerate(zip(labels.numpy(), probabilities, strict=True), 1)
    ]
    titled = [
        (f"{number}: {is_}, predicted {said}", sound) for (number, is_, said), sound in zip(rows, sounds, strict=False)
    ]
    shown: dict[str, bytes | str] = {"predictions": figures.to_table(["clip", "is", "predicted"], rows)}
    shown["spectrograms"] = figures.to_png(clips.spectrograms(titled, _SAMPLING_RATE))
    return shown | {f"clip{number}": waveforms.to_wav(sound, _SAMPLING_RATE) for number, sound in enumerate(sounds, 1)}


def conclude(call: runner.Call, data: runner.Data, folder: Path) -> dict[str, bytes | str]:
    """The confusion matrix of the test part, and a clip of each class, also as files to try apps/predict.py on."""
    probabilities, labels = predict(call, data.test)
    names = data.about["class_names"]
    _, first = np.unique(labels, return_index=True)
    heard = [sound for inputs, _ in data.test for sound in clips.cut(**inputs)]
    sounds = {names[labels[row]]: heard[row] for row in first}
    for name, sound in sounds.items():
        waveforms.write(folder / f"{re.sub(_UNSAFE, '_', name)}.wav", sound, _SAMPLING_RATE)
    counts = metrics.confusion_matrix(labels, probabilities.argmax(axis=-1), labels=range(len(names)))
    shown: dict[str, bytes | str] = {
        "confusion_matrix": figures.to_png(figures.confusion_matrix(counts, names, "clips"))
    }
    some = list(sounds.items())[:_HEARD]
    return shown | {f"test_{name}": waveforms.to_wav(sound, _SAMPLING_RATE) for name, sound in some}


# Main

TASK = runner.Task(
    name="keyword_spotting",
    define_flags=define_flags,
    defaults={
        "dataset": "gcin_tones",
        "batch_size": 32,
        "epochs": 40,
        "learning_rate": 2e-3,
        "width": 32,
        "depth": 4,
    },
    load_data=load_data,
    build_model=build_model,
    build_optimizer=build_optimizer,
    build_loss=build_loss,
    build_metrics=build_metrics,
    monitor="val_loss",
    serve=serve,
    score=score,
    metric="accuracy",
    margin=0.002,
    describe=describe,
    show=show,
    conclude=conclude,
    short={"epochs": 12},
)

if __name__ == "__main__":
    runner.main(TASK)
