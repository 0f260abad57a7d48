"""An LSTM's loop over time with half operands, float32 accumulation, and float32 state.

Keras' loop multiplies the input and the state by their weights at each step, and in the backward pass adds up the
weights' gradients at each step. Here only what depends on the step before stays in the loop: the state's product and
the gates. The inputs' products, the gates of the backward pass and all weights' gradients are one matrix product each,
over all steps. XLA compiles the two loops.

Source: Hochreiter and Schmidhuber 1997, with the forget gate of Gers et al. 2000, as in `keras.layers.LSTM`; the
division of the work is Appleyard et al. 2016, https://arxiv.org/abs/1604.01946, section 3. It has no GRU and no
recurrent dropout.
"""

import tensorflow as tf

from tfhalf import kernels
from tfhalf.precision import at_least_float32

# Who fills sequences up to multiples of this has few lengths.
_MULTIPLE = 8


def lstm(x, state, carry, kernel, recurrent_kernel, bias, mask=None):
    """Runs an LSTM with the activations tanh and sigmoid.

    Args:
        x: `[batch, steps, channels]`; the dtype of the products' operands.
        state: `[batch, units]`, first output.
        carry: `[batch, units]`, first cell state.
        kernel: `[channels, 4 * units]`, in x's dtype; gates in the order input, forget, cell, output.
        recurrent_kernel: `[units, 4 * units]`, in x's dtype.
        bias: float32 `[4 * units]`.
        mask: bool `[batch, steps]`; where it is False state and carry stay as they are.

    Returns:
        (outputs `[batch, steps, units]` in x's dtype, last state, last carry).
    """
    batch, steps, channels = tf.unstack(tf.shape(x))
    times = tf.reshape(tf.transpose(x, [1, 0, 2]), [-1, channels])
    inputs = tf.reshape(kernels.matmul(times, kernel), [steps, batch, kernel.shape[1]])
    inputs.set_shape([x.shape[1], x.shape[0], kernel.shape[1]])
    taken = tf.ones([steps, batch, 1], tf.bool) if mask is None else tf.transpose(mask)[:, :, None]
    outputs, carries = _scan(inputs, state, carry, recurrent_kernel, bias, taken)
    return tf.transpose(outputs, [1, 0, 2]), outputs[-1], carries[-1]


def _scan(inputs, state, carry, recurrent_kernel, bias, taken):
    """Returns all outputs `[steps, batch, units]` and all carries, float32."""

    @tf.custom_gradient
    def compute(inputs, state, carry, recurrent_kernel, bias):
        outputs, carries = _compiled(_forward, inputs)(inputs, state, carry, recurrent_kernel, bias, taken)

        def gradient(d_outputs, d_carries):
            before = tf.concat([state[None], outputs[:-1]], 0)
            carries_before = tf.concat([at_least_float32(carry)[None], carries[:-1]], 0)
            # All steps at once: the loop's own products again, in the same dtype.
            recurrent = kernels.matmul(_flat(before), recurrent_kernel)
            gates = at_least_float32(inputs) + tf.reshape(at_least_float32(recurrent), tf.shape(inputs)) + bias
            d_gates, d_state, d_carry = _compiled(_backward, inputs)(
                gates, carries_before, carries, recurrent_kernel, taken, d_outputs, d_carries
            )
            d_inputs = tf.cast(d_gates, inputs.dtype)
            d_kernel = kernels.matmul(tf.transpose(_flat(before)), _flat(d_inputs))
            d_bias = kernels.sum_rows(d_gates)
            return d_inputs, tf.cast(d_state, state.dtype), tf.cast(d_carry, carry.dtype), d_kernel, d_bias

        return (outputs, carries), gradient

    return compute(inputs, state, carry, recurrent_kernel, bias)


def _flat(x: tf.Tensor) -> tf.Tensor:
    return tf.reshape(x, [-1, x.shape[-1]])


