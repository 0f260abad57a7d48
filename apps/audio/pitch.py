"""Pitch: how alike a waveform is to itself a lag later, and what that says of a voice's fundamental frequency.

Half precision: everything is float32 whatever the policy; a correlogram divides sums over a whole spectrum.

Source: Tolonen and Karjalainen 2000, "A computationally efficient multipitch analysis model", IEEE Transactions on
Speech and Audio Processing 8(6) (the autocorrelation of compressed spectra).
"""

import keras
import numpy as np
import tensorflow as tf

from apps.audio import spectra

# Three periods of 60 Hz in a frame, in seconds; where voices have harmonics that are heard as one pitch, in Hz; the
# exponent of magnitudes (2 is the plain autocorrelation); and what one of silence has. Not tuned.
_WINDOW, _HIGHEST, _COMPRESSION, _FAINT = 0.05, 3000.0, 0.67, 1e-3
_VOICED = 0.12  # how alike a frame is to itself a period later where it counts as voiced; by eye on a few clips


class Correlogram(keras.layers.Layer):
    """How alike each frame is to itself a lag later, of waveforms of any length; it has no weights.

    A voice is alike at its period and multiples of it. Lags are evenly spaced on a logarithmic scale. Spectra are
    compressed first, so that one strong harmonic doesn't decide.

    Args:
        sampling_rate: samples a second.
        min_freq: Hz whose period is the longest lag.
        max_freq: Hz whose period is the shortest lag.
        num_lags: 2 or more.

    Source: Tolonen and Karjalainen 2000.
    """

    def __init__(
        self,
        sampling_rate: int = 16_000,
        *,
        min_freq: float = 60.0,
        max_freq: float = 600.0,
        num_lags: int = 96,
        **settings,
    ):
        super().__init__(**{"dtype": "float32", "autocast": False} | settings)
        self.framing = spectra.framing(sampling_rate, _WINDOW)
        self._config = {"sampling_rate": sampling_rate, "min_freq": min_freq, "max_freq": max_freq,
                        "num_lags": num_lags}  # fmt: skip
        hertz = np.arange(self.framing.num_bins) * sampling_rate / self.framing.fft_length
        hertz = hertz[hertz < _HIGHEST]
        lags = 1 / np.geomspace(max_freq, min_freq, num_lags)
        # The transform back to lags, at those that are wanted; frequencies but 0 and the last are there twice.
        twice = np.where((hertz == 0) | (hertz == sampling_rate / 2), 1, 2)
        self._cosines = (twice[:, np.newaxis] * np.cos(2 * np.pi * np.outer(hertz, lags))).astype("float32")
        self._twice = twice.astype("float32")[:, np.newaxis]

    def call(self, waveforms, lengths):
        """Computes the features.

        Args:
            waveforms: float32 `[batch, samples]`, full scale from -1 to 1; what lies behind a clip's end is ignored.
            lengths: samples of each clip, int32 `[batch]`.

        Returns:
            float32 `[batch, frames, num_lags]` from -1 to 1, 0 behind a clip's own frames.
        """
        waveforms = tf.where(tf.sequence_mask(lengths, tf.shape(waveforms)[1]), waveforms, 0.0)
        magnitudes = tf.abs(spectra.stft(waveforms, self.framing)[:, :, : len(self._twice)])
        powers = (magnitudes + _FAINT) ** _COMPRESSION
        alike = tf.matmul(powers, self._cosines) / tf.matmul(powers, self._twice)
        own = tf.sequence_mask(spectra.num_frames(lengths, self.framing), tf.shape(alike)[1])
        return tf.where(own[:, :, tf.newaxis], alike, 0.0)

    def compute_output_spec(self, waveforms, lengths):
        """Returns the form of the result."""
        return keras.KerasTensor([waveforms.shape[0], None, self._config["num_lags"]], "float32")

    def get_config(self) -> dict:
        """Returns the arguments."""
        return super().get_config() | self._config


def track(waveform: np.ndarray, sampling_rate: int, min_freq: float = 60.0, max_freq: float = 500.0) -> np.ndarray:
    """Returns the fundamental frequency in each frame, 10 ms apart as those of `spectra.LogMel`.

    Args:
        waveform: float32 `[samples]`, full scale from -1 to 1.
        sampling_rate: samples a second.
        min_freq: Hz, the lowest that is told.
        max_freq: Hz, the highest one.

    Returns:
        Hz, float32 `[frames]`; 0 where no voice is heard.
    """
    layer = Correlogram(sampling_rate, min_freq=min_freq, max_freq=max_freq)
    alike = layer(tf.constant(waveform)[tf.newaxis], tf.constant([len(waveform)]))[0].numpy()
    hertz = np.geomspace(max_freq, min_freq, alike.shape[1])
    return np.where(alike.max(axis=1) > _VOICED, hertz[alike.argmax(axis=1)], 0.0).astype("float32")
