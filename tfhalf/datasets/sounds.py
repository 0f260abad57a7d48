"""Sounds of data sets: files of every kind to mono samples of one rate, and how TFDS keeps them.

Reads what libsndfile reads, WAV and Ogg Vorbis among others. Channels become one, their mean; soxr resamples (its HQ).
Samples are int16. A sound that is louder than full scale is made quieter as a whole, so that no peak is cut off: Vorbis
gives many peaks back higher than they were recorded.

Source: https://libsndfile.github.io/libsndfile/ and https://sourceforge.net/projects/soxr/
"""

from pathlib import Path

import numpy as np
import soundfile
import soxr
import tensorflow_datasets as tfds

from tfhalf.datasets import packages

_FULL_SCALE = np.iinfo(np.int16).max


def read(path: Path, sampling_rate: int) -> np.ndarray:
    """Reads a sound file.

    Args:
        path: the file.
        sampling_rate: of the result, in Hz; the file's own may be any.

    Returns:
        int16 [num_samples]; there may be none.

    Raises:
        DatasetError: it isn't a sound file, or isn't there.
    """
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        reason = error.error_string.rstrip(".")
        raise packages.DatasetError(f"{path}: {reason}; remove the folder and fetch again") from error
    samples = soxr.resample(samples.mean(axis=1), rate, sampling_rate) * (_FULL_SCALE + 1)
    peak = np.abs(samples).max(initial=_FULL_SCALE)
    return np.rint(samples * (_FULL_SCALE / peak)).astype(np.int16)


def feature(sampling_rate: int, doc: str | None = None) -> tfds.features.Audio:
    """Returns TFDS's feature for int16 [num_samples]; give it `encoded(samples)`."""
    return tfds.features.Audio(
        dtype=np.int16, sample_rate=sampling_rate, encoding=tfds.features.Encoding.BYTES, doc=doc
    )


def encoded(samples: np.ndarray) -> np.ndarray:
    """Returns what `feature` stores for int16 samples: their bytes.

    As integers TFDS would store each negative sample in ten bytes. Its Audio can store bytes, but takes an array for
    stored already.
    """
    return np.array(samples.astype("<i2").tobytes(), dtype=object)
