"""What image tasks share: pictures of every kind, windows cut out at random, files to try.

A window is a square that is cut out of a picture by one linear map: moved, zoomed, mirrored and turned by quarters in a
single resampling, so that boxes (which stay boxes) and masks (whose classes are never mixed) follow exactly. Everything
here is float32: half rounds grey values and pixel numbers.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from absl import flags

from apps import runner, sets

AUGMENTATIONS = ("none", "flip", "turn")
_ZOOM = 1.5
_BRIGHTNESS, _CONTRAST, _TINT = 0.25, 0.25, 0.1
_CACHE_BYTES = 2**30
_DECODED_TO_STORED = 20  # a JPEG of good quality
_SHUFFLED = 512  # whole pictures: they are held in memory
# Eight ways to put a square down, as matrices of steps (y, x): the first two are as it is and mirrored left to right.
_SQUARE = np.array(
    [[[1, 0], [0, 1]], [[1, 0], [0, -1]], [[-1, 0], [0, 1]], [[-1, 0], [0, -1]],
     [[0, 1], [1, 0]], [[0, 1], [-1, 0]], [[0, -1], [1, 0]], [[0, -1], [-1, 0]]], "float32",
)  # fmt: skip


def define_flags(values: flags.FlagValues, image_size: int, windows: int, multiple: str, changes: str) -> None:
    """Defines the flags of tasks that train on windows.

    Args:
        values: where they are defined.
        image_size: default of the window's side.
        windows: default of windows in an epoch.
        multiple: what the side must be a multiple of, for the help.
        changes: what augmentation changes beside the place, for the help.
    """
    here = {"flag_values": values}
    size_help = f"Height and width of a training window, a multiple of {multiple}, 32 to 1024 pixels."
    flags.DEFINE_integer("image_size", image_size, size_help, 32, 1024, **here)
    windows_help = "Windows cut out of each picture in an epoch, 1 or more."
    flags.DEFINE_integer("windows", windows, windows_help, 1, **here)
    augment_help = (
        "Random changes of training windows. flip: mirrored left to right; turn: turned by quarters and mirrored, for "
        f"pictures from above. Both change {changes} too."
    )
    flags.DEFINE_enum("augment", "turn", AUGMENTATIONS, augment_help, **here)


def read(builder: tfds.core.DatasetBuilder, split: str) -> tuple[tf.data.Dataset, int]:
    """Returns a part's examples in their order, kept in memory where they are few, and their number."""
    dataset, num = builder.as_dataset(split=split, shuffle_files=False), builder.info.splits[split].num_examples
    # Of a part of a split, as train[:90%], TFDS knows the number but no bytes.
    whole = builder.info.splits[split.partition("[")[0]]
    stored = whole.num_bytes * num / max(1, whole.num_examples)
    return dataset.cache() if stored * _DECODED_TO_STORED <= _CACHE_BYTES else dataset, num


def training_windows(
    examples: tf.data.Dataset, num: int, options, make: Callable[[Any, tf.Tensor], Any]
) -> tuple[Callable[[int], tf.data.Dataset], int]:
    """Batches of windows for training: epoch to its batches, a pure function of seed and epoch; and their number.

    Args:
        examples: of the training part, in their order.
        num: how many there are.
        options: the parsed flags.
        make: example and seed `[2]` to one window's (input, targets).

    Raises:
        AppError: there are fewer windows than `--batch_size`.
    """
    total = num * options.windows
    if total < options.batch_size:
        raise runner.AppError(
            f"--batch_size={options.batch_size} is more than the {total} windows of an epoch ({num} pictures, "
            f"--windows={options.windows} each); lower it or raise --windows"
        )

    def batches(epoch: int) -> tf.data.Dataset:
        seed = sets.epoch_seed(options.seed, epoch)
        shuffled = examples.repeat(options.windows).shuffle(_SHUFFLED, seed=seed, reshuffle_each_iteration=False)
        windows = shuffled.enumerate()
        windows = windows.map(lambda index, example: make(example, tf.stack([seed, index])), tf.data.AUTOTUNE)
        return windows.batch(options.batch_size, drop_remainder=True).prefetch(tf.data.AUTOTUNE)

    return batches, total // options.batch_size


