"""What audio tasks share: clips in memory, batches of them, pictures of spectra.

Clips are int16 in memory, 115 MB an hour at 16 kHz, and float32 from -1 to 1 in a batch, filled up with silence to one
length.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import soxr
import tensorflow as tf
import tensorflow_datasets as tfds
from matplotlib.figure import Figure

from apps import runner
from apps.audio import waveforms

FULL_SCALE = 1 << 15
# Seconds that lengths of batches are multiples of: few different ones.
_MULTIPLE = 0.32
_FAINT = 1e-5  # noise that is added before a spectrum is drawn: silence has no logarithm
_DRAWN = 80  # dB


def feature_of(features: tfds.features.FeatureConnector) -> str:
    """Returns the name of the feature that is a set's sound: `speech`, as ours and LibriSpeech have, or `audio`."""
    return "speech" if "speech" in features else "audio"


def read(
    builder: tfds.core.DatasetBuilder, split: str, names: Sequence[str], sampling_rate: int
) -> list[list[np.ndarray] | np.ndarray]:
    """Returns a part's features in the order of the data set.

    Args:
        builder: prepared.
        split: as TFDS has it.
        names: of the features.
        sampling_rate: samples a second of the clips that are returned.

    Returns:
        A column for each name: of an Audio feature a list of int16 `[samples]`, else an array; texts are bytes.

    Raises:
        AppError: the part is empty; or the set doesn't tell its sampling rate, or has sound of several channels.
    """
    if not builder.info.splits[split].num_examples:  # TFDS can't read it, and says so in its own words
        raise runner.AppError(f"{builder.name}: the part {split} is empty")
    features = builder.info.features
    dataset = builder.as_dataset(split=split, shuffle_files=False)
    dataset = dataset.map(lambda example: tuple(example[name] for name in names), tf.data.AUTOTUNE)
    columns = zip(*dataset.prefetch(tf.data.AUTOTUNE).as_numpy_iterator(), strict=True)
    return [
        [_at_rate(clip, builder.name, features[name].sample_rate, sampling_rate) for clip in column]
        if isinstance(features[name], tfds.features.Audio)
        else np.array(column, object if isinstance(features[name], tfds.features.Text) else None)
        for name, column in zip(names, columns, strict=True)
    ]


def _at_rate(clip: np.ndarray, name: str, rate: int | None, sampling_rate: int) -> np.ndarray:
    if not rate:
        raise runner.AppError(f"{name} doesn't tell its sampling rate; choose another --dataset")
    if clip.ndim != 1:
        raise runner.AppError(f"{name} has sound of the shape {clip.shape}; choose a --dataset in mono")
    clip = clip.astype(np.int16)  # TFDS' own sets are int64 that hold 16 bits
    return clip if rate == sampling_rate else soxr.resample(clip, rate, sampling_rate)


def to_waveform(clip: np.ndarray) -> np.ndarray:
    """Returns an int16 clip as float32 `[samples]` from -1 to 1."""
    return clip.astype(np.float32) / FULL_SCALE


def to_ragged(clips: Iterable[np.ndarray]) -> tf.RaggedTensor:
    """Returns clips as one ragged tensor, int16 `[clips, None]`, which batches are gathered from."""
    clips = list(clips)
    values = np.concatenate([np.zeros([0], "int16"), *clips])
    return tf.RaggedTensor.from_row_lengths(values, [len(clip) for clip in clips])


def pad(clips: tf.RaggedTensor, sampling_rate: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns int16 clips as waveforms, and their lengths.

    Returns:
        float32 `[clips, samples]` from -1 to 1, samples a multiple of 0.32 seconds, and int32 `[clips]`.
    """
    padded = clips.to_tensor()
    multiple = round(_MULTIPLE * sampling_rate)
    padded = tf.pad(padded, [[0, 0], [0, -tf.shape(padded)[1] % multiple]])
    return tf.cast(padded, tf.float32) / FULL_SCALE, tf.cast(clips.row_lengths(), tf.int32)


def cut(waveform: tf.Tensor, length: tf.Tensor) -> list[np.ndarray]:
    """Returns the rows of a batch as `pad` returns it, without what is behind each clip."""
    return [row[:own] for row, own in zip(waveform.numpy(), length.numpy(), strict=True)]


def write_examples(clips: Iterable[np.ndarray], sampling_rate: int, folder: Path) -> None:
    """Writes waveforms, float `[samples]`, as files, to try apps/predict.py on."""
    for number, clip in enumerate(clips, 1):
        waveforms.write(folder / f"clip{number}.wav", clip, sampling_rate)


def spectrograms(rows: Sequence[tuple[str, np.ndarray]], sampling_rate: int) -> Figure:
    """Draws the power of waveforms over time and frequency, one below the other, all on the scale of the first.

    Args:
        rows: titles and float `[samples]`.
        sampling_rate: samples a second.
    """
    figure = Figure(figsize=(8, 0.4 + 1.8 * len(rows)), layout="constrained")
    window, highest = sampling_rate // 40, None
    for axes, (title, waveform) in zip(figure.subplots(len(rows), squeeze=False)[:, 0], rows, strict=True):
        samples = np.pad(waveform, [0, max(0, 2 * window - len(waveform))])
        samples = samples + _FAINT * np.random.default_rng(0).normal(size=len(samples))
        *_, image = axes.specgram(samples, NFFT=window, Fs=sampling_rate, noverlap=window * 3 // 4, cmap="magma")
        highest = image.get_clim()[1] if highest is None else highest
        image.set_clim(highest - _DRAWN, highest)
        axes.set(title=title, ylabel="Hz")
        axes.title.set_fontsize(9)
    axes.set_xlabel("seconds")
    return figure


def draw_labels(axes, labels: Sequence[str], ends: np.ndarray) -> None:
    """Writes over a spectrogram what is said when.

    Args:
        axes: of a spectrogram.
        labels: in order.
        ends: seconds at which each ends; one that ends where it begins isn't drawn.
    """
    top = axes.get_ylim()[1]
    for label, start, end in zip(labels, [0.0, *ends[:-1]], ends, strict=False):
        if end > start:
            axes.axvline(end, color="white", linewidth=0.3)
            axes.text((start + end) / 2, 0.98 * top, label, color="white", fontsize=7, ha="center", va="top")
