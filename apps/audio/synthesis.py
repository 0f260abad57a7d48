"""Speech synthesis: text to speech, in the voice of one speaker.

    python -m apps.audio.recognition --dataset=fillets_cs
    python -m apps.audio.synthesis --dataset=fillets_cs
    python -m apps.predict --saved_model=saved_models/speech_synthesis_fillets_cs --output=spoken/ "Dobrý den"

Expected of it: the recogniser gets 38% of the characters of its sentences wrong, 1.5 times as many as of the
recordings, after 33 minutes of epochs on 2 cores, with other programs beside (mixed_float16, 2026-11-26).

FastSpeech 2 (`apps.audio.fastspeech`) makes log-mel frames of characters, Griffin-Lim a waveform of them. How long each
character is said in the recordings tells a recogniser of the same language, by CTC (`apps.audio.listener`), so that is
trained first. Served is text in, sound out; both are parts of the exported graph. Of a text the first 400 characters
are spoken, without digits; at marks there are pauses.

Speech is measured by its mel-cepstral distortion from the recordings of the test part, and by how well the recogniser
understands it: its character error rate on synthetic speech, beside that on the recordings, and on what Griffin-Lim
makes of the recordings' own features, which is the best that a network could do here.

Half precision: as `apps.audio.fastspeech` says; features and Griffin-Lim are float32.

Source: Ren et al. 2021, "FastSpeech 2: fast and high-quality end-to-end text to speech", arXiv:2006.04558.
"""

import dataclasses
import functools
from pathlib import Path
from typing import NamedTuple

import jiwer
import keras
import numpy as np
import tensorflow as tf
from absl import flags

from apps import batches, figures, runner, sets
from apps.audio import alphabet, cepstra, clips, fastspeech, prosody, spectra, waveforms
from apps.audio.listener import Listener

_SAMPLING_RATE = 16_000
_NUM_MEL_BINS = 80
_LONGEST = 10.0  # seconds of a clip that is trained on
_LONGEST_TEXT = 400  # characters that are spoken; attention takes memory by their square
_LONGEST_SOUND = 100  # frames of a character
_FORCED = 4  # frames of each character where a bundle is compared with the model
_WEIGHT_DECAY = 0.01
_SHOWN, _WRITTEN = 2, 8  # sentences as pictures and sounds, and as files
_PARTS = ("training", "validation", "test")


# Flags


def define_flags(values: flags.FlagValues) -> None:
    """Defines what this task adds to the shared flags."""
    here = {"flag_values": values}
    speaker_help = "Whose voice, of a data set with speakers. Default: the one with most clips."
    flags.DEFINE_string("speaker", None, speaker_help, **here)
    recogniser_help = "Bundle of apps.audio.recognition. Default: speech_recognition_<data set> in --saved_model_dir."
    flags.DEFINE_string("recogniser", None, recogniser_help, **here)
    iterations_help = "Griffin-Lim's iterations in the served graph, 1 to 1000."
    flags.DEFINE_integer("iterations", 60, iterations_help, 1, 1000, **here)
    flags.DEFINE_integer("width", 128, "Numbers that stand for a character or frame, 16 to 1024.", 16, 1024, **here)
    flags.DEFINE_integer("depth", 2, "Blocks of the encoder, and of the decoder, 1 to 12.", 1, 12, **here)


# Model


@functools.cache
def front() -> spectra.LogMel:
    """The features that are learned; windows longer than a recogniser's, so that Griffin-Lim has more to go by."""
    return spectra.LogMel(_SAMPLING_RATE, window=0.04, num_mel_bins=_NUM_MEL_BINS, normalize=False)


def _features(waveform: np.ndarray) -> np.ndarray:
    """Those of one waveform, float32 `[samples]`: float32 `[frames, bands]`."""
    return front()(waveform[np.newaxis], np.array([len(waveform)]))[0].numpy()


def build_model(options, data: runner.Data) -> keras.Model:
    """FastSpeech 2, with the true durations, pitch and loudness as inputs."""
    return fastspeech.build_model(len(data.about["characters"]), _NUM_MEL_BINS, options.width, options.depth)