def validation_windows(examples: tf.data.Dataset, options, make: Callable[[Any, tf.Tensor], Any]) -> tf.data.Dataset:
    """Batches of windows to compare epochs on: the same ones for every epoch, seed and policy."""
    windows = examples.repeat(options.windows).enumerate()
    windows = windows.map(lambda index, example: make(example, tf.stack([0, index])), tf.data.AUTOTUNE)
    return windows.batch(options.batch_size).prefetch(tf.data.AUTOTUNE)


def to_channels(pictures: tf.Tensor, channels: int) -> tf.Tensor:
    """Pictures of any kind, grey or colour, with or without alpha, in one number of channels.

    What alpha makes transparent is black.

    Args:
        pictures: number `[..., 1 to 4]`, 0 to 255 (uint16: 0 to 65535).
        channels: 1 for grey, 3 for RGB.

    Returns:
        float32 `[..., channels]`, 0 to 255.
    """
    scale = 1 / 257 if pictures.dtype == tf.uint16 else 1.0  # 16 bits to 8
    pictures = tf.cast(pictures, tf.float32) * scale
    num = tf.shape(pictures)[-1]
    has_alpha = tf.equal(num % 2, 0)
    num_colours = num - tf.cast(has_alpha, tf.int32)
    alpha = tf.where(has_alpha, pictures[..., num - 1 :] / 255.0, 1.0)
    pictures = pictures[..., :num_colours] * alpha
    if channels == 1:
        # ITU-R BT.601 luma, as in every grey conversion of pictures; one channel is grey already.
        luma = tf.cond(tf.equal(num_colours, 3), lambda: tf.constant([0.299, 0.587, 0.114]), lambda: tf.constant([1.0]))
        return tf.reduce_sum(pictures * luma, axis=-1, keepdims=True)
    return pictures + tf.zeros([3])


