"""Puts the kernels under any Keras model, layer by layer, and takes them away again.

`accelerate` gives each layer that it knows another `call` (attention: another `_compute_attention`), on the instance:
the class, other models, the layer's variables and their names, and what is saved of it stay as they are. A layer is
known by the `call` that its class has, so that subclasses which keep Keras' `call` are known too, and those that bring
their own are left alone. The global state of Keras and TensorFlow isn't touched.

What is exported or measured by `tfhalf.coverage` is traced without the kernels (`precision.without_kernels`).
"""

import functools
import inspect
import math
from collections.abc import Callable

import keras
import tensorflow as tf

# Private Keras: a layer reads its variables in its compute dtype, and a float32 bias gradient needs a float32 bias.
from keras.src.backend.common.variables import AutocastScope

from tfhalf import kernels, precision, recurrent

Call = Callable[..., tf.Tensor]

_ELEMENTWISE = (
    keras.activations.celu,
    keras.activations.elu,
    keras.activations.exponential,
    keras.activations.gelu,
    keras.activations.hard_sigmoid,
    keras.activations.hard_silu,
    keras.activations.leaky_relu,
    keras.activations.log_sigmoid,
    keras.activations.mish,
    keras.activations.selu,
    keras.activations.sigmoid,
    keras.activations.silu,
    keras.activations.softplus,
    keras.activations.softsign,
    keras.activations.tanh,
)
# Fast as they are.
_NATIVE = (keras.activations.linear, keras.activations.relu, keras.activations.relu6, keras.activations.softmax)
# cuDNN's smallest.
_MIN_EPSILON = 1.001e-5


def accelerate(model: keras.Model) -> keras.Model:
    """Puts the kernels under a model's layers: faster in every policy on a CPU, and faithful in half.

    Weights, their names and what is saved stay the same, outputs agree within rounding. Layers that are nested in
    others are found: in models, `Bidirectional`, `TimeDistributed`. `left_alone` names the layers that were not known.
    Calling it again does nothing new; a loaded or cloned model must be accelerated again.

    Args:
        model: a built model, compiled or not.

    Returns:
        The same model.

    Raises:
        ValueError: the model isn't built.

    Example:

    >>> model = keras.Sequential([keras.Input([4]), keras.layers.Dense(8, "gelu"), keras.layers.Dense(2)])
    >>> model = accelerate(model)
    >>> left_alone(model)
    {}
    """
    if not model.built:
        raise ValueError(
            f"accelerate: model {model.name!r} isn't built; call it on a batch, or give it an Input, first"
        )
    decelerate(model)
    for layer in _layers(model).values():
        attribute, kernel = _kernel(layer)
        if kernel is not None and attribute not in layer.__dict__:
            kernel = _for_floats(layer, attribute, kernel)
            setattr(kernel, precision.KERNEL_MARK, True)
            # Not by setattr: Keras locks a built layer against new attributes that hold state, and this is none.
            layer.__dict__[attribute] = kernel
    return model


def decelerate(model: keras.Model) -> keras.Model:
    """Takes the kernels away again: every layer computes as Keras wrote it."""
    for layer in _layers(model).values():
        precision.take_kernels(layer)
    # Functions that Keras has traced hold what was there before.
    model.train_function = model.test_function = model.predict_function = None
    return model


def left_alone(model: keras.Model) -> dict[str, str]:
    """Returns the layers that `accelerate` can do nothing for, though they compute: path to reason.

    Of a layer that is made of others, its parts are named.
    """
    reasons = {}
    for path, layer in _layers(model).items():
        attribute, kernel = _kernel(layer)
        kind, present = type(layer).__name__, layer.__dict__.get(attribute)
        if present is not None and not hasattr(present, precision.KERNEL_MARK):
            reasons[path] = f"its {attribute} was replaced by somebody else"
        elif attribute and kernel is None:
            reasons[path] = f"{kind} with these settings has no kernel"
        elif not attribute and not _is_silent(layer):
            reasons[path] = f"{kind} has no kernel"
    return reasons


