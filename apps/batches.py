"""Batches of examples that are in memory and of any length: texts, sounds.

Rows of a batch are filled up to one length, so those of similar length go together: each epoch draws the examples anew,
sorts pools of them by length, and takes batches out of the pools in a random order. An epoch's batches are a pure
function of seed and epoch, and their number is the same in each.
"""

from collections.abc import Callable

import numpy as np
import tensorflow as tf

from apps import runner, sets

_POOL = 50  # batches whose examples are sorted by length together


def training_order(options, lengths: np.ndarray) -> tuple[Callable[[int], np.ndarray], int]:
    """Returns which examples make which batch, and the number of batches in an epoch.

    Args:
        options: the parsed flags `batch_size` and `seed`.
        lengths: of each example, `[examples]`.

    Returns:
        Epoch (from 0) to int `[batches, batch_size]`, rows of examples; and the number of batches.

    Raises:
        AppError: there are fewer examples than a batch has.
    """
    num, size = len(lengths), options.batch_size
    steps = num // size
    if not steps:
        raise runner.AppError(f"--batch_size={size} is more than the {num} training examples; lower it")

    def order(epoch: int) -> np.ndarray:
        random = np.random.default_rng(sets.epoch_seed(options.seed, epoch))
        drawn = random.permutation(num)[: steps * size]
        pools = np.split(drawn, range(_POOL * size, len(drawn), _POOL * size))
        alike = np.concatenate([pool[np.argsort(lengths[pool], kind="stable")] for pool in pools])
        return random.permutation(alike.reshape([steps, size]))

    return order, steps


def in_batches(order: np.ndarray, make: Callable[[tf.Tensor], tuple], batch_size: int) -> tf.data.Dataset:
    """Returns batches.

    Args:
        order: rows of examples, int `[batches, batch_size]`; or in one dimension, then the last batch may be smaller.
        make: rows, int `[batch_size]`, to a batch, in TensorFlow's operations.
        batch_size: examples in a batch.
    """
    dataset = tf.data.Dataset.from_tensor_slices(order.ravel())
    dataset = dataset.batch(batch_size, drop_remainder=order.ndim == 2)
    return dataset.map(tf.autograph.experimental.do_not_convert(make), tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE)
