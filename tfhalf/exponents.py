"""What numbers look like in half precision: how many are zero, subnormal, near overflow, and a histogram of exponents.

`measure` is in the graph: it makes one row of numbers for a group of tensors. `Statistics` reads a row and says it in
the terms of a dtype: a value counts as zero, subnormal or non-finite as the layer's compute dtype would hold it, also
where it is kept in float32, as weights are.

Number, non-finite values, maximum and norm are exact. Shares and histogram are of at most SAMPLE values of a group: the
same number of each tensor, weighed by the tensor's size, and spread over it by the golden ratio, so that no channel is
preferred.

A half tensor's zeros are those that were flushed and those that are exact, as behind a ReLU: the tensor doesn't tell.
`tfhalf.loss_scale_window` tells them apart with a twin in float32.

Source: Micikevicius et al. 2018, section 3.2 and figure 3, https://arxiv.org/abs/1710.03740
"""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from tfhalf.precision import FORMATS

SAMPLE = 16384
# Magnitudes below it: 2^36 squares of them have a sum that float32 holds.
_SQUARES_FIT = 2.0**45
_GOLDEN = 0.5 * (5**0.5 - 1)
_SPREAD = np.modf(np.arange(SAMPLE) * _GOLDEN)[0]
# Exponents of their own in the histogram; below and above there are a few wide bins.
LOWEST, HIGHEST = -45, 20
_WIDE_BELOW = 3  # exactly zero; subnormal in bfloat16 and float32; the rest
_NUM_BINS = _WIDE_BELOW + (HIGHEST - LOWEST + 1) + 3  # and: the rest; within 2 bits of bfloat16's end; non-finite
WIDTH = 4 + _NUM_BINS


def _as_call(function: Callable) -> Callable:
    """Makes a function a call in a graph, with shapes left open: a step with statistics measures hundreds of tensors,
    and to trace and optimize each took most of the first step's time (RESULTS.md, what the monitor costs).
    """
    in_graph = tf.function(
        function, autograph=False, reduce_retracing=True, experimental_attributes={"_noinline": True}
    )

    @functools.wraps(function)
    def call(*arguments):
        # When eager, TensorFlow would warn of functions that are made again for other dtypes.
        return function(*arguments) if tf.executing_eagerly() else in_graph(*arguments)

    return call


def measure(tensors: list[tf.Tensor]) -> tf.Tensor:
    """Measures a group of float tensors together, in the graph: float32 `[WIDTH]`, for `Statistics`."""
    if not tensors:
        return tf.zeros([WIDTH])
    # A Python number: a tensor would be a constant, and TensorFlow optimizes each call that has one for itself.
    most = SAMPLE // len(tensors)
    exact, samples, shares = zip(*(_measure_one(tf.reshape(tensor, [-1]), most) for tensor in tensors), strict=True)
    return _row(tf.stack(exact), tf.concat(samples, 0), tf.concat(shares, 0))


def merged(rows: np.ndarray) -> np.ndarray:
    """Merges what was measured of several parts, as replicas: float32 `[parts, ..., WIDTH]` to `[..., WIDTH]`."""
    count, total = rows[..., :1], rows[..., :1].sum(0)
    shares = (rows[..., 4:] * count).sum(0) / np.maximum(total, 1)
    norm = np.sqrt((rows[..., 3:4].astype("float64") ** 2).sum(0))
    return np.concatenate([total, rows[..., 1:2].sum(0), rows[..., 2:3].max(0), norm, shares], -1)


def extremes(tensors: list[tf.Tensor]) -> tf.Tensor:
    """Measures a group of float tensors in short, in the graph.

    Returns:
        float32 `[3]`: number of non-finite values; largest and smallest magnitude of the others that aren't 0.
    """
    found = [_extremes_of(tf.reshape(tensor, [-1])) for tensor in tensors]
    bad, largest, smallest = tf.unstack(tf.stack(found), axis=1)
    return tf.stack([tf.reduce_sum(bad), tf.reduce_max(largest), tf.reduce_min(smallest)])


@_as_call
def _extremes_of(values: tf.Tensor) -> tf.Tensor:
    size = tf.abs(tf.cast(values, tf.float32))
    finite = tf.math.is_finite(size)
    largest = tf.reduce_max(tf.where(finite, size, 0.0))
    smallest = tf.reduce_min(tf.where(tf.logical_and(finite, size > 0.0), size, np.inf))
    return tf.stack([_number(tf.logical_not(finite)), tf.maximum(largest, 0.0), smallest])


@_as_call
def _measure_one(values: tf.Tensor, most: int) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Returns what is exact of one tensor, float32 `[4]`, some of its values, and how many each of them stands for."""
    size = tf.size(values)
    spread = tf.cast(tf.constant(_SPREAD[:most]) * tf.cast(size, tf.float64), tf.int32)
    indices = tf.where(size > most, spread, tf.minimum(tf.range(most), tf.maximum(size - 1, 0)))
    sample = tf.cast(tf.gather(values, indices[: tf.minimum(size, most)]), tf.float32)
    # As integers, magnitudes of floats are in the order of the numbers, then come infinity and NaN.
    bits = bits_of(values)
    top = tf.maximum(tf.reduce_max(tf.bitwise.bitwise_and(bits, bits.dtype.max)), 0)  # of nothing it is the lowest
    largest = tf.cast(tf.bitcast(top, values.dtype), tf.float32)
    exact = tf.cond(largest < _SQUARES_FIT, lambda: _of_finite(values, largest), lambda: _of_any(values))
    count, taken = tf.cast(size, tf.float32), tf.cast(tf.size(sample), tf.float32)
    shares = tf.fill([tf.size(sample)], count / tf.maximum(taken, 1.0))
    return tf.concat([[count], exact], 0), sample, shares


@_as_call
def _row(exact: tf.Tensor, sample: tf.Tensor, shares: tf.Tensor) -> tf.Tensor:
    """What `measure` returns, of its tensors' exact numbers, float32 `[tensors, 4]`, and of all that was sampled."""
    count, non_finite, maximum, norms = tf.unstack(exact, axis=1)
    head = [tf.reduce_sum(count), tf.reduce_sum(non_finite), tf.reduce_max(maximum), _norm(norms, tf.reduce_max(norms))]
    return tf.concat([tf.stack(head), _histogram(sample, shares)], 0)