def accelerate_optimizer(optimizer: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    """Lets Adam and AdamW update each weight in one operation instead of eleven; others stay as they are.

    The numbers are Keras' up to rounding, and so is what is saved. Under a distribution strategy Keras' own runs.

    Args:
        optimizer: a Keras optimizer; before or after it is built.

    Returns:
        The same optimizer.
    """
    if type(optimizer).update_step is not keras.optimizers.Adam.update_step or optimizer.amsgrad:
        return optimizer
    own = functools.partial(type(optimizer).update_step, optimizer)

    def update_step(gradient, variable, learning_rate):
        if tf.distribute.has_strategy():
            return own(gradient, variable, learning_rate)
        # Private Keras: Adam keeps its moments in two lists in the order of the variables.
        index = optimizer._get_variable_index(variable)
        moments = optimizer._momentums[index].value, optimizer._velocities[index].value
        beta_1, beta_2 = (tf.constant(beta, variable.dtype) for beta in (optimizer.beta_1, optimizer.beta_2))
        step = tf.cast(optimizer.iterations.value + 1, variable.dtype)
        powers, rate = (beta_1**step, beta_2**step), tf.cast(learning_rate, variable.dtype)
        if isinstance(gradient, tf.IndexedSlices):
            rate *= tf.sqrt(1 - powers[1]) / (1 - powers[0])
            values = _adam_of_slices(
                variable, *moments, gradient.values, gradient.indices, rate, beta_1, beta_2, optimizer.epsilon
            )
            for target, value in zip((variable, *moments), values, strict=True):
                target.assign(value)
            return
        tf.raw_ops.ResourceApplyAdam(
            var=variable.handle,
            m=moments[0].handle,
            v=moments[1].handle,
            beta1_power=powers[0],
            beta2_power=powers[1],
            lr=rate,
            beta1=beta_1,
            beta2=beta_2,
            epsilon=optimizer.epsilon,
            grad=tf.cast(gradient, variable.dtype),
        )

    optimizer.update_step = update_step
    return optimizer


def _adam_of_slices(variable, momentum, velocity, values, indices, rate, beta_1, beta_2, epsilon):
    """Keras' Adam for an embedding's gradient: of a row that occurs twice it adds up the squares of the parts."""
    values = tf.cast(values, variable.dtype)
    summed, squares = (tf.math.unsorted_segment_sum(each, indices, variable.shape[0]) for each in (values, values**2))
    return _adam(
        *(tf.convert_to_tensor(each) for each in (variable, momentum, velocity)),
        summed, squares, rate, beta_1, beta_2, tf.constant(epsilon, variable.dtype),
    )  # fmt: skip


@functools.partial(tf.function, autograph=False, jit_compile=True)
def _adam(variable, momentum, velocity, gradient, square, rate, beta_1, beta_2, epsilon):
    """Kingma and Ba 2014, https://arxiv.org/abs/1412.6980, section 2, last paragraph; one loop."""
    momentum += (gradient - momentum) * (1 - beta_1)
    velocity += (square - velocity) * (1 - beta_2)
    return variable - rate * momentum / (tf.sqrt(velocity) + epsilon), momentum, velocity


def _layers(model: keras.Layer) -> dict[str, keras.Layer]:
    return {"": model} | precision.layers_by_path(model)


def _kernel(layer: keras.Layer) -> tuple[str, Call | None]:
    """Returns what is replaced on a layer ("": it isn't known), and by what (None: not with its settings)."""
    for kind, (attribute, *used), make in _KERNELS:
        methods = (attribute, *used)
        if isinstance(layer, kind) and all(getattr(type(layer), name) is getattr(kind, name) for name in methods):
            return attribute, make(layer)
    return "", None


def _for_floats(layer: keras.Layer, attribute: str, kernel: Call) -> Call:
    """A kernel that leaves inputs of other kinds to Keras: integers, float64, sparse and ragged tensors."""
    own = functools.partial(getattr(type(layer), attribute), layer)
    name = next(iter(inspect.signature(own).parameters))

    def call(*args, **kwargs):
        first = args[0] if args else kwargs[name]
        floats = isinstance(first, tf.Tensor) and first.dtype.name in (*precision.HALF_DTYPES, "float32")
        return (kernel if floats else own)(*args, **kwargs)

    return call


def _is_silent(layer: keras.Layer) -> bool:
    """Whether nothing is lost with a layer, or others speak for it: those inside it, the loop around a cell."""
    if isinstance(layer, keras.layers.RNN | keras.layers.MultiHeadAttention | keras.layers.GroupQueryAttention):
        return False
    if not layer.autocast:  # it chooses its dtypes by itself
        return True
    return isinstance(layer, _NOTHING_TO_GAIN) or bool(precision.layers_by_path(layer)) or hasattr(layer, "state_size")


def _stored(variable: keras.Variable) -> tf.Tensor:
    """A variable in the dtype that it is stored in."""
    with AutocastScope(None):
        return tf.convert_to_tensor(variable)


def _finished(layer: keras.Layer, y: tf.Tensor, bias=None) -> tf.Tensor:
    """Adds the bias, and applies the activation."""
    function = layer.activation
    if function in _ELEMENTWISE and (bias is None or bias.shape.rank == 1):
        return kernels.activate(function, y, bias)
    if bias is not None:
        y = kernels.add_bias(y, bias)
    return y if function is None else function(y)


def _bias(layer: keras.Layer):
    return _stored(layer.bias) if layer.use_bias else None


def _batch_normalization(layer: keras.layers.BatchNormalization) -> Call | None:
    rank = layer.input_spec.ndim
    if layer.renorm or layer.axis % rank != rank - 1:
        return None
    own = functools.partial(type(layer).call, layer)

    def call(inputs, training=None, mask=None):
        several = layer.synchronized and tf.distribute.get_strategy().num_replicas_in_sync > 1
        if mask is not None or several or (kernels.on_accelerator() and layer.epsilon < _MIN_EPSILON):
            return own(inputs, training=training, mask=mask)
        channels = inputs.shape[-1]
        scale = _stored(layer.gamma) if layer.scale else tf.ones([channels])
        offset = _stored(layer.beta) if layer.center else tf.zeros([channels])
        moving = _stored(layer.moving_mean), _stored(layer.moving_variance)
        if not (training and layer.trainable):
            return kernels.batch_normalization(inputs, scale, offset, layer.epsilon, *moving)[0]
        y, mean, variance = kernels.batch_normalization(inputs, scale, offset, layer.epsilon)
        layer.moving_mean.assign(moving[0] * layer.momentum + mean * (1.0 - layer.momentum))
        layer.moving_variance.assign(moving[1] * layer.momentum + variance * (1.0 - layer.momentum))
        return y

    return call


def _convolution(layer) -> Call | None:
    plain = layer.padding == "same" and layer.rank == 2 and layer.groups == 1
    return _convolved(layer, layer.convolution_op, plain and set(layer.strides) | set(layer.dilation_rate) == {1})


def _causal_convolution(layer: keras.layers.Conv1D) -> Call | None:
    causal = layer.padding == "causal"
    before = layer.dilation_rate[0] * (layer.kernel_size[0] - 1) if causal else 0

    def operation(x, kernel):
        return keras.ops.conv(
            tf.pad(x, [[0, 0], [before, 0], [0, 0]]) if causal else x,
            kernel,
            strides=list(layer.strides),
            padding="valid" if causal else layer.padding,
            dilation_rate=layer.dilation_rate,
            data_format=layer.data_format,
        )

    return _convolved(layer, operation)


def _transposed_convolution(layer) -> Call | None:
    operation = functools.partial(
        keras.ops.conv_transpose,
        strides=list(layer.strides),
        padding=layer.padding,
        output_padding=layer.output_padding,
        dilation_rate=layer.dilation_rate,
        data_format=layer.data_format,
    )
    return _convolved(layer, operation)


def _convolved(layer, operation: Call, same: bool = False) -> Call | None:
    if layer.data_format != "channels_last":
        return None

    def call(inputs):
        kernel = tf.convert_to_tensor(layer.kernel)
        return _finished(layer, kernels.convolution(operation, inputs, kernel, same), _bias(layer))

    return call


def _depthwise(layer, x: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
    operation = functools.partial(
        keras.ops.depthwise_conv,
        strides=layer.strides,
        padding=layer.padding,
        dilation_rate=layer.dilation_rate,
        data_format=layer.data_format,
    )
    # Measured, see RESULTS.md: the input gradient of a strided one takes 11 times as long in bfloat16 as in float32.
    strided = set(layer.strides) != {1}
    return kernels.round_once(operation, also_bfloat16=strided)(x, kernel)


def _depthwise_convolution(layer) -> Call | None:
    if layer.data_format != "channels_last":
        return None

    def call(inputs):
        return _finished(layer, _depthwise(layer, inputs, tf.convert_to_tensor(layer.kernel)), _bias(layer))

    return call


def _separable_convolution(layer) -> Call | None:
    if layer.data_format != "channels_last":
        return None

    def call(inputs):
        y = _depthwise(layer, inputs, tf.convert_to_tensor(layer.depthwise_kernel))
        y = kernels.convolution(keras.ops.conv, y, tf.convert_to_tensor(layer.pointwise_kernel))
        return _finished(layer, y, _bias(layer))

    return call


def _dense(layer: keras.layers.Dense) -> Call:
    def call(inputs, training=None):
        kernel = tf.convert_to_tensor(layer.kernel)
        y = kernels.matmul(tf.reshape(inputs, [-1, kernel.shape[0]]), kernel)
        return _finished(layer, _with_rows_of(inputs, y, 1), _bias(layer))

    return call


def _einsum_dense(layer: keras.layers.EinsumDense) -> Call:
    inputs, rest = layer.equation.replace("...", "").split(",")
    kernel, outputs = rest.split("->")
    summed = "".join(label for label in kernel if label not in outputs)
    plain = inputs.endswith(summed) and kernel.startswith(summed) and outputs == (inputs + kernel).replace(summed, "")
    plain = plain and not layer.equation.split(",")[0].endswith("...") and summed != ""

    def call(inputs, training=None):
        kernel, bias = tf.convert_to_tensor(layer.kernel), None if layer.bias is None else _stored(layer.bias)
        shape = kernel.shape[len(summed) :]
        if not plain or (bias is not None and bias.shape != shape):
            y = kernels.round_once(functools.partial(keras.ops.einsum, layer.equation))(inputs, kernel)
            return _finished(layer, y, bias)
        kernel = tf.reshape(kernel, [-1, math.prod(shape)])
        y = kernels.matmul(tf.reshape(inputs, [-1, kernel.shape[0]]), kernel)
        y = _with_rows_of(inputs, y, len(summed))
        y = _finished(layer, y, None if bias is None else tf.reshape(bias, [-1]))
        return tf.reshape(y, tf.concat([tf.shape(y)[:-1], shape], 0)) if len(shape) > 1 else y

    return call


def _with_rows_of(x: tf.Tensor, y: tf.Tensor, axes: int) -> tf.Tensor:
    """A matrix of results in the shape of x, in place of whose last axes it has one."""
    columns = y.shape[1:]
    y = tf.reshape(y, tf.concat([tf.shape(x)[:-axes], columns], 0))
    return tf.ensure_shape(y, [*x.shape[:-axes], *columns])


def _attention(layer: keras.layers.MultiHeadAttention) -> Call:
    own = functools.partial(type(layer)._compute_attention, layer)

    # Private Keras: the part of the layer between its projections; masks have been merged by then.
    def compute_attention(
        query, key, value, attention_mask=None, training=None, return_attention_scores=False, **causal
    ):
        if query.shape.rank != 4 or layer._flash_attention or len(layer._attention_axes) != 1:
            return own(query, key, value, attention_mask, training, return_attention_scores, **causal)
        mask = attention_mask
        if mask is not None:
            mask = tf.cast(mask if mask.shape.rank == 4 else tf.expand_dims(mask, -3), tf.bool)
        if causal.get("use_causal_mask"):
            steps = tf.range(tf.shape(query)[1])[:, None] >= tf.range(tf.shape(key)[1])
            mask = steps if mask is None else mask & steps
        drop = tf.identity
        if layer._dropout > 0.0:
            drop = functools.partial(layer._dropout_layer, training=training)
        return kernels.attention(query, key, value, layer._inverse_sqrt_key_dim, mask, drop)

    return compute_attention


def _lstm(layer: keras.layers.LSTM) -> Call | None:
    functions = layer.activation, layer.recurrent_activation
    if functions != (keras.activations.tanh, keras.activations.sigmoid) or layer.recurrent_dropout or layer.unroll:
        return None
    if type(layer.cell).call is not keras.layers.LSTMCell.call:
        return None
    own = functools.partial(type(layer).inner_loop, layer)

    def inner_loop(sequences, initial_state, mask, training=False):
        if kernels.on_accelerator():
            return own(sequences, initial_state, mask, training=training)  # cuDNN's
        mask = mask[0] if isinstance(mask, list | tuple) else mask
        mask = None if mask is None else tf.cast(mask, tf.bool)
        cell = layer.cell
        if training and layer.dropout:
            sequences = sequences * cell.get_dropout_mask(sequences[:, 0, :])[:, None]
        if layer.go_backwards:
            sequences, mask = tf.reverse(sequences, [1]), None if mask is None else tf.reverse(mask, [1])
        weights = tf.convert_to_tensor(cell.kernel), tf.convert_to_tensor(cell.recurrent_kernel)
        bias = _stored(cell.bias) if cell.use_bias else tf.zeros([4 * cell.units])
        states = [tf.convert_to_tensor(each) for each in initial_state]  # kept ones are variables
        outputs, state, carry = recurrent.lstm(sequences, *states, *weights, bias, mask)
        if mask is not None:
            # A masked step puts out what the one before it did, which is 0 before the first, whatever the first state.
            seen = mask if layer.zero_output_for_mask else tf.cumsum(tf.cast(mask, tf.int32), 1) > 0
            outputs = tf.where(seen[:, :, None], outputs, 0)
        return outputs[:, -1], outputs, [state, carry]

    return inner_loop


def _rounded(layer: keras.Layer, also_bfloat16: bool = False) -> Call:
    """Keras' own computation, in float32."""
    own = functools.partial(type(layer).call, layer)

    def call(inputs, **mask):
        return kernels.round_once(functools.partial(own, **mask), also_bfloat16)(inputs)

    return call


_rounded_in_half = functools.partial(_rounded, also_bfloat16=True)


def _activation(layer: keras.layers.Activation) -> Call | None:
    if layer.activation in _NATIVE:
        return lambda inputs: layer.activation(inputs)
    if layer.activation not in _ELEMENTWISE:
        return None
    return lambda inputs: kernels.activate(layer.activation, inputs)


def _elu(layer: keras.layers.ELU) -> Call:
    return functools.partial(kernels.activate, _with_setting(keras.activations.elu, "alpha", float(layer.alpha)))


def _leaky_relu(layer: keras.layers.LeakyReLU) -> Call:
    function = _with_setting(keras.activations.leaky_relu, "negative_slope", float(layer.negative_slope))
    return functools.partial(kernels.activate, function)


@functools.lru_cache(maxsize=64)
def _with_setting(function: Call, name: str, value: float) -> Call:
    """A function with a setting; the same object for the same setting, so that it is compiled once."""
    return functools.partial(function, **{name: value})


# Kind of layer; the method that is replaced, and others that a subclass may not have changed; what makes the
# replacement (None: not with these settings).
_KERNELS = [
    (keras.layers.BatchNormalization, ("call", "_moments"), _batch_normalization),
    (keras.layers.Conv1D, ("call",), _causal_convolution),
    (keras.layers.Conv2D, ("call",), _convolution),
    (keras.layers.Conv3D, ("call",), _convolution),
    (keras.layers.Conv1DTranspose, ("call",), _transposed_convolution),
    (keras.layers.Conv2DTranspose, ("call",), _transposed_convolution),
    (keras.layers.Conv3DTranspose, ("call",), _transposed_convolution),
    (keras.layers.DepthwiseConv1D, ("call",), _depthwise_convolution),
    (keras.layers.DepthwiseConv2D, ("call",), _depthwise_convolution),
    (keras.layers.SeparableConv2D, ("call",), _separable_convolution),
    (keras.layers.Dense, ("call",), _dense),
    (keras.layers.EinsumDense, ("call",), _einsum_dense),
    (keras.layers.MultiHeadAttention, ("_compute_attention", "_masked_softmax", "_compute_causal_mask"), _attention),
    (keras.layers.LSTM, ("inner_loop",), _lstm),
    (keras.layers.GlobalAveragePooling1D, ("call",), _rounded_in_half),
    *(
        (kind, ("call",), _rounded)
        for name in ("Average", "Max")
        for dimensions in (1, 2, 3)
        for kind in [getattr(keras.layers, f"{name}Pooling{dimensions}D")]
    ),
    (keras.layers.UpSampling2D, ("call",), _rounded_in_half),
    (keras.layers.Activation, ("call",), _activation),
    (keras.layers.ELU, ("call",), _elu),
    (keras.layers.LeakyReLU, ("call",), _leaky_relu),
]
# They move numbers, hold no arithmetic that half precision slows, or compute in float32 by themselves.
_NOTHING_TO_GAIN = (
    keras.layers.InputLayer,
    keras.layers.Add,
    keras.layers.Average,
    keras.layers.Concatenate,
    keras.layers.Multiply,
    keras.layers.Dropout,
    keras.layers.SpatialDropout1D,
    keras.layers.SpatialDropout2D,
    keras.layers.GaussianNoise,
    keras.layers.Embedding,
    keras.layers.Flatten,
    keras.layers.Reshape,
    keras.layers.Permute,
    keras.layers.RepeatVector,
    keras.layers.ReLU,
    keras.layers.Softmax,
    keras.layers.Rescaling,
    keras.layers.ZeroPadding1D,
    keras.layers.ZeroPadding2D,
    keras.layers.Cropping1D,
    keras.layers.Cropping2D,
    keras.layers.GlobalAveragePooling2D,
    keras.layers.GlobalMaxPooling1D,
    keras.layers.GlobalMaxPooling2D,
    keras.layers.LayerNormalization,
    keras.layers.GroupNormalization,
    keras.layers.RMSNormalization,
    keras.layers.RandomFlip,
    keras.layers.RandomTranslation,
)
