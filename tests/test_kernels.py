"""The kernels against float64, and against Keras and TensorFlow where these are right.

Errors are counted in unit roundoffs of the half dtype (float16 2^-11, bfloat16 2^-8) of the largest value: rounding a
right result once costs at most one.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from tfhalf import accelerate, kernels, precision, processor

ROUNDOFF = {"float16": 2.0**-11, "bfloat16": 2.0**-8}
HALVES = pytest.mark.parametrize("half", sorted(ROUNDOFF))
layers = keras.layers

# Layer, input shape, and roundings that the layer takes one after another.
CASES = {
    "convolution": (lambda: layers.Conv2D(24, 3, padding="same", use_bias=False), (6, 20, 20, 16), 1),
    "convolution with bias": (lambda: layers.Conv2D(24, 3, padding="same"), (6, 20, 20, 16), 2),
    "convolution of a small map": (lambda: layers.Conv2D(24, 3, padding="same", use_bias=False), (6, 8, 8, 16), 1),
    "convolution by an odd kernel": (lambda: layers.Conv2D(9, (2, 5), padding="same", use_bias=False), (6, 7, 6, 8), 1),
    "strided": (lambda: layers.Conv2D(24, 3, 2, padding="same", activation="relu"), (6, 20, 20, 16), 2),
    "dilated": (lambda: layers.Conv2D(24, 3, dilation_rate=2, use_bias=False), (6, 20, 20, 16), 1),
    "grouped": (lambda: layers.Conv2D(24, 3, groups=4, use_bias=False), (6, 12, 12, 16), 1),
    "1-D": (lambda: layers.Conv1D(24, 3, 2, use_bias=False), (6, 60, 16), 1),
    "causal with gelu": (lambda: layers.Conv1D(24, 3, padding="causal", activation="gelu"), (6, 60, 16), 2),
    "3-D": (lambda: layers.Conv3D(8, 3, use_bias=False), (2, 8, 8, 8, 4), 1),
    "transposed": (lambda: layers.Conv2DTranspose(24, 3, 2, padding="same", use_bias=False), (6, 10, 10, 16), 1),
    "depthwise": (lambda: layers.DepthwiseConv2D(3, padding="same", use_bias=False), (6, 40, 40, 16), 1),
    "depthwise strided": (lambda: layers.DepthwiseConv2D(3, 2, padding="same", depth_multiplier=2), (6, 20, 20, 8), 2),
    "depthwise 1-D": (lambda: layers.DepthwiseConv1D(3, padding="same"), (6, 60, 16), 2),
    "separable": (lambda: layers.SeparableConv2D(24, 3, padding="same", use_bias=False), (6, 20, 20, 16), 2),
    "dense": (lambda: layers.Dense(48, use_bias=False), (128, 64), 1),
    "dense with bias": (lambda: layers.Dense(48), (512, 64), 2),
    "dense with gelu": (lambda: layers.Dense(48, "gelu"), (6, 10, 64), 2),
    "einsum": (lambda: layers.EinsumDense("abc,cde->abde", (10, 4, 8), bias_axes="de"), (6, 10, 64), 2),
    "einsum of other order": (lambda: layers.EinsumDense("abc,dce->adbe", (4, 10, 8), bias_axes="de"), (6, 10, 64), 2),
    "normalisation of pictures": (lambda: layers.BatchNormalization(), (6, 20, 20, 16), 1),
    "normalisation of sequences": (lambda: layers.BatchNormalization(), (6, 50, 16), 1),
    "normalisation of vectors": (lambda: layers.BatchNormalization(scale=False), (128, 16), 1),
    "largest": (lambda: layers.MaxPooling2D(2), (6, 20, 20, 16), 1),
    "average": (lambda: layers.AveragePooling2D(3, 2, "same"), (6, 20, 20, 16), 1),
    "bilinear": (lambda: layers.UpSampling2D(2, interpolation="bilinear"), (6, 10, 10, 16), 1),
    "leaky": (lambda: layers.LeakyReLU(0.3), (6, 20, 20, 16), 1),
    "elu": (lambda: layers.ELU(), (6, 20, 20, 16), 1),
    "silu": (lambda: layers.Activation("silu"), (6, 20, 20, 16), 1),
    "gelu": (lambda: layers.Activation("gelu"), (6, 20, 20, 16), 1),
    "attention": (lambda: Attention(), (4, 20, 64), 4),
    "LSTM": (lambda: layers.LSTM(16, return_sequences=True), (4, 20, 24), 2),
    "LSTM both ways": (lambda: layers.Bidirectional(layers.LSTM(16)), (4, 20, 24), 2),
}


class Attention(keras.Layer):
    """Self-attention without the key's bias, whose gradient is 0 but for rounding."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inner = layers.MultiHeadAttention(4, 16, use_bias=False)

    def call(self, inputs):
        return self.inner(inputs, inputs)


