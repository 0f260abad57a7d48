"""Speech recognition: what is said?

    python -m apps.audio.recognition --dataset=fillets_cs
    python -m apps.audio.recognition --dataset=librispeech --width=512 --depth=5
    python -m apps.audio.recognition --task=keywords --dataset=gcin_tones --features=pitch

Expected of the first: a character error rate of 32% on levels of the game that it wasn't trained on, 33% in float32,
after an hour on 2 cores, evaluation and export included (2026-11-26).

Two convolutions over time and frequency, which leave a step for each 40 ms, and bidirectional LSTMs give each step a
probability of each character; CTC (`apps.audio.ctc`) does without knowing which is said when. The class is that of
Deep Speech 2. Other than there, LSTMs are normalised frame by frame (`apps.audio.convolutions` says why), kernels are
smaller, and there is no language model. Clips are played at three speeds and masked (`apps.audio.augmentation`). Served
is sound in, text out: log-mel features and beam search are parts of the exported graph.

`--task=keywords` is `apps.audio.keywords`.

Half precision: features, normalisation, logits, loss and search are float32; convolutions and LSTMs are half.

Source: Amodei et al. 2016, "Deep Speech 2", arXiv:1512.02595.
"""

from collections.abc import Sequence
from pathlib import Path

import jiwer
import keras
import numpy as np
import tensorflow as tf
from absl import flags

from apps import batches, figures, runner, sets
from apps.audio import alphabet, augmentation, clips, convolutions, ctc, keywords, spectra, waveforms

_SAMPLING_RATE = 16_000
_NUM_MEL_BINS = 80
_LONGEST = 16.0  # seconds of a clip that is trained on; half of Fish Fillets' clips have 3 or less
_SPEEDS = (0.9, 1.0, 1.1)  # Ko et al. 2015
# Frames and bands; smaller than the paper's, with which convolutions would take more time than LSTMs.
_KERNELS = ((7, 11), (5, 7))
_STRIDES = ((2, 2), (2, 2))
_CHANNELS = 32
# Of SpecAugment; narrower than the paper's, whose runs have a hundred times the steps. Not tuned.
_MASKS = {"bands": 15, "share": 0.1}
_DROPOUT = 0.3
_WEIGHT_DECAY = 0.01
# The loss is divided by a constant and not by a batch's number of characters, which would differ on each replica. It is
# divided at all because gradients of a whole text, times the first loss scale, are too large for float16.
_TYPICAL_CHARACTERS = 32
_SHOWN, _HEARD = 8, 2  # clips in the table, and of them as sounds and pictures
_COLUMNS = ("reference", "heard", "log-probability")


# Flags


def define_flags(values: flags.FlagValues) -> None:
    """Defines what this task adds to the shared flags."""
    here = {"flag_values": values}
    task_help = "characters: write what is said. keywords: tell which word it is, of a set with labels."
    flags.DEFINE_enum("task", "characters", ["characters", "keywords"], task_help, **here)
    beam_help = "Texts that the served search follows, 1 to 128; of characters only."
    flags.DEFINE_integer("beam_size", 16, beam_help, 1, 128, **here)
    flags.DEFINE_integer(
        "width", 256, "LSTM units each way; of keywords channels, 32 if not given; 8 to 1024.", 8, 1024, **here
    )
    flags.DEFINE_integer(
        "depth", 3, "Bidirectional LSTMs; of keywords convolutions, 4 if not given; 1 to 12.", 1, 12, **here
    )
    keywords.define_features(values)


def choose(options) -> runner.Task:
    """Returns the task that `--task` names.

    Raises:
        AppError: a flag of the other one is given.
    """
    ignored, task = {"keywords": ("beam_size", keywords.TASK), "characters": ("features", TASK)}[options.task]
    if ignored in options.given:
        raise runner.AppError(f"--{ignored} has no effect on --task={options.task}; leave it out")
    return task


# Model


