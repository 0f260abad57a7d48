"""Half-precision primitives that are faithful and fast: half operands, float32 accumulation, one rounding.

That is what a GPU's tensor core does. A CPU mostly doesn't: TensorFlow's float16 convolutions are slow there and their
gradients fall back to a generic implementation, sums of bfloat16 are taken in bfloat16, and Keras' batch normalisation
and activations are a dozen operations each. So on a CPU

* float16 operands are widened to float32, the float32 operation runs, and its result is rounded to float16: forward,
  and backward, where the operands are widened again instead of having been kept;
* bfloat16 products run natively where the CPU has instructions for them (oneDNN accumulates them in float32), are
  widened like float16 where it has none; and sums run in float32;
* elementwise functions run as one loop, which XLA makes of them, and keep nothing but their inputs.

With a GPU or TPU (`on_accelerator`) every function here is the native operation, without a cast added.

Source: Micikevicius et al. 2018, https://arxiv.org/abs/1710.03740, section 3.3 (accumulation). What each function is
measured against is in tests/test_kernels.py and RESULTS.md. It knows tensors only: `tfhalf.acceleration` puts it under
Keras' layers.
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterator

import tensorflow as tf

from tfhalf import processor
from tfhalf.precision import HALF_DTYPES, at_least_float32

Operation = Callable[..., tf.Tensor]

# Measured, see RESULTS.md: up to this many pixels a bfloat16 filter gradient is faster as one product for each tap.
_SMALL_MAP = 64


_as_on_accelerator = contextvars.ContextVar("as_on_accelerator", default=False)


@contextlib.contextmanager
def as_on_accelerator() -> Iterator[None]:
    """Lets what is traced in the block be what a GPU or TPU is given, on any machine: to look at its graph."""
    token = _as_on_accelerator.set(True)
    try:
        yield
    finally:
        _as_on_accelerator.reset(token)


def on_accelerator() -> bool:
    """Returns whether a GPU or TPU will compute; half arithmetic is native there."""
    return _as_on_accelerator.get() or _has_accelerator()


@functools.cache
def _has_accelerator() -> bool:
    return bool(tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("TPU"))


def is_widened(dtype: tf.DType, also_bfloat16: bool = False) -> bool:
    """Returns whether this machine computes in float32 for a dtype: float16, and bfloat16 where asked or not native.

    Without instructions for it oneDNN's bfloat16 convolutions are slower than float32's: measured with AVX2, see
    RESULTS.md, "A step of both".
    """
    if on_accelerator():
        return False
    if dtype == tf.bfloat16:
        return also_bfloat16 or not processor.this().multiplies("bfloat16")
    return dtype == tf.float16


def round_once(operation: Operation, also_bfloat16: bool = False) -> Operation:
    """Lets an operation compute in float32 on a CPU, and rounds its result and each of its gradients once.

    The operands are kept in half for the backward pass and widened again there; what the gradient needs of the forward
    pass is computed again, which for convolutions and products is nothing.

    Args:
        operation: differentiable function of float tensors to one tensor.
        also_bfloat16: whether it is done for bfloat16 where the CPU computes with that, too; other tensors than half
            ones are handed on as they are.

    Returns:
        A function of the same tensors, of which the first one's dtype counts.
    """

    def rounded(*tensors):
        dtype = tensors[0].dtype
        if not is_widened(dtype, also_bfloat16):
            return operation(*tensors)

        @tf.custom_gradient
        def compute(*operands):
            def gradient(upstream):
                # The dependency keeps these casts apart from the forward pass': merged, their results would be kept.
                with tf.control_dependencies([upstream]):
                    wide = [at_least_float32(operand) for operand in operands]
                with tf.GradientTape() as tape:
                    tape.watch(wide)
                    result = operation(*wide)
                gradients = tape.gradient(result, wide, at_least_float32(upstream))
                return [tf.cast(each, operand.dtype) for each, operand in zip(gradients, operands, strict=True)]

            return tf.cast(operation(*map(at_least_float32, operands)), dtype), gradient

        return compute(*tensors)

    return rounded


def matmul(a: tf.Tensor, b: tf.Tensor, transpose_b: bool = False) -> tf.Tensor:
    """Returns the product of two matrices, or of batches of them, in their common dtype."""
    return round_once(functools.partial(tf.matmul, transpose_b=transpose_b))(a, b)


def convolution(operation: Operation, x: tf.Tensor, kernel: tf.Tensor, same: bool = False) -> tf.Tensor:
    """Returns a convolution of any kind, rounded once, with the filter gradient in its fastest form.

    Args:
        operation: the convolution, as a function of x and kernel.
        x: `[batch, ..., channels]`.
        kernel: as the operation wants it.
        same: whether it is a plain 2-D convolution with stride and dilation 1 that keeps height and width.
    """
    small = same and x.dtype == tf.bfloat16 and not is_widened(x.dtype) and not on_accelerator()
    if not small or None in x.shape[1:3] or math.prod(x.shape[1:3]) > _SMALL_MAP:
        return round_once(operation)(x, kernel)

    @tf.custom_gradient
    def compute(x, kernel):
        def gradient(upstream):
            with tf.GradientTape() as tape:
                tape.watch(x)
                result = operation(x, kernel)
            return tape.gradient(result, x, upstream), _gradient_by_taps(x, upstream, kernel.shape)

        return operation(x, kernel), gradient

    return compute(x, kernel)


def _gradient_by_taps(x: tf.Tensor, upstream: tf.Tensor, shape: tf.TensorShape) -> tf.Tensor:
    """The filter gradient as a matrix product of shifted pictures with the upstream gradient, for each tap."""
    (rows, columns, channels, filters), (height, width) = shape, x.shape[1:3]
    # TensorFlow's "same": of an odd number of border pixels the larger half comes after.
    around = [[(size - 1) // 2, size // 2] for size in (rows, columns)]
    padded = tf.pad(x, [[0, 0], *around, [0, 0]])
    upstream = tf.reshape(upstream, [-1, filters])
    taps = [
        tf.reshape(padded[:, row : row + height, column : column + width], [-1, channels])
        for row in range(rows)
        for column in range(columns)
    ]
    return tf.reshape(tf.stack([tf.matmul(tap, upstream, transpose_a=True) for tap in taps]), shape)


def add_bias(x: tf.Tensor, bias: tf.Tensor) -> tf.Tensor:
    """Adds a bias, whose gradient is summed in float32.

    TensorFlow sums it in x's dtype: in bfloat16 up to 250 times too small, in float16 it stops at 2048.

    Args:
        x: `[..., channels]`.
        bias: float32 `[channels]`, or any shape that can be broadcast to x's.
    """

    def add(x, bias):
        bias = tf.cast(bias, x.dtype)
        # As an operation of its own, which TensorFlow fuses with the product before it.
        return tf.nn.bias_add(x, bias) if bias.shape.rank == 1 else x + bias

    if x.dtype.name not in HALF_DTYPES or on_accelerator():
        return add(x, bias)

    @tf.custom_gradient
    def compute(x, bias):
        def gradient(upstream):
            if bias.shape.rank == 1:
                return upstream, sum_rows(upstream)
            with tf.GradientTape() as tape:
                tape.watch(bias)
                result = tf.broadcast_to(bias, tf.shape(upstream))
            return upstream, tape.gradient(result, bias, at_least_float32(upstream))

        return add(x, bias), gradient

    return compute(x, bias)


def sum_rows(x: tf.Tensor) -> tf.Tensor:
    """Returns the sum over all axes but the last, in float32; as a product with ones, which is the fastest way."""
    rows = at_least_float32(tf.reshape(x, [-1, x.shape[-1]]))
    return tf.matmul(tf.ones([1, tf.shape(rows)[0]], rows.dtype), rows)[0]


def batch_normalization(x, scale, offset, epsilon: float, mean=None, variance=None):
    """Normalises each channel by TensorFlow's fused operation, with float32 statistics.

    Keras' layer runs as a dozen float32 operations, up to five times slower.

    Args:
        x: `[batch, channels]`, `[batch, steps, channels]`, `[batch, height, width, channels]` or with one axis more.
        scale: float32 `[channels]`.
        offset: float32 `[channels]`.
        epsilon: added to the variance.
        mean: float32 `[channels]`; default: the batch's own.
        variance: as mean.

    Returns:
        (x normalised, in its dtype; the mean; the variance): the statistics that were used, float32.
    """
    own = mean is None
    shape, channels = tf.shape(x), x.shape[-1]
    images = x if x.shape.rank == 4 else tf.reshape(x, [1, 1, -1, channels] if own else [-1, 1, 1, channels])
    widen = at_least_float32 if is_widened(x.dtype) else tf.identity
    given = {"mean": tf.zeros([0]), "variance": tf.zeros([0])} if own else {"mean": mean, "variance": variance}

    @tf.custom_gradient
    def compute(images, scale, offset):
        result = tf.raw_ops.FusedBatchNormV3(
            x=widen(images), scale=scale, offset=offset, epsilon=epsilon, is_training=own, **given
        )

        def gradient(upstream, *_):
            with tf.control_dependencies([upstream]):
                wide = widen(images)
            gradients = tf.raw_ops.FusedBatchNormGradV3(
                y_backprop=widen(upstream),
                x=wide,
                scale=scale,
                reserve_space_1=result.reserve_space_1 if own else mean,
                reserve_space_2=result.reserve_space_2 if own else variance,
                reserve_space_3=result.reserve_space_3,
                epsilon=epsilon,
                is_training=own,
            )
            return tf.cast(gradients.x_backprop, images.dtype), gradients.scale_backprop, gradients.offset_backprop

        return (tf.cast(result.y, images.dtype), result.batch_mean, result.batch_variance), gradient

    y, batch_mean, batch_variance = compute(images, scale, offset)
    y = tf.ensure_shape(tf.reshape(y, shape), x.shape)
    if not own:
        return y, mean, variance
    # The operation divides by n - 1, Keras' layer by n.
    count = tf.cast(tf.size(images) // channels, tf.float32)
    return y, batch_mean, batch_variance * ((count - 1) / count)


def attention(query, key, value, scale: float, mask=None, drop: Operation = tf.identity):
    """Returns scaled dot-product attention (Vaswani et al. 2017, section 3.2.1), with the softmax in float32.

    Args:
        query: `[batch, steps, heads, width]`.
        key: `[batch, other steps, heads, width]`.
        value: as key, of any width.
        scale: factor of the products.
        mask: bool, broadcast to `[batch, heads, steps, other steps]`; where it is False nothing is attended to.
        drop: dropout of the weights.

    Returns:
        (`[batch, steps, heads, width]`, the weights `[batch, heads, steps, other steps]`), in query's dtype.
    """
    if math.frexp(scale)[0] == 0.5:  # a power of two: exact in half, and on the smallest of the tensors
        query, scale = query * tf.constant(scale, query.dtype), 1.0
    query, key, value = (tf.transpose(each, [0, 2, 1, 3]) for each in (query, key, value))
    weights = softmax(matmul(query, key, transpose_b=True), scale, mask)
    return tf.transpose(matmul(drop(weights), value), [0, 2, 1, 3]), weights


def softmax(scores: tf.Tensor, scale: float = 1.0, mask: tf.Tensor | None = None) -> tf.Tensor:
    """Returns the softmax of scale * scores over the last axis, in float32 with one rounding; keeps its result only.

    A row that is masked as a whole gives equal weights, as Keras' attention does.
    """

    def forward(scores):
        wide = at_least_float32(scores)
        wide = wide if scale == 1.0 else wide * scale
        wide = wide if mask is None else tf.where(mask, wide, wide.dtype.min / 2)
        return tf.cast(tf.nn.softmax(wide), scores.dtype)

    if on_accelerator():
        return forward(scores)

    @tf.custom_gradient
    def compute(scores):
        result = forward(scores)

        def gradient(upstream):
            with tf.control_dependencies([upstream]):
                weights = at_least_float32(result)
            wide = at_least_float32(upstream)
            wide = weights * (wide - tf.reduce_sum(weights * wide, -1, keepdims=True))
            wide = wide if mask is None else tf.where(mask, wide, 0.0)
            return tf.cast(wide if scale == 1.0 else wide * scale, scores.dtype)

        return result, gradient

    return compute(scores)


def activate(function: Operation, x: tf.Tensor, bias: tf.Tensor | None = None) -> tf.Tensor:
    """Returns an elementwise function of x + bias, computed in float32 and rounded once.

    Args:
        function: tensor to tensor, elementwise and differentiable; the same object each time, as it is compiled.
        x: `[..., channels]`.
        bias: float32 `[channels]`; default: none.
    """
    if on_accelerator():
        return function(x if bias is None else add_bias(x, bias))
    if None in x.shape[1:]:  # XLA would compile it anew for each length
        return round_once(function, also_bfloat16=True)(x if bias is None else add_bias(x, bias))
    forward, backward = _fused(function)

    @tf.custom_gradient
    def compute(x, bias):
        return forward(x, bias), lambda upstream: backward(x, bias, upstream)

    return compute(x, tf.zeros([1]) if bias is None else bias)


@functools.lru_cache(maxsize=64)
def _fused(function: Operation) -> tuple[Operation, Operation]:
    """An elementwise function of x + bias and its gradient, each one loop."""

    def forward(x, bias):
        return tf.cast(function(at_least_float32(x) + bias), x.dtype)

    def backward(x, bias, upstream):
        total = at_least_float32(x) + bias
        with tf.GradientTape() as tape:
            tape.watch(total)
            result = function(total)
        wide = tape.gradient(result, total, at_least_float32(upstream))
        summed = tf.reduce_sum(wide, range(x.shape.rank - 1)) if bias.shape == x.shape[-1:] else tf.zeros_like(bias)
        return tf.cast(wide, x.dtype), summed

    return tuple(tf.function(each, autograph=False, jit_compile=True) for each in (forward, backward))
