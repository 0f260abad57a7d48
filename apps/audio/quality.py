"""How near an estimate comes to clean speech: as a loss, as a metric of training, and as the measures of a test.

SI-SDR is the energy of clean speech over that of what differs from it, in dB, after the clean speech was scaled as near
to the estimate as it can be: so how loud an estimate is doesn't matter. Its mean isn't taken away. The loss is the mean
of it and of the plain ratio (SNR), minus: by SI-SDR alone a network isn't told how loud its answer should be.

A clip whose clean speech is silent has no SI-SDR: it counts 0 in the loss, without a gradient, and not at all in a
test. What is 0 in both counts nothing, so clips may be filled up with silence.

Half precision: all is float32 in a graph, float64 in a test. A sum of 24,000 squares is beyond float16's largest number
or below what its 11 bits can add.

Sources: Le Roux et al. 2019, "SDR - half-baked or well done?", arXiv:1811.02508 (SI-SDR); Wisdom et al. 2020,
arXiv:2006.12701 (the loss' soft threshold); Taal et al. 2011, IEEE Transactions on Audio, Speech, and Language
Processing 19(7) (STOI); ITU-T P.862 (PESQ).
"""

import functools
import warnings
from collections.abc import Callable, Sequence

import keras
import numpy as np
import pystoi
import tensorflow as tf

from apps import runner

# dB. A ratio beyond tells of rounding only; so much has no estimate, as one that is silent, less.
_LIMIT = 80.0
# A clip that is right to 30 dB needs no more work: without this the easiest would have the largest gradients.
_THRESHOLD = 1e-3
# STOI and PESQ take a second for 16 seconds of sound, and a run is scored four times: measured on 2 cores.
_NUM_HEARD = 100
_SHORTEST = 0.25  # seconds: of less PESQ knows nothing, and pystoi fails on less than a frame


# In a graph


@keras.saving.register_keras_serializable("tfhalf.apps")
class SpeechDistortion(keras.losses.Loss):
    """Minus the mean of SI-SDR and SNR in dB, both of at most about 30 dB; 0 where the clean speech is silent.

    y_true is clean speech, y_pred the estimate, float32 `[batch, samples]`, both 0 behind a clip's end. Each clip has
    its own loss, so it doesn't matter how clips are shared out to replicas.
    """

    def __init__(self, name: str = "speech_distortion", **settings):
        super().__init__(name=name, **{"dtype": "float32"} | settings)

    def call(self, y_true, y_pred):
        """Returns the loss of each clip, float32 `[batch]`."""
        return -(_ratio(y_true, y_pred, True, _THRESHOLD) + _ratio(y_true, y_pred, False, _THRESHOLD)) / 2


def si_sdr(y_true: tf.Tensor, y_pred: tf.Tensor) -> tf.Tensor:
    """A metric: SI-SDR of clean speech and estimates, float32 `[batch, samples]`, in dB: float32 `[batch]`.

    It is -80 to 80, and 0 where the clean speech is silent.
    """
    return _ratio(y_true, y_pred, True, 0.0)


def _ratio(clean: tf.Tensor, estimate: tf.Tensor, scaled: bool, threshold: float) -> tf.Tensor:
    """SI-SDR where `scaled`, else SNR; `threshold` times the energy of the speech is added to that of the error."""
    clean, estimate = tf.cast(clean, tf.float32), tf.cast(estimate, tf.float32)
    energy = tf.reduce_sum(clean**2, axis=1)
    heard = energy > 0
    energy = tf.where(heard, energy, 1.0)
    if scaled:
        clean *= (tf.reduce_sum(clean * estimate, axis=1) / energy)[:, tf.newaxis]
    signal, error = tf.reduce_sum(clean**2, axis=1), tf.reduce_sum((clean - estimate) ** 2, axis=1)
    # The whole decides what is nothing beside it, so that the ratio is the same at each loudness.
    whole = signal + error
    least = 10 ** (-_LIMIT / 10) * tf.where(whole > 0, whole, 1.0)
    decibels = 10 / np.log(10) * (tf.math.log(signal + least) - tf.math.log(error + threshold * signal + least))
    return tf.where(heard, tf.where(whole > 0, decibels, -_LIMIT), 0.0)