def make_model(make, shape, policy):
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy(policy)
    try:
        inputs = keras.Input(shape[1:], batch_size=shape[0])
        return keras.Model(inputs, make()(inputs))
    finally:
        keras.config.set_dtype_policy("float32")


def outputs_and_gradients(model, weights, x, upstream):
    """The output, and the gradients of its product with `upstream` by x and by each weight, as float64."""
    model.set_weights(weights)
    variables = [variable.value for variable in model.trainable_variables]

    @tf.function
    def run(x, upstream):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = model(x, training=True)
            loss = tf.reduce_sum(tf.cast(y, upstream.dtype) * upstream)
        return [y, *tape.gradient(loss, [x, *variables])]

    dtype = model.compute_dtype if model.compute_dtype == "float64" else "float32"
    results = run(tf.constant(x, dtype), tf.constant(upstream, dtype))
    return [np.array(tf.cast(result, tf.float64)) for result in results]


def rounded(array, half):
    return np.array(tf.cast(tf.cast(array, half), tf.float64))


def errors(values, expected, half):
    return [np.abs(a - b).max() / np.abs(b).max() / ROUNDOFF[half] for a, b in zip(values, expected, strict=True)]


@HALVES
@pytest.mark.parametrize("case", CASES)
def test_error_against_float64_is_that_of_rounding(case, half):
    """Outputs and all gradients are at most one rounding worse than stock Keras in float32, rounded at the end."""
    make, shape, roundings = CASES[case]
    random = np.random.default_rng(1)
    model = accelerate(make_model(make, shape, f"mixed_{half}"))
    # Operands that half can hold, not centred, so that sums are large.
    weights = [rounded(weight + 0.1 * np.abs(random.normal(size=weight.shape)), half) for weight in model.get_weights()]
    x = rounded(random.normal(size=shape), half)
    upstream = rounded(0.25 + random.normal(size=[shape[0], *model.output_shape[1:]]), half)

    ours = outputs_and_gradients(model, weights, x, upstream)
    exact = outputs_and_gradients(make_model(make, shape, "float64"), weights, x, upstream)
    stock = outputs_and_gradients(make_model(make, shape, "float32"), weights, x, upstream)
    best = errors([rounded(result, half) for result in stock], exact, half)
    for here, there in zip(errors(ours, exact, half), best, strict=True):
        assert here <= there + max(1, roundings - 1) * 1.0, (case, errors(ours, exact, half), best)


@pytest.mark.parametrize("case", ["convolution", "strided", "dilated", "transposed", "depthwise", "dense", "largest"])
def test_float16_is_float32_rounded_once_bit_for_bit(case):
    make, shape, _ = CASES[case]
    if case == "strided":  # without what would round again

        def make():
            return layers.Conv2D(24, 3, 2, padding="same", use_bias=False)

    random = np.random.default_rng(2)
    model = accelerate(make_model(make, shape, "mixed_float16"))
    weights = [rounded(weight, "float16") for weight in model.get_weights()]
    x = rounded(random.normal(size=shape), "float16")
    upstream = rounded(random.normal(size=[shape[0], *model.output_shape[1:]]), "float16")
    ours = outputs_and_gradients(model, weights, x, upstream)
    stock = outputs_and_gradients(make_model(make, shape, "float32"), weights, x, upstream)
    for here, there in zip(ours, stock, strict=True):
        np.testing.assert_array_equal(here, rounded(there, "float16"))


