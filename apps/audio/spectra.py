"""Spectra of waveforms inside a graph: short-time Fourier transform and back, log-mel features, Griffin-Lim.

Frame t is the spectrum around sample t * sequence_stride, and the last frame is at the end of the clip or behind it. So
every sample lies between the middles of two frames, the first and the last one too, and comes back whatever the length.
An empty clip has one frame, of silence. What lies outside of a clip is 0, and the frames behind its own have no part in
anything, so that a clip's numbers don't depend on the clips beside it.

Half precision: everything is float32 and complex64 whatever the policy. In a frame of 400 samples rounding to 16 bits
has a power of 10^-8 in each bin, which is 0 in float16, and a sine at full scale 10^4.

Source: Griffin and Lim 1984, "Signal estimation from modified short-time Fourier transform", IEEE Transactions on
Acoustics, Speech, and Signal Processing 32(2); Perraudin, Balazs and Sondergaard 2013, "A fast Griffin-Lim algorithm",
WASPAA.
"""

import math
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

# Variance of rounding to 16 bits, of samples from -1 to 1.
_ROUNDING = 2.0**-30 / 12
# Added to a variance: rounding errors of a clip that never changes, 1e-6, must not become its features.
_TINY = 1e-5
# The smallest sum of squared windows inside of a clip is 1/4, in the middle of two frames half a window apart.
_LEAST_WEIGHT = 0.2
_SEED = (1984, 2013)


class Framing(NamedTuple):
    """How a waveform is cut into frames.

    Attributes:
        sequence_length: samples of a frame, under a Hann window that has its middle at half of them.
        sequence_stride: samples from one frame to the next, at most half of a frame.
    """

    sequence_length: int
    sequence_stride: int

    @property
    def fft_length(self) -> int:
        """A power of 2, at least as long as a frame."""
        return 1 << (self.sequence_length - 1).bit_length()

    @property
    def num_bins(self) -> int:
        """Frequencies of a spectrum, from 0 to half of the sampling rate."""
        return self.fft_length // 2 + 1


def framing(sampling_rate: int, window: float = 0.025, stride: float = 0.010) -> Framing:
    """Returns a framing in samples.

    Args:
        sampling_rate: samples a second.
        window: seconds of a frame.
        stride: seconds from one frame to the next.

    Raises:
        ValueError: a frame has less than 4 samples, or frames overlap by less than half.

    Example:
        >>> framing(16_000)
        Framing(sequence_length=400, sequence_stride=160)
    """
    result = Framing(round(window * sampling_rate), round(stride * sampling_rate))
    if result.sequence_length < 4 or not 1 <= result.sequence_stride <= result.sequence_length // 2:
        raise ValueError(
            f"window={window} and stride={stride} seconds at {sampling_rate} samples a second are {tuple(result)} "
            "samples; take a window of 4 samples or more, and a stride of 1 sample to half of the window"
        )
    return result