def build_model(options, data: runner.Data) -> keras.Model:
    """Waveforms (float32) and their lengths (int32) to logits of each step (float32)."""
    waveform = keras.Input([None], dtype="float32", name="waveform")
    length = keras.Input([], dtype="int32", name="length")
    front = spectra.LogMel(_SAMPLING_RATE, num_mel_bins=_NUM_MEL_BINS, name="log_mel")
    counts = spectra.num_frames(length, front.framing)
    x = augmentation.SpecAugment(**_MASKS, name="spec_augment")(front(waveform, length), counts)
    x = keras.ops.expand_dims(x, -1)
    for index, (kernel, strides) in enumerate(zip(_KERNELS, _STRIDES, strict=True)):
        x, counts = convolutions.convolve(x, counts, _CHANNELS, kernel, strides, f"conv{index}")
    own = convolutions.SequenceMask(name="own_steps")(x, counts)
    x = keras.layers.Reshape([-1, x.shape[2] * x.shape[3]], name="steps")(x)
    for index in range(options.depth):
        lstm = keras.layers.LSTM(options.width, return_sequences=True, name=f"lstm{index}")
        x = keras.layers.Bidirectional(lstm, name=f"both{index}")(x, mask=own)
        x = keras.layers.LayerNormalization(name=f"norm{index}")(x)
        x = keras.layers.Dropout(_DROPOUT, name=f"dropout{index}")(x)
    logits = keras.layers.Dense(len(data.about["characters"]) + 1, dtype="float32", name="logits")(x)
    # An operation also ends Keras' mask, by which the loss of a clip would be multiplied step by step.
    logits = keras.ops.where(own[:, :, None], logits, 0)
    return keras.Model({"waveform": waveform, "length": length}, logits, name="deep_speech")


def count_steps(lengths):
    """Returns the steps of clips of `lengths` samples; ints, numpy's or tensors of them."""
    counts = spectra.num_frames(lengths, spectra.framing(_SAMPLING_RATE))
    for stride, _ in _STRIDES:
        counts = convolutions.after(counts, stride)
    return counts


def build_optimizer(options, num_steps: int) -> keras.optimizers.Optimizer:
    """AdamW with warm-up and cosine decay."""
    return runner.adamw(options.learning_rate, num_steps, _WEIGHT_DECAY)


@keras.saving.register_keras_serializable("tfhalf.apps")
class CTCOfTypicalText(ctc.CTC):
    """CTC of a row, divided by how many characters a text typically has."""

    def call(self, y_true, y_pred):
        """Returns float32 `[batch]`."""
        return super().call(y_true, y_pred) / _TYPICAL_CHARACTERS


def build_loss(options) -> keras.losses.Loss:
    """CTC."""
    return CTCOfTypicalText()


@keras.saving.register_keras_serializable("tfhalf.apps")
class CharacterAccuracy(keras.metrics.Metric):
    """1 less the character error rate of greedy search; below 0 where more is wrong than there is."""

    def __init__(self, name: str = "character_accuracy", dtype: str = "float32"):
        super().__init__(name=name, dtype=dtype)
        self.errors = self.add_weight(name="errors", initializer="zeros")
        self.total = self.add_weight(name="total", initializer="zeros")

    def update_state(self, y_true, y_pred, sample_weight=None):
        """Adds a batch of what `ctc.pack` returns and logits."""
        y_true = tf.cast(y_true, tf.int32)
        heard, _ = ctc.greedy(y_pred, y_true[:, 0])
        wanted = tf.sparse.from_dense(tf.cast(y_true[:, 1:], tf.int64))
        errors = tf.edit_distance(tf.sparse.from_dense(tf.cast(heard, tf.int64)), wanted, normalize=False)
        self.errors.assign_add(tf.reduce_sum(errors))
        self.total.assign_add(tf.cast(tf.size(wanted.values), tf.float32))

    def result(self):
        """Returns float32, 1 at most."""
        return 1.0 - self.errors / tf.maximum(self.total, 1.0)


def build_metrics(options) -> list[keras.metrics.Metric]:
    """Accuracy in characters."""
    return [CharacterAccuracy()]


# Data