# In a test


def compare(
    cleans: Sequence[np.ndarray],
    noisies: Sequence[np.ndarray],
    estimates: Sequence[np.ndarray],
    snrs: np.ndarray,
    sampling_rate: int,
) -> dict[str, float]:
    """Measures estimates of clean speech.

    Args:
        cleans: float `[samples]` each.
        noisies: what the estimates were made from.
        estimates: of the same lengths.
        snrs: dB of the noisy clips, float `[clips]`, nan where it isn't known.
        sampling_rate: samples a second.

    Returns:
        Means over the clips whose clean speech isn't silent: `si_sdr` and `si_sdr_improvement` over the noisy clip, dB;
        `improvement_<snr>dB` for each SNR; `stoi` (0 to 1) and `pesq` (narrow band, about 1 to 4.5) over 100 of the
        clips, the same ones each time, without those that are too short or too quiet for it, and left out if that is
        all of them or the package isn't there; `total`, the number of clips.

    Raises:
        AppError: all clean speech is silent.
    """
    heard = np.array([np.any(clean) for clean in cleans], bool)
    if not heard.any():
        raise runner.AppError(
            "the clean speech of the test part is silent: it can't be scored; choose another --dataset"
        )
    rows, snrs = np.flatnonzero(heard), np.asarray(snrs)[heard]
    reached = np.array([si_sdr_of(cleans[row], estimates[row]) for row in rows])
    improvement = reached - [si_sdr_of(cleans[row], noisies[row]) for row in rows]
    scores = {"si_sdr": float(reached.mean()), "si_sdr_improvement": float(improvement.mean())}
    chosen = rows[np.argsort(snrs, kind="stable")]
    chosen = chosen[np.linspace(0, len(chosen) - 1, min(_NUM_HEARD, len(chosen))).round().astype(int)]
    for name, measure in (("stoi", _stoi), ("pesq", _pesq())):
        pairs = ((cleans[row], estimates[row]) for row in chosen if len(cleans[row]) >= _SHORTEST * sampling_rate)
        values = [measure(*pair, sampling_rate) for pair in pairs] if measure else []
        if values := [value for value in values if value is not None]:
            scores[name] = float(np.mean(values))
    for snr in np.unique(snrs[~np.isnan(snrs)]):
        scores[f"improvement_{snr:g}dB"] = float(improvement[snrs == snr].mean())
    return scores | {"total": len(rows)}


def si_sdr_of(clean: np.ndarray, estimate: np.ndarray) -> float:
    """Returns SI-SDR of clean speech that isn't silent and of an estimate, float `[samples]`, in dB, -80 to 80."""
    clean, estimate = np.asarray(clean, np.float64), np.asarray(estimate, np.float64)
    target = clean * (clean @ estimate / (clean @ clean))
    signal, error = np.sum(target**2), np.sum((target - estimate) ** 2)
    # A power of 10^-300 is nothing, of a silent estimate both.
    return float(np.clip(10 * np.log10(max(signal, 1e-308) / max(error, 1e-300)), -_LIMIT, _LIMIT))


def _stoi(clean: np.ndarray, estimate: np.ndarray, sampling_rate: int) -> float | None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            return float(pystoi.stoi(clean, estimate, sampling_rate))
        except RuntimeWarning:  # less than 30 frames of speech
            return None


@functools.cache
def _pesq() -> Callable[[np.ndarray, np.ndarray, int], float | None] | None:
    try:
        import pesq
    except ImportError as error:
        runner.say(f"PESQ isn't measured ({error}): pip install 'tfhalf[pesq]' compiles it, given a C compiler")
        return None

    def measure(clean: np.ndarray, estimate: np.ndarray, sampling_rate: int) -> float | None:
        if not np.any(estimate):
            return None
        value = pesq.pesq(sampling_rate, clean, estimate, "nb", on_error=pesq.PesqError.RETURN_VALUES)
        return float(value) if value > 0 else None

    return measure
