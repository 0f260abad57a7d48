"""What makes each epoch's sounds others: clips played faster and slower, and spectra with bars left out.

Speed: a clip is resampled as if it were played at another speed, so that pitch, formants and tempo change together.
Which clip at which speed is a pure function of seed and epoch. SpecAugment: some bands, and some frames, are set to
0, the mean; it has no warping of time.

Half precision: samples and spectra are float32 whatever the policy, counts are integers.

Sources: Ko et al. 2015, "Audio augmentation for speech recognition", Interspeech; Park et al. 2019, arXiv:1904.08779.
"""

from collections.abc import Callable, Sequence

import keras
import numpy as np
import soxr
import tensorflow as tf

from apps import sets
from apps.audio import clips

# Seconds: batches have a multiple of 32 frames 10 ms apart; a clip has a frame more than it has strides.
_MULTIPLE, _STRIDE = 0.32, 0.01


def at_random_speeds(order: Callable[[int], np.ndarray], seed: int, num_speeds: int) -> Callable[[int], np.ndarray]:
    """Returns a training order of versions: version `num_speeds * example + speed` is the example at that speed.

    Args:
        order: epoch to int `[batches, batch_size]`, as of `apps.batches.training_order`.
        seed: of the run.
        num_speeds: each is as likely.
    """

    def versions(epoch: int) -> np.ndarray:
        rows = order(epoch)
        random = np.random.default_rng([sets.epoch_seed(seed, epoch), num_speeds])
        return rows * num_speeds + random.integers(num_speeds, size=rows.shape)

    return versions


def reader(
    sounds: Sequence[np.ndarray], sampling_rate: int, speeds: Sequence[float] = (1.0,)
) -> Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor]]:
    """Returns a function from versions to waveforms.

    Args:
        sounds: int16 `[samples]` each.
        sampling_rate: samples a second.
        speeds: 2.0 is twice as fast and an octave higher; a clip at speed 1 stays bit by bit as it is.

    Returns:
        From int `[batch]` (as of `at_random_speeds`) to waveforms, float32 `[batch, samples]` from about -1 to 1,
        and their lengths, int32 `[batch]`. Behind each clip is silence, up to a whole number of
        0.32 seconds less 10 ms: so there are few lengths, and a multiple of 32 frames.
    """
    multiple, stride = round(_MULTIPLE * sampling_rate), round(_STRIDE * sampling_rate)

    def read(versions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        played = [_play(sounds[version // len(speeds)], speeds[version % len(speeds)]) for version in versions]
        lengths = np.array([len(clip) for clip in played], np.int32)
        samples = -(-(lengths.max() + stride) // multiple) * multiple - stride
        padded = np.zeros([len(played), samples], np.float32)
        for row, clip in zip(padded, played, strict=True):
            row[: len(clip)] = clip
        return padded, lengths

    def make(versions: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        waveforms, lengths = tf.numpy_function(read, [versions], [tf.float32, tf.int32], stateful=False)
        return tf.ensure_shape(waveforms, [versions.shape[0], None]), tf.ensure_shape(lengths, versions.shape)

    return make


def _play(clip: np.ndarray, speed: float) -> np.ndarray:
    waveform = clips.to_waveform(clip)
    return waveform if speed == 1 else soxr.resample(waveform, speed, 1.0)


class SpecAugment(keras.layers.Layer):
    """Sets some bands and some frames of each spectrum to 0 in training; it has no weights.

    A clip's masks of time are drawn within its own frames, and none is wider than a share of them.

    Args:
        bands: the widest mask of frequency, 0 or more.
        frames: the widest mask of time, 0 or more.
        share: of a clip's frames that a mask of time may have at most, 0 to 1.
        masks: of each kind.
        seed: of what is drawn.

    Source: Park et al. 2019, arXiv:1904.08779.
    """

    def __init__(
        self,
        bands: int = 27,
        frames: int = 100,
        share: float = 0.2,
        masks: int = 2,
        seed: int | None = None,
        **settings,
    ):
        super().__init__(**{"dtype": "float32", "autocast": False} | settings)
        self.seed_generator = keras.random.SeedGenerator(seed)
        self._config = {"bands": bands, "frames": frames, "share": share, "masks": masks, "seed": seed}
        self.bands, self.frames, self.share, self.masks = bands, frames, share, masks

    def call(self, features, counts, training=False):
        """Masks.

        Args:
            features: float32 `[batch, frames, bands]`.
            counts: frames of each clip, int32 `[batch]`.
            training: whether anything is done.

        Returns:
            float32, in the shape of `features`.
        """
        if not training:
            return features
        batch, frames, bands = tf.unstack(tf.shape(features))
        widest = tf.minimum(float(self.frames), self.share * tf.cast(counts, tf.float32))
        in_time = self._drawn(batch, tf.cast(counts, tf.float32), widest, frames)
        in_frequency = self._drawn(batch, tf.cast(bands, tf.float32), float(self.bands), bands)
        return tf.where(in_time[:, :, tf.newaxis] | in_frequency[:, tf.newaxis], 0.0, features)

    def _drawn(self, batch, size, widest, places) -> tf.Tensor:
        """Where masks are, bool `[batch, places]`: widths from 0 to `widest`, inside of `size` places."""
        shape = (batch, self.masks)
        widths, starts = (keras.random.uniform(shape, dtype="float32", seed=self.seed_generator) for _ in range(2))
        size, widest = (tf.reshape(tf.cast(value, tf.float32), [-1, 1]) for value in (size, widest))
        widths = tf.floor(widths * (tf.floor(widest) + 1))
        starts = tf.floor(starts * (size - widths + 1))[..., tf.newaxis]
        place = tf.range(tf.cast(places, tf.float32))
        return tf.reduce_any((place >= starts) & (place < starts + widths[..., tf.newaxis]), axis=1)

    def compute_output_shape(self, features_shape, counts_shape=None):
        """Returns the shape of the features."""
        return features_shape

    def get_config(self) -> dict:
        """Returns the arguments."""
        return super().get_config() | self._config