def build_optimizer(options, num_steps: int) -> keras.optimizers.Optimizer:
    """AdamW with warm-up and cosine decay."""
    return runner.adamw(options.learning_rate, num_steps, _WEIGHT_DECAY)


@keras.saving.register_keras_serializable("tfhalf.apps")
class FrameError(keras.losses.Loss):
    """Mean absolute error of a row's own places.

    y_true is float32 `[batch, places, numbers + 1]`, the last of which is 1 for a row's own places and 0 for others;
    y_pred `[batch, places, numbers]`.
    """

    def __init__(self, name: str = "frame_error", **settings):
        super().__init__(name=name, **{"dtype": "float32"} | settings)

    def call(self, y_true, y_pred):
        """Returns float32 `[batch]`."""
        own = y_true[..., -1]
        y_pred = tf.where(own[..., tf.newaxis] > 0, y_pred, 0.0)  # what is filled up must not overflow
        errors = tf.reduce_mean(self.errors(y_true[..., :-1], y_pred), axis=-1)
        return tf.reduce_sum(own * errors, axis=1) / tf.maximum(tf.reduce_sum(own, axis=1), 1.0)

    def errors(self, true, predicted):
        """Returns those of each number."""
        return tf.abs(true - predicted)


@keras.saving.register_keras_serializable("tfhalf.apps")
class ProsodyError(FrameError):
    """The same of durations, pitch and loudness: half the deviance of Poisson's distribution, and squared errors.

    What is predicted of a duration is its logarithm. Squared errors of logarithms, which the paper has, are least at a
    geometric mean, so that speech would be too fast. Poisson's are least at the mean.
    """

    def __init__(self, name: str = "prosody_error", **settings):
        super().__init__(name=name, **settings)

    def errors(self, true, predicted):
        """Returns those of each number."""
        duration, logarithm = true[..., :1], predicted[..., :1]
        deviance = tf.exp(logarithm) - duration - duration * logarithm + tf.math.xlogy(duration, duration)
        return tf.concat([deviance, (true[..., 1:] - predicted[..., 1:]) ** 2], axis=-1)


def build_loss(options) -> dict[str, keras.losses.Loss]:
    """Errors of frames; of durations, pitch and loudness."""
    return {"mel": FrameError(), "prosody": ProsodyError()}


def build_metrics(options) -> list[keras.metrics.Metric]:
    """None: the losses tell it."""
    return []


# Data


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpokenData(runner.Data):
    """Data with a recogniser to judge by.

    Attributes:
        listener: the recogniser.
    """

    listener: Listener

    @functools.cached_property
    def yardstick(self) -> dict[str, float]:
        """What the test part's recordings reach themselves, and what Griffin-Lim makes of their own features."""
        texts, recordings = [], []
        for inputs, batch in self.test:
            texts += [alphabet.normalize(text.decode()) for text in inputs["text"].numpy()]
            recordings += clips.cut(*batch)
        features = [_features(recording) for recording in recordings]
        vocoded = [vocode(each[tf.newaxis], [len(each)], self.about["iterations"])[0][0].numpy() for each in features]
        reached = _compare(self.listener, texts, recordings, vocoded)
        heard = self.listener.transcribe(recordings)
        return {
            "recordings_cer": jiwer.cer(texts, heard),
            "vocoded_cer": reached["cer"],
            "vocoded_mcd": reached["mcd"],
        }


