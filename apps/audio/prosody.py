"""What speech synthesis learns from a recording: its frames, and of each character how long, how high, how loud it is.

Pitch is the mean logarithm of the fundamental frequency over a character's voiced frames, loudness the mean of log-mel
features; a character without such frames has what its neighbours lead to. All but durations are standardised: mean 0
and variance 1 over the training part, features band by band.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from apps import batches
from apps.audio import pitch

UNIT = 10.0  # frames that a duration is told in, so that it is as large as the rest


class Example(NamedTuple):
    """One recording.

    Attributes:
        labels: of its characters, int32 `[length]`.
        durations: frames of each, int32 `[length]`.
        pitch: octaves above 1 Hz, float32 `[length]`; nan where no voice is heard in the whole clip.
        loudness: mean of the features, float32 `[length]`.
        features: log-mel, float32 `[frames, bands]`.
    """

    labels: np.ndarray
    durations: np.ndarray
    pitch: np.ndarray
    loudness: np.ndarray
    features: np.ndarray


def examine(
    waveform: np.ndarray, labels: np.ndarray, durations: np.ndarray, features: np.ndarray, rate: int
) -> Example:
    """Returns what is to be learned of a clip.

    Args:
        waveform: float32 `[samples]`.
        labels: int32 `[length]`.
        durations: in frames of 10 ms, as many as the clip has, int32 `[length]`.
        features: log-mel of the waveform, not normalised, with frames of 10 ms, float32 `[frames, bands]`.
        rate: samples a second.
    """
    hertz = pitch.track(waveform, rate)
    of_label = np.repeat(np.arange(len(labels)), durations)
    octaves = np.log2(np.where(hertz > 0, hertz, 1.0))
    return Example(
        labels,
        durations,
        _means(octaves, hertz > 0, of_label, len(labels)),
        _means(features.mean(axis=1), np.ones(len(features)), of_label, len(labels)),
        features,
    )


def _means(values: np.ndarray, counts: np.ndarray, of_label: np.ndarray, num_labels: int) -> np.ndarray:
    """Each label's mean over its frames that count; on a line between the others' where there is none."""
    totals, sizes = (np.bincount(of_label, weights, num_labels) for weights in (values * counts, counts))
    (known,) = np.nonzero(sizes)
    if not len(known):
        return np.full(num_labels, np.nan, np.float32)
    return np.interp(np.arange(num_labels), known, totals[known] / sizes[known]).astype(np.float32)


class Scale(NamedTuple):
    """Means and standard deviations of a training part.

    Attributes:
        features: of each band, float32 `[bands]`, twice.
        pitch: octaves.
        loudness: of the mean over all bands.
    """

    features: tuple[np.ndarray, np.ndarray]
    pitch: tuple[float, float]
    loudness: tuple[float, float]

    @classmethod
    def of(cls, examples: Sequence[Example]) -> "Scale":
        """Returns those of some examples."""
        frames = np.concatenate([each.features for each in examples])
        octaves = np.concatenate([each.pitch for each in examples])
        loudness = np.concatenate([each.loudness for each in examples])
        octaves = octaves[~np.isnan(octaves)]
        return cls(_moments(frames), _moments(octaves if len(octaves) else np.zeros(1)), _moments(loudness))


class Part:
    """A part of a data set, standardised.

    Args:
        examples: 1 or more.
        scale: of the training part.
    """

    def __init__(self, examples: Sequence[Example], scale: Scale):
        def ragged(rows):
            rows = [np.asarray(row) for row in rows]
            return tf.RaggedTensor.from_row_lengths(np.concatenate(rows), [len(row) for row in rows])

        def told(each: Example):
            octaves = np.nan_to_num(_standardise(each.pitch, scale.pitch))
            return np.stack([octaves, _standardise(each.loudness, scale.loudness)], axis=1).astype(np.float32)

        self.lengths = np.array([len(each.features) for each in examples])
        self._labels = ragged(each.labels for each in examples)
        self._durations = ragged(each.durations for each in examples)
        self._prosody = ragged(told(each) for each in examples)
        self._features = ragged(_standardise(each.features, scale.features).astype(np.float32) for each in examples)

    def in_batches(self, order: np.ndarray, batch_size: int) -> tf.data.Dataset:
        """Returns batches as `apps.audio.fastspeech` takes them; targets' last number is 1 for what is a row's own.

        Targets have durations divided by `UNIT`.

        Args:
            order: as of `apps.batches.in_batches`.
            batch_size: examples in a batch.
        """

        def make(rows):
            labels, durations, prosody, features = (
                tf.gather(each, rows).to_tensor()
                for each in (self._labels, self._durations, self._prosody, self._features)
            )
            tens = tf.cast(durations, tf.float32)[..., tf.newaxis] / UNIT
            own = tf.cast(labels > 0, tf.float32)[..., tf.newaxis]
            frames = tf.gather(self._features, rows).row_lengths()
            own_frames = tf.sequence_mask(frames, tf.shape(features)[1], tf.float32)[..., tf.newaxis]
            targets = {
                "mel": tf.concat([features, own_frames], axis=2),
                "prosody": tf.concat([tens, prosody, own], axis=2),
            }
            return {"labels": labels, "durations": durations, "prosody": prosody}, targets

        return batches.in_batches(order, make, batch_size)


def _moments(values: np.ndarray) -> tuple:
    """Mean and standard deviation along the first axis; 1 where nothing differs."""
    deviation = values.std(axis=0, dtype=np.float64)
    return values.mean(axis=0, dtype=np.float64), np.where(deviation > 0, deviation, 1.0)


def _standardise(values: np.ndarray, moments: tuple) -> np.ndarray:
    return (values - moments[0]) / moments[1]