def _compiled(loop, inputs: tf.Tensor):
    """A loop as XLA's where the number of steps is known, or a multiple of 8: it is compiled anew for each number.

    Not in eager mode: there a tape around us also records what is in the function, and can't differentiate its lists.
    """
    if tf.executing_eagerly():
        return loop
    by_xla = {_forward: _forward_by_xla, _backward: _backward_by_xla}[loop]
    if inputs.shape[0] is not None:
        return by_xla
    few = tf.shape(inputs)[0] % _MULTIPLE == 0
    return lambda *operands: tf.cond(few, lambda: by_xla(*operands), lambda: loop(*operands))


def _forward(inputs, state, carry, recurrent_kernel, bias, taken):
    steps, weights = tf.shape(inputs)[0], at_least_float32(recurrent_kernel)
    stored, wide = inputs.dtype, weights.dtype
    shape = [inputs.shape[1], recurrent_kernel.shape[0]]

    def step(index, state, carry, outputs, carries):
        gates = at_least_float32(inputs[index]) + tf.matmul(at_least_float32(state), weights) + bias
        enter, keep, new, leave = tf.split(gates, 4, -1)
        next_carry = tf.sigmoid(keep) * carry + tf.sigmoid(enter) * tf.tanh(new)
        next_state = tf.cast(tf.sigmoid(leave) * tf.tanh(next_carry), stored)
        carry = tf.where(taken[index], next_carry, carry)
        state = tf.where(taken[index], next_state, state)
        return index + 1, state, carry, outputs.write(index, state), carries.write(index, carry)

    arrays = tf.TensorArray(stored, steps, element_shape=shape), tf.TensorArray(wide, steps, element_shape=shape)
    *_, outputs, carries = tf.while_loop(
        lambda index, *_: index < steps,
        step,
        (0, tf.ensure_shape(state, shape), tf.ensure_shape(at_least_float32(carry), shape), *arrays),
    )
    return outputs.stack(), carries.stack()


def _backward(gates, carries_before, carries, recurrent_kernel, taken, d_outputs, d_carries):
    steps, weights = tf.shape(gates)[0], at_least_float32(recurrent_kernel)
    enter, keep, new, leave = tf.split(gates, 4, -1)
    enter, keep, new, leave = tf.sigmoid(enter), tf.sigmoid(keep), tf.tanh(new), tf.sigmoid(leave)
    tanh = tf.tanh(carries)

    def step(index, d_state, d_carry, d_gates):
        d_state += at_least_float32(d_outputs[index])
        d_carry += d_carries[index]
        here = d_carry + d_state * leave[index] * (1 - tanh[index] ** 2)
        d_step = tf.concat(
            [
                here * new[index] * enter[index] * (1 - enter[index]),
                here * carries_before[index] * keep[index] * (1 - keep[index]),
                here * enter[index] * (1 - new[index] ** 2),
                d_state * tanh[index] * leave[index] * (1 - leave[index]),
            ],
            -1,
        )
        d_step = tf.where(taken[index], d_step, 0.0)
        # An operand of the products is half.
        operand = at_least_float32(tf.cast(d_step, recurrent_kernel.dtype))
        d_before = tf.matmul(operand, weights, transpose_b=True)
        d_state = tf.where(taken[index], d_before, d_state)
        d_carry = tf.where(taken[index], here * keep[index], d_carry)
        return index - 1, d_state, d_carry, d_gates.write(index, d_step)

    shape = [gates.shape[1], gates.shape[2]]
    zeros = tf.zeros_like(carries[0])
    *_, d_state, d_carry, d_gates = tf.while_loop(
        lambda index, *_: index >= 0,
        step,
        (steps - 1, zeros, zeros, tf.TensorArray(gates.dtype, steps, element_shape=shape)),
    )
    return d_gates.stack(), d_state, d_carry


_forward_by_xla = tf.function(_forward, autograph=False, jit_compile=True)
_backward_by_xla = tf.function(_backward, autograph=False, jit_compile=True)