def shrink_and_pad(pictures: tf.Tensor, longest: int, multiple: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Makes pictures fit a fully convolutional network: no larger than it was meant for, sides it can halve.

    Args:
        pictures: float32 `[batch, height, width, channels]`.
        longest: where height or width is more than this, both shrink in proportion.
        multiple: black pixels are added below and to the right up to a multiple of this.

    Returns:
        The pictures, and the height and width that they fill of it, int32 `[2]`.
    """
    shape = tf.shape(pictures)[1:3]
    scale = tf.minimum(1.0, longest / tf.cast(tf.reduce_max(shape), tf.float32))
    filled = tf.maximum(1, tf.cast(tf.round(tf.cast(shape, tf.float32) * scale), tf.int32))
    pictures = tf.cond(
        tf.reduce_all(filled == shape), lambda: pictures, lambda: tf.image.resize(pictures, filled, antialias=True)
    )
    below = -filled % multiple
    return tf.pad(pictures, [[0, 0], [0, below[0]], [0, below[1]], [0, 0]]), filled


class Window(NamedTuple):
    """A square to cut out: where it lies, and how it is put down.

    Attributes:
        centre: float32 `[2]`, (y, x) in the picture, in pixels from its upper left corner.
        matrix: float32 `[2, 2]`, a step (y, x) in the window to the step in the picture.
        size: pixels of a side of the window.
    """

    centre: tf.Tensor
    matrix: tf.Tensor
    size: int


def draw_window(shape: tf.Tensor, size: int, augment: str, seed: tf.Tensor) -> Window:
    """Draws a window of a picture; where the picture is smaller, it lies anywhere in the window.

    Args:
        shape: int32 `[2]`, height and width.
        size: pixels of the window's side.
        augment: one of `AUGMENTATIONS`.
        seed: int `[2]`.
    """
    seeds = tf.random.split(seed, 3)
    ways, zoom = {"none": 1, "flip": 2, "turn": 8}[augment], 1.0 if augment == "none" else _ZOOM
    way = tf.random.stateless_uniform([], seeds[0], 0, ways, tf.int32)
    scale = tf.exp(tf.random.stateless_uniform([], seeds[1], -np.log(zoom), np.log(zoom)))
    matrix = tf.gather(tf.constant(_SQUARE), way) * scale
    half = size / 2 * tf.abs(matrix[0, 0] + matrix[0, 1])
    length = tf.cast(shape, tf.float32)
    low, high = tf.minimum(half, length - half), tf.maximum(half, length - half)
    centre = low + (high - low) * tf.random.stateless_uniform([2], seeds[2])
    if augment == "none":
        centre = tf.round(centre - size / 2) + size / 2  # whole pixels: nothing is resampled
    return Window(centre, matrix, size)


def cut(picture: tf.Tensor, window: Window, interpolation: str, outside: float = 0.0) -> tf.Tensor:
    """Cuts a window out of a picture.

    Args:
        picture: number `[height, width, channels]`.
        window: as `draw_window` gives it.
        interpolation: "bilinear" for pictures, "nearest" for masks.
        outside: the value of what lies outside of the picture.

    Returns:
        `[size, size, channels]` of the picture's dtype.
    """
    # The operation counts pixel centres from 0: the middle of the window is (size - 1) / 2.
    yy, yx, xy, xx = tf.unstack(tf.reshape(window.matrix, [4]))
    middle = (window.size - 1) / 2
    y0 = window.centre[0] - 0.5 - middle * (yy + yx)
    x0 = window.centre[1] - 0.5 - middle * (xy + xx)
    transform = tf.stack([xx, xy, x0, yx, yy, y0, 0.0, 0.0])
    return tf.raw_ops.ImageProjectiveTransformV3(
        images=picture[tf.newaxis],
        transforms=transform[tf.newaxis],
        output_shape=[window.size, window.size],
        interpolation=interpolation.upper(),
        fill_mode="CONSTANT",
        fill_value=outside,
    )[0]


def move_boxes(boxes: tf.Tensor, window: Window) -> tf.Tensor:
    """Boxes of a picture as they lie in the window, not clipped.

    Args:
        boxes: float32 `[n, 4]`: ymin, xmin, ymax, xmax in pixels.
        window: as `draw_window` gives it.

    Returns:
        float32 `[n, 4]`, in pixels of the window.
    """
    corners = tf.reshape(boxes, [-1, 2, 2]) - window.centre
    corners = tf.linalg.matmul(corners, tf.linalg.inv(window.matrix), transpose_b=True) + window.size / 2
    return tf.concat([tf.reduce_min(corners, axis=1), tf.reduce_max(corners, axis=1)], axis=-1)


def change_colours(picture: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Changes brightness, contrast and tint of a float32 picture of 0 to 255 at random."""
    seeds = tf.random.split(seed, 3)
    brightness = 255 * tf.random.stateless_uniform([], seeds[0], -_BRIGHTNESS, _BRIGHTNESS)
    contrast = tf.random.stateless_uniform([], seeds[1], 1 - _CONTRAST, 1 + _CONTRAST)
    tint = tf.random.stateless_uniform(tf.shape(picture)[-1:], seeds[2], 1 - _TINT, 1 + _TINT)
    mean = tf.reduce_mean(picture)
    return tf.clip_by_value(((picture - mean) * contrast + mean + brightness) * tint, 0.0, 255.0)


def write_examples(pictures: list[np.ndarray], folder: Path) -> None:
    """Writes float32 pictures of 0 to 255 as PNG files, to try apps/predict.py on."""
    for number, picture in enumerate(pictures, 1):
        png = tf.io.encode_png(tf.cast(tf.round(picture), tf.uint8))
        (folder / f"picture{number}.png").write_bytes(png.numpy())