def num_frames(lengths, framing: Framing):
    """Returns the frames that clips of `lengths` samples have; ints, numpy's or tensors of them."""
    return -(-lengths // framing.sequence_stride) + 1


def stft(waveforms: tf.Tensor, framing: Framing) -> tf.Tensor:
    """Returns the short-time Fourier transform.

    Args:
        waveforms: float32 `[batch, samples]`, 0 behind each clip's end.
        framing: of the frames.

    Returns:
        complex64 `[batch, frames, bins]`.
    """
    length, stride = framing
    samples = tf.shape(waveforms)[1]
    behind = (num_frames(samples, framing) - 1) * stride + length - length // 2 - samples
    padded = tf.pad(waveforms, [[0, 0], [length // 2, behind]])
    return tf.signal.stft(padded, length, stride, framing.fft_length)


def inverse_stft(spectra: tf.Tensor, lengths: tf.Tensor, framing: Framing) -> tf.Tensor:
    """Returns the waveforms whose transforms are nearest to `spectra` (Griffin and Lim 1984).

    Args:
        spectra: complex64 `[batch, frames, bins]`; frames behind a clip's own are ignored.
        lengths: samples of each clip, int32 `[batch]`.
        framing: of the frames.

    Returns:
        float32 `[batch, (frames - 1) * sequence_stride]`, which is as long as the longest clip or longer; 0 behind each
        clip's end.
    """
    length, stride = framing
    frames = tf.shape(spectra)[1]
    window = tf.signal.hann_window(length)
    own = tf.sequence_mask(num_frames(lengths, framing), frames, tf.float32)[..., tf.newaxis]
    pieces = tf.signal.irfft(spectra, [framing.fft_length])[..., :length]
    # A frame that isn't the clip's may hold anything, so it is left out before it is multiplied.
    sums = tf.signal.overlap_and_add(tf.where(own > 0, pieces, 0.0) * window, stride)
    weights = tf.signal.overlap_and_add(own * window**2, stride)
    waveforms = (sums / tf.maximum(weights, _LEAST_WEIGHT))[:, length // 2 :][:, : (frames - 1) * stride]
    return tf.where(tf.sequence_mask(lengths, tf.shape(waveforms)[1]), waveforms, 0.0)


def griffin_lim(
    magnitudes: tf.Tensor, lengths: tf.Tensor, framing: Framing, *, iterations: int = 60, momentum: float = 0.99
) -> tf.Tensor:
    """Returns waveforms whose spectra have about these magnitudes.

    Phases are random at first, the same at each call and for each clip. Each iteration takes the phases of the spectrum
    that some waveform really has; with momentum it goes on in the direction of the last step, which ends nearer.

    Args:
        magnitudes: float32 `[batch, frames, bins]`, 0 or more.
        lengths: samples of each clip, int32 `[batch]`.
        framing: of the frames.
        iterations: 0 or more.
        momentum: 0 is Griffin and Lim's own algorithm, 0.99 what Perraudin et al. call the fast one.

    Returns:
        As of `inverse_stft`.
    """
    angles = 2 * math.pi * tf.random.stateless_uniform(tf.shape(magnitudes)[1:], _SEED)
    first = tf.broadcast_to(tf.exp(tf.complex(0.0, angles)), tf.shape(magnitudes))
    target = tf.cast(magnitudes, tf.complex64)

    def waveforms(spectra):
        phases = tf.math.divide_no_nan(spectra, tf.cast(tf.abs(spectra), tf.complex64))
        return inverse_stft(target * phases, lengths, framing)

    def advance(index, spectra, last):
        real = stft(waveforms(spectra), framing)
        return index + 1, real + momentum * (real - last), real

    shapes = (tf.TensorShape([]), *[tf.TensorShape([None, None, None])] * 2)
    # Where the last step is 0 there is no momentum yet: only phases count.
    variables = (tf.constant(0), first, tf.zeros_like(first))
    _, spectra, _ = tf.while_loop(lambda index, *_: index < iterations, advance, variables, shapes)
    return waveforms(spectra)


class LogMel(keras.layers.Layer):
    """Logarithms of the power in mel bands, of waveforms of any length; it has no weights.

    A band counts at least what rounding to 16 bits leaves in it: below is no sound that a 16-bit file could hold, and
    the logarithm of nothing isn't a number. With `normalize` each band has mean 0 and variance 1 over a clip's own
    frames, which takes away how loud a clip is and what the microphone does.

    Args:
        sampling_rate: samples a second.
        window: seconds of a frame.
        stride: seconds from one frame to the next.
        num_mel_bins: bands.
        min_freq: Hz where the lowest band begins.
        max_freq: Hz where the highest band ends; half of the sampling rate if None.
        normalize: whether each clip is normalised.

    Raises:
        ValueError: a band is so narrow that no frequency of the transform lies in it.
    """

    def __init__(
        self,
        sampling_rate: int = 16_000,
        *,
        window: float = 0.025,
        stride: float = 0.010,
        num_mel_bins: int = 80,
        min_freq: float = 20.0,
        max_freq: float | None = None,
        normalize: bool = True,
        **settings,
    ):
        # Without autocast no policy rounds a waveform on its way in.
        super().__init__(**{"dtype": "float32", "autocast": False} | settings)
        self.framing, self.normalize = framing(sampling_rate, window, stride), normalize
        self._config = {"sampling_rate": sampling_rate, "window": window, "stride": stride, "min_freq": min_freq,
                        "num_mel_bins": num_mel_bins, "max_freq": max_freq, "normalize": normalize}  # fmt: skip
        highest = sampling_rate / 2 if max_freq is None else max_freq
        with tf.init_scope():
            bands = tf.signal.linear_to_mel_weight_matrix(
                num_mel_bins, self.framing.num_bins, sampling_rate, min_freq, highest, tf.float64
            ).numpy()
            window_power = tf.reduce_sum(tf.signal.hann_window(self.framing.sequence_length) ** 2).numpy()
        if not bands.any(axis=0).all():
            raise ValueError(
                f"of num_mel_bins={num_mel_bins} bands from {min_freq} to {highest} Hz {np.sum(~bands.any(axis=0))} "
                f"have no frequency of a transform of {self.framing.fft_length} samples; take fewer, or a longer window"
            )
        self._bands, self._to_bins = bands.astype("float32"), np.linalg.pinv(bands).astype("float32")
        self._floor = (_ROUNDING * window_power * bands.sum(axis=0)).astype("float32")

    def call(self, waveforms, lengths):
        """Computes the features.

        Args:
            waveforms: float32 `[batch, samples]`, full scale from -1 to 1; what lies behind a clip's end is ignored.
            lengths: samples of each clip, int32 `[batch]`.

        Returns:
            float32 `[batch, frames, num_mel_bins]`, with `num_frames` of the samples. Frames behind a clip's own are 0
            if it is normalised, silence otherwise.
        """
        waveforms, lengths = tf.cast(waveforms, tf.float32), tf.cast(lengths, tf.int32)
        waveforms = tf.where(tf.sequence_mask(lengths, tf.shape(waveforms)[1]), waveforms, 0.0)
        spectra = stft(waveforms, self.framing)
        power = tf.math.real(spectra) ** 2 + tf.math.imag(spectra) ** 2
        features = tf.math.log(tf.maximum(tf.matmul(power, self._bands), self._floor))
        count = num_frames(lengths, self.framing)[:, tf.newaxis, tf.newaxis]
        own = tf.range(tf.shape(features)[1])[:, tf.newaxis] < count
        if not self.normalize:
            return tf.where(own, features, tf.math.log(self._floor))
        features = _centered(features, own, count)
        variance = tf.reduce_sum(features**2, axis=1, keepdims=True) / tf.cast(count, tf.float32)
        return features * tf.math.rsqrt(variance + _TINY)

    def magnitudes(self, features):
        """Returns about the spectra that features which aren't normalised were made of.

        Of all powers whose bands have these sums it takes the ones with the least squares, and 0 for what is negative.

        Args:
            features: float32 `[batch, frames, num_mel_bins]`, made with `normalize=False`.

        Returns:
            float32 `[batch, frames, bins]`, for `griffin_lim`.
        """
        return tf.sqrt(tf.nn.relu(tf.matmul(tf.exp(features), self._to_bins)))

    def compute_output_spec(self, waveforms, lengths):
        """Returns the form of the result."""
        return keras.KerasTensor([waveforms.shape[0], None, self._config["num_mel_bins"]], "float32")

    def get_config(self) -> dict:
        """Returns the arguments."""
        return super().get_config() | self._config


def _centered(features: tf.Tensor, own: tf.Tensor, count: tf.Tensor) -> tf.Tensor:
    """Subtracts the mean over a clip's own frames; the others are 0."""
    total = tf.reduce_sum(tf.where(own, features, 0.0), axis=1, keepdims=True)
    return tf.where(own, features - total / tf.cast(count, tf.float32), 0.0)