@HALVES
def test_bias_gradient_is_exact(half):
    """Of 16384 ones: TensorFlow's own stops growing at 256 in bfloat16."""
    upstream = tf.ones([128, 128, 4], half)
    with tf.GradientTape() as tape:
        bias = tf.zeros([4])
        tape.watch(bias)
        y = kernels.add_bias(tf.zeros_like(upstream), bias)
    gradient = tape.gradient(y, bias, upstream)
    assert gradient.dtype == tf.float32
    np.testing.assert_array_equal(gradient, np.full(4, 16384.0))
    if half == "bfloat16":
        stock = tf.raw_ops.BiasAddGrad(out_backprop=upstream)
        assert np.all(np.array(tf.cast(stock, tf.float32)) < 16384), "TensorFlow's own is right now"


def test_bias_of_any_shape_that_broadcasts():
    bias, upstream = tf.zeros([3, 1, 2]), tf.ones([5, 3, 4, 2], tf.bfloat16)
    with tf.GradientTape() as tape:
        tape.watch(bias)
        y = kernels.add_bias(tf.zeros_like(upstream), bias)
    np.testing.assert_array_equal(tape.gradient(y, bias, upstream), np.full([3, 1, 2], 20.0))


@HALVES
def test_sums_do_not_saturate(half):
    """float16 counts to 2048 and no further, bfloat16 to 256."""
    np.testing.assert_array_equal(kernels.sum_rows(tf.ones([60000, 3], half)), np.full(3, 60000.0))
    product = kernels.matmul(tf.ones([1, 4096], half), tf.ones([4096, 1], half))
    assert float(product[0, 0]) == 4096


def test_depthwise_filter_gradient_does_not_saturate():
    x = np.ones([8, 64, 64, 2], "float32")  # 32768 terms for the tap in the middle
    model = make_model(lambda: layers.DepthwiseConv2D(3, padding="same", use_bias=False), x.shape, "mixed_float16")
    _, _, stock = outputs_and_gradients(model, model.get_weights(), x, x)
    _, _, ours = outputs_and_gradients(accelerate(model), model.get_weights(), x, x)
    assert ours[1, 1, 0, 0] == 32768
    assert stock[1, 1, 0, 0] < 32768, "TensorFlow's own is right now"


