"""Convolutions over time and frequency of clips of different lengths, each of which gets what it would get alone.

Frames behind a clip's end are 0 in front of each convolution, as if there was nothing. Padding is the same on both
sides: TensorFlow's "same" starts at one place or another, as the whole batch's number of frames is even or odd, and a
clip's numbers would depend on the clips beside it.

Normalised is each frame by itself, over its bands and channels (Ba et al. 2016, arXiv:1607.06450), and not each channel
over the batch, as in Deep Speech 2: so neither padding nor other clips count, training and serving compute the same,
several replicas too, and an overflow leaves no statistics behind.
"""

import keras
import tensorflow as tf


class SequenceMask(keras.layers.Layer):
    """Says which frames are a clip's own."""

    def __init__(self, **settings):
        super().__init__(**{"dtype": "float32", "autocast": False} | settings)

    def call(self, x, counts):
        """Returns bool `[batch, frames]` of `[batch, frames, ...]` and int32 `[batch]`."""
        return tf.sequence_mask(counts, tf.shape(x)[1])

    def compute_output_spec(self, x, counts):
        """Returns the form of the result."""
        return keras.KerasTensor(x.shape[:2], "bool")


def convolve(
    x, counts, filters: int, kernel_size: tuple[int, int], strides: tuple[int, int], name: str, normalize: bool = True
):
    """Convolution, normalisation, ReLU.

    Args:
        x: `[batch, frames, bands, channels]`, 0 behind each clip's own frames.
        counts: frames of each clip, int32 `[batch]`.
        filters: channels of the result.
        kernel_size: odd numbers of frames and bands.
        strides: frames and bands.
        name: of the convolution.
        normalize: False leaves it out: each band has a weight of its own there, and what moves from one to another
            isn't the same any more.

    Returns:
        The result in the same form, and its counts: one frame for each `strides[0]` that have begun.
    """
    around = tuple(size // 2 for size in kernel_size)
    x = keras.layers.ZeroPadding2D(around, name=f"{name}_pad")(x)
    x = keras.layers.Conv2D(filters, kernel_size, strides, use_bias=not normalize, name=name)(x)
    if normalize:
        x = keras.layers.LayerNormalization(axis=(2, 3), name=f"{name}_norm")(x)
    x = keras.layers.ReLU(name=f"{name}_relu")(x)
    counts = after(counts, strides[0])
    own = SequenceMask(name=f"{name}_mask")(x, counts)
    return keras.ops.where(own[:, :, None, None], x, 0), counts


def after(counts, stride: int):
    """Returns the frames that are left of `counts` behind a stride; ints, numpy's or tensors of them."""
    return -(-counts // stride)