def load_data(options) -> SpokenData:
    """Reads any TFDS set with speech and its text; of one with speakers, one of them."""
    features = sets.describe(options).info.features
    speech = clips.feature_of(features)
    text = "text_normalized" if "text_normalized" in features else "text"
    sets.require_features(options, "speech synthesis", {speech: "Audio", text: "Text"})
    if options.speaker is not None and "speaker" not in features:
        raise runner.AppError(f"--speaker={options.speaker}: {options.dataset} has no speakers; leave it out")
    if options.width % 2:
        raise runner.AppError(f"--width={options.width} must be even: it is shared by two heads")
    listener = _find_listener(options)
    builder = sets.prepare(options)
    names = [speech, text, *(["speaker"] if "speaker" in features else [])]
    read = [clips.read(builder, split, names, _SAMPLING_RATE) for split in sets.split_names(builder)]
    speaker = _choose_speaker(options, features, read[0])
    if speaker is not None:
        index = features["speaker"].names.index(speaker)
        read = [_of_speaker(part, index, speaker, name) for part, name in zip(read, _PARTS, strict=True)]
        runner.say(f"the voice is {speaker}'s")
    script = alphabet.Alphabet([*listener.alphabet.characters, alphabet.MARK])
    examples = [_examples(listener, script, *part[:2], name) for part, name in zip(read[:2], _PARTS, strict=False)]
    scale = prosody.Scale.of(examples[0])
    train, validation = (prosody.Part(each, scale) for each in examples)
    order, steps = batches.training_order(options, train.lengths)
    by_length = np.argsort([len(clip) for clip in read[2][0]], kind="stable")
    shown = np.linspace(0, len(read[1][0]) - 1, _SHOWN, dtype=int)
    return SpokenData(
        train=lambda epoch: train.in_batches(order(epoch), options.batch_size),
        steps_per_epoch=steps,
        validation=validation.in_batches(np.argsort(validation.lengths, kind="stable"), options.batch_size),
        # From the middle on: a bundle is compared with the model on the first ones.
        test=_sentences(*read[2][:2], np.roll(by_length, -len(by_length) // 2), options.batch_size),
        about={
            "sampling_rate": _SAMPLING_RATE,
            "characters": script.characters,
            "speaker": speaker,
            "iterations": options.iterations,
            "recogniser": str(listener.folder),
            "features": {"mean": scale.features[0].tolist(), "deviation": scale.features[1].tolist()},
        },
        shown=_sentences(*read[1][:2], shown, _SHOWN),
        resources=(script,),
        listener=listener,
    )


def _find_listener(options) -> Listener:
    """The recogniser that `--recogniser` names, or the one that is published beside."""
    if options.recogniser is not None:
        return Listener(options.recogniser, _SAMPLING_RATE)
    folder = Path(options.saved_model_dir, f"speech_recognition_{options.dataset.replace('/', '_')}")
    if not folder.exists():
        raise runner.AppError(
            f"--recogniser is missing, and there is no {folder}: first run python -m apps.audio.recognition "
            f"--dataset={options.dataset}"
        )
    return Listener(folder, _SAMPLING_RATE)


def _choose_speaker(options, features, train: list) -> str | None:
    """The speaker to learn, of a set that has some.

    Raises:
        AppError: the flag names another one.
    """
    if "speaker" not in features:
        return None
    names = features["speaker"].names
    if options.speaker is not None and options.speaker not in names:
        raise runner.AppError(f"--speaker={options.speaker}: {options.dataset} has {', '.join(names)}")
    return options.speaker or names[np.bincount(train[2]).argmax()]


def _of_speaker(part: list, index: int, speaker: str, name: str) -> list:
    sounds, texts, speakers = part
    (chosen,) = np.nonzero(speakers == index)
    if not len(chosen):
        raise runner.AppError(f"the {name} part has no clip of {speaker}; choose another --speaker")
    return [[sounds[row] for row in chosen], texts[chosen]]


def _examples(
    listener: Listener, script: alphabet.Alphabet, sounds, texts: np.ndarray, part: str
) -> list[prosody.Example]:
    """What is learned of a part's clips; without those that are too long, or too short for what they say."""
    space, mark = script.encode(" " + alphabet.MARK)
    labels = [script.encode(alphabet.normalize(text.decode(), with_marks=True)) for text in texts]
    rows = [row for row, own in enumerate(labels) if len(own) and len(sounds[row]) <= _LONGEST * _SAMPLING_RATE]
    runner.say(f"finding out when each character is said in {len(rows):,} {part} clips")
    chosen, own = [clips.to_waveform(sounds[row]) for row in rows], [labels[row] for row in rows]
    heard = [np.where(labels == mark, space, labels) for labels in own]
    aligned = listener.align(chosen, heard, front().framing.sequence_stride)
    found = [
        prosody.examine(clip, np.pad(labels, 1, constant_values=mark), durations, _features(clip), _SAMPLING_RATE)
        for clip, labels, durations in zip(chosen, own, aligned, strict=True)
        if durations.any()
    ]
    if left_out := len(sounds) - len(found):
        reason = f"longer than {_LONGEST:g} seconds, without a text, or too short for theirs"
        runner.say(f"{left_out:,} of {len(sounds):,} {part} clips are left out: {reason}")
    if not found:
        raise runner.AppError(f"no {part} clip is left; choose another --dataset or --speaker")
    return found


def _sentences(sounds, texts: np.ndarray, order: np.ndarray, batch_size: int) -> tf.data.Dataset:
    """Batches of (texts, (recordings, their lengths))."""
    sounds, texts = clips.to_ragged(sounds), tf.constant(texts)

    def make(rows):
        return {"text": tf.gather(texts, rows)}, clips.pad(tf.gather(sounds, rows), _SAMPLING_RATE)

    return batches.in_batches(order, make, batch_size)


# What is served, how it is scored and shown


def serve(model: keras.Model, data: runner.Data):
    """Texts to labels, pauses around them; what the encoder makes of these; how long, high and loud each is said.

    Frames are computed, too, with the same duration for each character, so that every weight counts where a bundle is
    compared with the model. `decide` speaks.
    """
    (script,), (read, make_frames) = data.resources, fastspeech.halves(model)
    (mark,) = script.encode(alphabet.MARK)

    def encode(text):
        around = tf.fill([tf.shape(text)[0], 1], mark)
        labels = tf.concat([around, script.tokenize(text)[:, :_LONGEST_TEXT], around], axis=1).to_tensor(0)
        encoded, predicted = read(labels, training=False)
        durations = _FORCED * tf.cast(labels > 0, tf.int32)
        mel = make_frames([encoded, durations, predicted[..., 1:]], training=False)
        return {"labels": labels, "encoded": encoded, "prosody": predicted, "mel": mel}

    return encode, {"text": tf.TensorSpec([None], tf.string)}


def decide(model: keras.Model, data: runner.Data):
    """Whole numbers of frames for each character, and the waveform."""
    _, make_frames = fastspeech.halves(model)
    mean, deviation = (np.array(data.about["features"][name], np.float32) for name in ("mean", "deviation"))

    def speak(raw):
        own = raw["labels"] > 0
        own &= tf.math.count_nonzero(own, axis=1, keepdims=True) > 2  # more than the pauses around: else say nothing
        durations = tf.round(prosody.UNIT * tf.exp(raw["prosody"][..., 0]))
        durations = tf.cast(tf.clip_by_value(durations, 1.0, _LONGEST_SOUND), tf.int32) * tf.cast(own, tf.int32)
        mel = make_frames([raw["encoded"], durations, raw["prosody"][..., 1:]], training=False)
        num_frames = tf.reduce_sum(durations, axis=1)
        waveform, length = vocode(mel * deviation + mean, num_frames, data.about["iterations"])
        return {"waveform": waveform, "length": length, "durations": durations}

    return {"": speak}


def vocode(features: tf.Tensor, num_frames: tf.Tensor, iterations: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns waveforms that have about these features.

    Args:
        features: as of `front`, float32 `[batch, frames, bands]`.
        num_frames: of each row, int32 `[batch]`; those behind are ignored.
        iterations: of Griffin-Lim.

    Returns:
        Waveforms, float32 `[batch, samples]` from -1 to 1, and their lengths, int32 `[batch]`.
    """
    layer = front()
    lengths = tf.maximum(tf.convert_to_tensor(num_frames) - 1, 0) * layer.framing.sequence_stride
    waveform = spectra.griffin_lim(layer.magnitudes(features), lengths, layer.framing, iterations=iterations)
    return tf.clip_by_value(waveform, -1.0, 1.0), lengths


class Spoken(NamedTuple):
    """A sentence: its text, normalised; the recording and what was made, float32 `[samples]`; frames of characters."""

    text: str
    recording: np.ndarray
    synthetic: np.ndarray
    durations: np.ndarray


def sentences(call: runner.Call, dataset: tf.data.Dataset) -> list[Spoken]:
    """Returns what the served function makes of sentences."""
    rows = []
    for inputs, recordings in dataset:
        outputs = {name: np.asarray(array) for name, array in call(**inputs).items()}
        texts = [alphabet.normalize(text.decode()) for text in inputs["text"].numpy()]
        spoken = clips.cut(tf.constant(outputs["waveform"]), tf.constant(outputs["length"]))
        rows += map(Spoken, texts, clips.cut(*recordings), spoken, outputs["durations"])
    return rows


def score(call: runner.Call, data: SpokenData) -> dict[str, float]:
    """Distortion and error rate of the test part's sentences, beside those of the recordings."""
    texts, recordings, synthetic, _ = zip(*sentences(call, data.test), strict=True)
    return _compare(data.listener, texts, recordings, synthetic) | data.yardstick | {"total": len(texts)}


def _compare(listener: Listener, texts, recordings, sounds) -> dict[str, float]:
    """How far sounds are from the recordings of the same sentences, and how many characters are heard wrongly."""
    distortions = [
        cepstra.distortion(_features(recording), _features(sound))
        for recording, sound in zip(recordings, sounds, strict=True)
    ]
    return {"mcd": float(np.mean(distortions)), "cer": jiwer.cer(list(texts), listener.transcribe(sounds))}


def describe(scores: dict[str, float]) -> str:
    """The line that ends a run."""
    return (
        f"Test mel-cepstral distortion: {scores['mcd']:.2f} dB | CER by the recogniser: {100 * scores['cer']:.2f}%, "
        f"{scores['cer'] / max(scores['recordings_cer'], 1e-9):.2f} times that of the recordings"
    )


def show(model: keras.Model, data: SpokenData) -> dict[str, bytes]:
    """Validation sentences beside their recordings: when each character is said, and how it sounds."""
    encode, speak = serve(model, data)[0], decide(model, data)[""]
    return _pictures_and_sounds(sentences(lambda text: speak(encode(text)), data.shown), data)


def conclude(call: runner.Call, data: SpokenData, folder: Path) -> dict[str, bytes]:
    """The same of some test sentences; and texts as files to try apps/predict.py on."""
    texts = [text.decode() for inputs, _ in data.test for text in inputs["text"].numpy()]
    chosen = np.linspace(0, len(texts) - 1, min(_WRITTEN, len(texts)), dtype=int)
    for number, row in enumerate(chosen, 1):
        (folder / f"text{number}.txt").write_text(texts[row], encoding="utf-8")
    few = data.test.unbatch().shard(max(1, len(texts) // _SHOWN), 0).take(_SHOWN).batch(1)
    return _pictures_and_sounds(sentences(call, few), data, "test_")


def _pictures_and_sounds(rows: list[Spoken], data: SpokenData, prefix: str = "") -> dict[str, bytes]:
    (script,), shown, seconds = data.resources, {}, front().framing.sequence_stride / _SAMPLING_RATE
    for number, row in enumerate(rows, 1):
        figure = clips.spectrograms([(row.text, row.synthetic), ("the recording", row.recording)], _SAMPLING_RATE)
        characters = ["", *(script.characters[label - 1] for label in script.encode(row.text)), ""]
        clips.draw_labels(figure.axes[0], characters, seconds * np.cumsum(row.durations[: len(characters)]))
        shown[f"{prefix}sentence{number}"] = figures.to_png(figure)
        for name, sound in (("synthetic", row.synthetic), ("recording", row.recording)):
            shown[f"{prefix}sentence{number}_{name}"] = waveforms.to_wav(sound, _SAMPLING_RATE)
    return shown


# Main

TASK = runner.Task(
    name="speech_synthesis",
    define_flags=define_flags,
    defaults={"dataset": "fillets_cs", "batch_size": 8, "epochs": 45, "learning_rate": 1e-3},
    load_data=load_data,
    build_model=build_model,
    build_optimizer=build_optimizer,
    build_loss=build_loss,
    build_metrics=build_metrics,
    monitor="val_mel_loss",
    serve=serve,
    decide=decide,
    score=score,
    metric="mcd",
    margin=0.1,
    describe=describe,
    show=show,
    conclude=conclude,
    short={"width": 64, "depth": 1, "epochs": 4, "steps_per_epoch": 60, "iterations": 8},
)

if __name__ == "__main__":
    runner.main(TASK)