@given(
    height=st.integers(1, 8), width=st.integers(1, 8), rows=st.integers(1, 4), columns=st.integers(1, 4),
    channels=st.integers(1, 3), filters=st.integers(1, 3),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_filter_gradient_by_taps_for_every_size(height, width, rows, columns, channels, filters):
    random = np.random.default_rng(3)
    x = tf.constant(random.integers(-4, 5, [2, height, width, channels]), tf.bfloat16)
    kernel = tf.constant(random.integers(-4, 5, [rows, columns, channels, filters]), tf.bfloat16)
    upstream = tf.constant(random.integers(-4, 5, [2, height, width, filters]), tf.bfloat16)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch([x, kernel])
        ours = kernels.convolution(lambda x, kernel: tf.nn.conv2d(x, kernel, 1, "SAME"), x, kernel, same=True)
        wide = [tf.cast(each, tf.float32) for each in (x, kernel)]
        exact = tf.nn.conv2d(*wide, 1, "SAME")
    for operand, other in zip([x, kernel], wide, strict=True):
        expected = tape.gradient(exact, other, tf.cast(upstream, tf.float32))
        np.testing.assert_array_equal(
            tf.cast(tape.gradient(ours, operand, upstream), tf.float32),
            tf.cast(tf.cast(expected, tf.bfloat16), tf.float32),
        )


@HALVES
@pytest.mark.parametrize("frozen", [False, True])
def test_batch_statistics_of_shifted_data(half, frozen):
    """Channels far from 0 with little variance: what half statistics can't see."""
    random = np.random.default_rng(4)
    x = rounded(64 + random.normal(size=[16, 8, 8, 3]), half)
    upstream = rounded(random.normal(size=x.shape), half)
    scale, offset = np.array([1.0, 2.0, 0.5]), np.array([0.0, -1.0, 3.0])
    given_ = (np.array([63.0, 64.0, 65.0]), np.array([1.5, 1.0, 0.5])) if frozen else ()
    mean, variance = given_ or (x.mean((0, 1, 2)), x.var((0, 1, 2)))
    tensors = [tf.cast(x, half), *(tf.cast(each, tf.float32) for each in (scale, offset))]
    with tf.GradientTape() as tape:
        tape.watch(tensors)
        statistics = [tf.cast(each, tf.float32) for each in given_]
        y, m, v = kernels.batch_normalization(*tensors, 1e-3, *statistics)
    d_x, d_scale, d_offset = tape.gradient(y, tensors, tf.cast(upstream, half))
    inverse = 1 / np.sqrt(variance + 1e-3)
    normal = (x - mean) * inverse
    np.testing.assert_allclose(m, mean, rtol=1e-6)
    np.testing.assert_allclose(v, variance, rtol=1e-4)
    assert errors([rounded(y, half)], [normal * scale + offset], half)[0] < 1.1
    np.testing.assert_allclose(d_offset, upstream.sum((0, 1, 2)), rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(d_scale, (upstream * normal).sum((0, 1, 2)), rtol=1e-3, atol=1e-2)
    centred = 0 if frozen else (upstream.mean((0, 1, 2)) + normal * (upstream * normal).mean((0, 1, 2)))
    assert errors([rounded(d_x, half)], [scale * inverse * (upstream - centred)], half)[0] < 1.5


@HALVES
def test_softmax_of_a_masked_row_and_its_gradient(half):
    scores = tf.cast([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], half)
    mask = tf.constant([[True, True, False], [False, False, False]])
    with tf.GradientTape() as tape:
        tape.watch(scores)
        weights = kernels.softmax(scores, 0.5, mask)
    gradient = np.array(tf.cast(tape.gradient(weights, scores, tf.cast([[1.0, 0, 0], [1.0, 0, 0]], half)), tf.float32))
    share = 1 / (1 + np.exp(0.5))
    expected = [[share, 1 - share, 0], [1 / 3] * 3]
    np.testing.assert_allclose(tf.cast(weights, tf.float32), expected, atol=ROUNDOFF[half])
    slope = 0.5 * share * (1 - share)
    np.testing.assert_allclose(gradient, [[slope, -slope, 0], [0, 0, 0]], atol=ROUNDOFF[half])


def test_operands_are_kept_in_half_for_the_backward_pass():
    """A wide copy that lived from the forward to the backward pass would triple the memory of activations."""
    x = tf.constant(np.random.default_rng(5).normal(size=[4, 8, 8, 3]), tf.float16)

    @tf.function
    def step(x, kernel):
        with tf.GradientTape() as tape:
            tape.watch([x, kernel])
            y = kernels.convolution(lambda x, kernel: tf.nn.conv2d(x, kernel, 1, "SAME"), x, kernel)
        return tape.gradient(y, [x, kernel], y)

    graph = step.get_concrete_function(x, tf.ones([3, 3, 3, 5], tf.float16)).graph
    forward, backward = (
        next(operation for operation in graph.get_operations() if operation.type == kind).inputs[0].op
        for kind in ("Conv2D", "Conv2DBackpropFilter")
    )
    assert (forward.type, backward.type) == ("Cast", "Cast")
    assert forward is not backward
    assert backward.control_inputs, "TensorFlow would merge it with the forward pass' cast"


@HALVES
def test_accelerator_gets_the_native_operations(half):
    """The graph that a GPU is given has Keras' operations, and not a cast more."""
    blocks = {
        "convolution": (lambda: layers.Conv2D(4, 3), (2, 8, 8, 3)),
        "dense": (lambda: layers.Dense(4, "gelu"), (2, 3)),
        "depthwise": (lambda: layers.DepthwiseConv2D(3, 2), (2, 8, 8, 3)),
        "transposed": (lambda: layers.Conv2DTranspose(3, 2), (2, 8, 8, 3)),
        "pooling": (lambda: layers.MaxPooling2D(2), (2, 8, 8, 3)),
        "leaky": (lambda: layers.LeakyReLU(), (2, 8)),
        "attention": (Attention, (2, 6, 8)),
    }

    def operations(model):
        graph = tf.function(model).get_concrete_function(tf.TensorSpec(model.input_shape)).graph
        return sorted(operation.type for operation in graph.get_operations())

    for name, (make, shape) in blocks.items():
        model = make_model(make, shape, f"mixed_{half}")
        stock = operations(model)
        with kernels.as_on_accelerator():
            ours = operations(accelerate(model))
        assert ours.count("Cast") <= stock.count("Cast"), name
        heavy = {"Conv2D", "MatMul", "BatchMatMulV2", "Einsum", "DepthwiseConv2dNative", "MaxPool", "LeakyRelu"}
        assert {kind for kind in ours if kind in heavy - {"Einsum", "BatchMatMulV2", "MatMul"}} == {
            kind for kind in stock if kind in heavy - {"Einsum", "BatchMatMulV2", "MatMul"}
        }, name
        assert not [kind for kind in ours if "Function" in kind or "PartitionedCall" in kind], name


def test_accelerator_normalises_by_one_fused_operation():
    model = accelerate(make_model(lambda: layers.BatchNormalization(), (2, 8, 8, 3), "mixed_float16"))
    with kernels.as_on_accelerator():
        graph = tf.function(lambda x: model(x, training=True)).get_concrete_function(tf.TensorSpec([2, 8, 8, 3])).graph
    fused = [operation for operation in graph.get_operations() if operation.type == "FusedBatchNormV3"]
    assert [operation.inputs[0].dtype for operation in fused] == [tf.float16]
    assert [operation.inputs[1].dtype for operation in fused] == [tf.float32]


@given(st.sampled_from(["gelu", "silu", "elu", "tanh", "softplus", "mish"]), st.integers(1, 3))
@settings(max_examples=12, deadline=None)
def test_activations_equal_keras_in_float32(name, rank):
    function = getattr(keras.activations, name)
    x = np.random.default_rng(6).normal(size=[2] * rank + [5]).astype("float32") * 3
    bias = np.linspace(-1, 1, 5).astype("float32")
    tensors = [tf.constant(x), tf.constant(bias)]
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(tensors)
        ours = kernels.activate(function, *tensors)
        stock = function(tensors[0] + tensors[1])
    np.testing.assert_allclose(ours, stock, rtol=1e-5, atol=1e-6)
    for here, there in zip(tape.gradient(ours, tensors), tape.gradient(stock, tensors), strict=True):
        np.testing.assert_allclose(here, there, rtol=1e-5, atol=2e-6)


def test_length_that_is_not_known_is_not_compiled():
    specification = tf.TensorSpec([None, None, 4], tf.float16)
    traced = tf.function(lambda x: kernels.activate(keras.activations.gelu, x)).get_concrete_function(specification)
    assert not [operation for operation in traced.graph.get_operations() if "PartitionedCall" in operation.type]
    assert traced(tf.ones([2, 3, 4], tf.float16)).dtype == tf.float16


def test_half_dtypes_are_the_plan_s():
    assert set(ROUNDOFF) == set(precision.HALF_DTYPES)


def test_what_a_cpu_lacks_is_widened():
    native = bool(processor.this().multiplies("bfloat16"))
    assert kernels.is_widened(tf.float16)
    assert not kernels.is_widened(tf.float32)
    assert kernels.is_widened(tf.bfloat16) is not native
    with kernels.as_on_accelerator():
        assert not kernels.is_widened(tf.float16)
        assert not kernels.is_widened(tf.bfloat16)