def load_data(options) -> runner.Data:
    """Reads any TFDS set with speech and its text."""
    speech = clips.feature_of(sets.describe(options).info.features)
    sets.require_features(options, "speech recognition", {speech: "Audio", "text": "Text"})
    builder = sets.prepare(options)
    parts = [clips.read(builder, split, [speech, "text"], _SAMPLING_RATE) for split in sets.split_names(builder)]
    (train, *_), references = parts, [[alphabet.normalize(text.decode()) for text in texts] for _, texts in parts]
    characters, rare = alphabet.learn(references[0])
    if rare:
        told = ", ".join(f"{each!r} {count}" for each, count in rare.items())
        runner.say(f"{sum(rare.values()):,} characters of the training texts are none of the model's: {told}")
    labels = [[characters.encode(text) for text in texts] for texts in references]
    kept = _trainable(train[0], labels[0])
    lengths = np.array([len(clip) for clip in train[0]])
    order, steps = batches.training_order(options, lengths[kept])
    versions = augmentation.at_random_speeds(lambda epoch: kept[order(epoch)], options.seed, len(_SPEEDS))
    train, validation, test = (
        _Part(sounds, own, texts) for (sounds, _), own, texts in zip(parts, labels, references, strict=True)
    )
    shown = np.linspace(0, len(validation.clips) - 1, _SHOWN, dtype=int)
    return runner.Data(
        train=lambda epoch: train.for_training(versions(epoch), options.batch_size, _SPEEDS),
        steps_per_epoch=steps,
        validation=validation.for_training(validation.by_length(), options.batch_size),
        # From the middle on: a bundle is compared with the model on the first ones.
        test=test.for_serving(np.roll(test.by_length(), -len(test.clips) // 2), options.batch_size),
        about={
            "sampling_rate": _SAMPLING_RATE,
            "characters": characters.characters,
            "beam_size": options.beam_size,
        },
        shown=validation.for_serving(shown, _SHOWN),
        resources=(characters,),
    )


def _trainable(sounds: list[np.ndarray], labels: list[np.ndarray]) -> np.ndarray:
    """The clips that can be trained on at any speed."""
    lengths = np.array([len(clip) for clip in sounds])
    too_long = lengths > _LONGEST * _SAMPLING_RATE
    needed = np.array([len(own) + np.sum(own[1:] == own[:-1]) for own in labels])
    too_short = (needed > count_steps((lengths / max(_SPEEDS)).astype(int))) & ~too_long
    wordless = (needed == 0) & ~too_long
    for reason, which in (
        (f"longer than {_LONGEST:g} seconds", too_long),
        ("have a text too long for them", too_short),
        ("have no text", wordless),
    ):
        if which.any():
            runner.say(f"{which.sum():,} of {len(which):,} training clips are left out: {reason}")
    (kept,) = np.nonzero(~too_long & ~too_short & ~wordless)
    if not len(kept):
        raise runner.AppError("no training clip is left; choose another --dataset")
    return kept


class _Part:
    """A part of a data set: its clips, the labels of their texts, and these as they are scored."""

    def __init__(self, sounds: list[np.ndarray], labels: list[np.ndarray], references: list[str]):
        self.clips, self.references = sounds, references
        self._labels = tf.ragged.constant(labels, tf.int32, ragged_rank=1, inner_shape=())

    def by_length(self) -> np.ndarray:
        return np.argsort([len(clip) for clip in self.clips], kind="stable")

    def for_training(self, order: np.ndarray, batch_size: int, speeds: Sequence[float] = (1.0,)) -> tf.data.Dataset:
        """Batches of (waveforms, what `ctc.pack` returns); `order` as of `augmentation.reader`."""
        read = augmentation.reader(self.clips, _SAMPLING_RATE, speeds)

        def make(versions):
            waveforms, lengths = read(versions)
            labels = tf.gather(self._labels, versions // len(speeds)).to_tensor(ctc.BLANK)
            return {"waveform": waveforms, "length": lengths}, ctc.pack(count_steps(lengths), labels)

        return batches.in_batches(order, make, batch_size)

    def for_serving(self, order: np.ndarray, batch_size: int) -> tf.data.Dataset:
        """Batches of (waveforms, references)."""
        read, references = augmentation.reader(self.clips, _SAMPLING_RATE), tf.constant(self.references)

        def make(rows):
            waveforms, lengths = read(rows)
            return {"waveform": waveforms, "length": lengths}, tf.gather(references, rows)

        return batches.in_batches(order, make, batch_size)


# What is served, how it is scored and shown


def serve(model: keras.Model, data: runner.Data):
    """Waveforms and their lengths to log-probabilities of each step; 0 behind a clip's own. `decide` searches."""

    def hear(waveform, length):
        length = tf.clip_by_value(length, 0, tf.shape(waveform)[1])
        return _raw(model({"waveform": waveform, "length": length}, training=False), length)

    return hear, {"waveform": tf.TensorSpec([None, None], tf.float32), "length": tf.TensorSpec([None], tf.int32)}


def _raw(logits: tf.Tensor, length: tf.Tensor) -> dict[str, tf.Tensor]:
    """What `decide` takes of logits; an empty clip has no steps."""
    num_steps = tf.where(length > 0, count_steps(length), 0)
    own = tf.sequence_mask(num_steps, tf.shape(logits)[1])[:, :, tf.newaxis]
    return {"log_probs": tf.where(own, tf.nn.log_softmax(logits), 0.0), "num_steps": num_steps}


def decide(model: keras.Model, data: runner.Data):
    """Beam search, and greedy search beside it."""
    (characters,) = data.resources

    def write(raw, find, **settings):
        labels, scores = find(raw["log_probs"], raw["num_steps"], **settings)
        return {"text": characters.decode(labels), "score": scores}

    return {
        "": lambda raw: write(raw, ctc.beam, beam_size=data.about["beam_size"]),
        "_greedy": lambda raw: write(raw, ctc.greedy),
    }


def transcripts(call: runner.Call, dataset: tf.data.Dataset) -> list[tuple[str, str, float]]:
    """References, what the served function hears, and how sure it is."""
    rows = []
    for inputs, references in dataset:
        outputs = {name: np.asarray(array) for name, array in call(**inputs).items()}
        columns = ([text.decode() for text in column] for column in (references.numpy(), outputs["text"]))
        rows += zip(*columns, map(float, outputs["score"]), strict=True)
    return rows


def score(call: runner.Call, data: runner.Data) -> dict[str, float]:
    """Error rates in characters and words over the test part."""
    references, heard, _ = zip(*transcripts(call, data.test), strict=True)
    return compare(references, heard)


def compare(references: Sequence[str], heard: Sequence[str]) -> dict[str, float]:
    """Returns error rates over all texts together, and how many characters the references have."""
    return {
        "cer": jiwer.cer(list(references), list(heard)),
        "wer": jiwer.wer(list(references), list(heard)),
        "total": sum(map(len, references)),
    }


def describe(scores: dict[str, float]) -> str:
    """The line that ends a run."""
    return f"Test {in_words(scores)}"


def in_words(scores: dict[str, float]) -> str:
    """Returns what `compare` returned as a part of a line."""
    return f"CER: {100 * scores['cer']:.2f}% of {scores['total']:,.0f} characters | WER: {100 * scores['wer']:.2f}%"


def show(model: keras.Model, data: runner.Data) -> dict[str, bytes | str]:
    """Some validation clips, what greedy search hears in them, and which character of the reference is said when."""
    (characters,), find = data.resources, decide(model, data)["_greedy"]
    inputs, references = next(iter(data.shown))
    # Keras keeps this function: one of our own would be traced anew after each epoch.
    outputs = _raw(tf.constant(model.predict_on_batch(inputs)), inputs["length"])
    rows = transcripts(lambda **_: find(outputs), data.shown)
    shown: dict[str, bytes | str] = {"transcripts": _table(rows)}
    labels = tf.ragged.stack([characters.encode(text.decode()) for text in references.numpy()]).to_tensor()
    aligned = ctc.align(outputs["log_probs"], outputs["num_steps"], labels)
    sounds = clips.cut(**inputs)[:_HEARD]
    figure = clips.spectrograms(
        [(text, sound) for (text, *_), sound in zip(rows, sounds, strict=False)], _SAMPLING_RATE
    )
    seconds = 0.01 * np.prod([stride for stride, _ in _STRIDES])
    for axes, own, durations in zip(figure.axes, labels.numpy(), aligned.durations.numpy(), strict=False):
        names = [characters.characters[label - 1] for label in own if label]
        clips.draw_labels(axes, names, seconds * np.cumsum(durations[: len(names)]))
    shown["alignment"] = figures.to_png(figure)
    return shown | {f"clip{number}": waveforms.to_wav(sound, _SAMPLING_RATE) for number, sound in enumerate(sounds, 1)}


def _table(rows: list[tuple[str, str, float]]) -> str:
    return figures.to_table(_COLUMNS, ((reference, heard, f"{score:.1f}") for reference, heard, score in rows))


def conclude(call: runner.Call, data: runner.Data, folder: Path) -> dict[str, bytes | str]:
    """Some test clips with what is heard in them; also as files to try apps/predict.py on."""
    chosen = data.test.unbatch().shard(max(1, sum(len(texts) for _, texts in data.test) // _SHOWN), 0).take(_SHOWN)
    rows = transcripts(call, chosen.batch(1))
    sounds = [clips.cut(**inputs)[0] for inputs, _ in chosen.batch(1)]
    clips.write_examples(sounds, _SAMPLING_RATE, folder)
    titled = [(f"{reference} | {heard}", sound) for (reference, heard, _), sound in zip(rows, sounds, strict=True)]
    figure = clips.spectrograms(titled[:_HEARD], _SAMPLING_RATE)
    shown: dict[str, bytes | str] = {"test_transcripts": _table(rows), "test_clips": figures.to_png(figure)}
    wavs = (waveforms.to_wav(sound, _SAMPLING_RATE) for sound in sounds[:_HEARD])
    return shown | {f"test_clip{number}": wav for number, wav in enumerate(wavs, 1)}


# Main

TASK = runner.Task(
    name="speech_recognition",
    define_flags=define_flags,
    defaults={"dataset": "fillets_cs", "batch_size": 16, "epochs": 45, "learning_rate": 2e-3},
    load_data=load_data,
    build_model=build_model,
    build_optimizer=build_optimizer,
    build_loss=build_loss,
    build_metrics=build_metrics,
    monitor="val_character_accuracy",
    serve=serve,
    decide=decide,
    score=score,
    metric="cer",
    margin=0.005,
    describe=describe,
    show=show,
    conclude=conclude,
    choose=choose,
    short={"width": 64, "depth": 2, "epochs": 8, "beam_size": 1},
)

if __name__ == "__main__":
    runner.main(TASK)