def bits_of(tensor: tf.Tensor) -> tf.Tensor:
    """Returns the bits of floats as integers of the same size."""
    return tf.bitcast(tensor, {2: tf.int16, 4: tf.int32, 8: tf.int64}[tensor.dtype.size])


def _of_finite(values: tf.Tensor, largest: tf.Tensor) -> tf.Tensor:
    """Number of non-finite values, largest magnitude and norm, float32 `[3]`."""
    return tf.stack([0.0, largest, tf.sqrt(2.0 * tf.nn.l2_loss(tf.cast(values, tf.float32)))])


def _of_any(values: tf.Tensor) -> tf.Tensor:
    """The same where values may be anything, with more passes over them."""
    values = tf.cast(values, tf.float32)
    finite = tf.math.is_finite(values)
    kept = tf.where(finite, values, 0.0)
    largest = tf.reduce_max(tf.abs(kept))
    return tf.stack([_number(tf.logical_not(finite)), largest, _norm(kept, largest)])


def _norm(values: tf.Tensor, largest: tf.Tensor) -> tf.Tensor:
    """Of finite values; squares of large ones would overflow."""
    return largest * tf.sqrt(tf.reduce_sum((values / tf.maximum(largest, np.finfo("float32").tiny)) ** 2))


def _number(conditions: tf.Tensor) -> tf.Tensor:
    return tf.cast(tf.math.count_nonzero(conditions), tf.float32)


def _bins_of_exponents() -> np.ndarray:
    """The bin of each exponent field of float32, 0 to 255."""
    exponents = np.arange(256) - 127
    bins = np.clip(exponents, LOWEST - 1, HIGHEST + 1) - LOWEST + _WIDE_BELOW
    bins[0], bins[exponents >= 126], bins[255] = 1, _NUM_BINS - 2, _NUM_BINS - 1
    return bins.astype("int32")


def _histogram(values: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
    """Shares of the bins, float32 `[_NUM_BINS]`."""
    bits = tf.bitwise.bitwise_and(tf.bitcast(values, tf.int32), 0x7FFFFFFF)
    bins = tf.gather(tf.constant(_bins_of_exponents()), tf.bitwise.right_shift(bits, 23))
    bins = tf.where(tf.equal(bits, 0), 0, bins)
    counts = tf.math.unsorted_segment_sum(weights, bins, _NUM_BINS)
    return counts / tf.maximum(tf.reduce_sum(weights), 1.0)


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What `measure` found in a group of tensors, as a dtype would hold it.

    Attributes:
        count: number of values.
        zero: share (0 to 1) that is 0 in the dtype: flushed or exact.
        subnormal: share with fewer bits than the dtype's normal numbers have.
        near_overflow: share within 2 bits of overflow.
        non_finite: share that is NaN or infinite, or would be in the dtype.
        maximum: largest finite magnitude.
        norm: of the finite values.
        exponents: shares of the histogram's bins; those of LOWEST to HIGHEST from `exponent_shares`.
    """

    count: int
    zero: float
    subnormal: float
    near_overflow: float
    non_finite: float
    maximum: float
    norm: float
    exponents: np.ndarray = dataclasses.field(repr=False)

    @classmethod
    def of(cls, row: np.ndarray, dtype: str) -> "Statistics":
        """Reads a row of `measure`.

        Args:
            row: float32 `[WIDTH]`.
            dtype: "float16", "bfloat16" or "float32".
        """
        count, bad, maximum, norm = (float(value) for value in row[:4])
        bins, about = np.asarray(row[4:], "float64"), FORMATS[dtype]
        lows = np.array([-np.inf, -127, -126, *range(LOWEST, HIGHEST + 1), HIGHEST + 1, 126, np.inf])
        beyond = float(bins[(lows >= about.end) & np.isfinite(lows)].sum())
        return cls(
            count=int(count),
            zero=float(bins[lows < about.zero].sum()),
            subnormal=float(bins[(lows >= about.zero) & (lows < about.normal)].sum()),
            near_overflow=float(bins[(lows >= about.end - 2) & (lows < about.end)].sum()),
            non_finite=min(1.0, bad / count + beyond) if count else 0.0,
            maximum=maximum,
            norm=norm,
            exponents=bins,
        )

    @property
    def exponent_shares(self) -> np.ndarray:
        """Shares of the values with the exponents LOWEST to HIGHEST, float64."""
        return self.exponents[_WIDE_BELOW : _WIDE_BELOW + HIGHEST - LOWEST + 1]

    def to_json(self) -> dict[str, float]:
        """Returns the numbers without the histogram."""
        names = (field.name for field in dataclasses.fields(self))
        return {name: getattr(self, name) for name in names if name != "exponents"}
