"""The LSTM against Keras' loop in float32 and float64."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfhalf import accelerate, kernels, recurrent


def build(policy="float32", steps=7, **settings):
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy(policy)
    try:
        inputs = keras.Input([steps, 5])
        return keras.Model(inputs, keras.layers.LSTM(6, **settings)(inputs))
    finally:
        keras.config.set_dtype_policy("float32")


def results(model, x, training=True):
    """Outputs, and the gradients of the sum of their squares."""
    variables = [variable.value for variable in model.trainable_variables]

    @tf.function
    def run(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            outputs = tf.nest.flatten(model(x, training=training))
            loss = tf.add_n([tf.reduce_sum(tf.cast(output, tf.float32) ** 2) for output in outputs])
        return [*outputs, *tape.gradient(loss, [x, *variables])]

    return [np.array(tf.cast(value, tf.float32)) for value in run(tf.constant(x))]


X = np.random.default_rng(0).normal(size=[3, 7, 5]).astype("float32")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"return_sequences": True},
        {"return_state": True},
        {"return_sequences": True, "go_backwards": True},
        {"use_bias": False},
        {"return_sequences": True, "return_state": True, "go_backwards": True},
    ],
)
@pytest.mark.parametrize("steps", [7, None])
def test_outputs_and_gradients_are_keras(settings, steps):
    stock = results(build(steps=steps, **settings), X)
    ours = results(accelerate(build(steps=steps, **settings)), X)
    for here, there in zip(ours, stock, strict=True):
        np.testing.assert_allclose(here, there, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
def test_lengths_that_are_not_known_are_xlas_where_they_are_multiples_of_8(policy):
    """Both loops, in one graph, give what they give alone."""
    x = np.random.default_rng(1).normal(size=[3, 16, 5]).astype("float32")
    for steps in (7, 8, 16):
        given = accelerate(build(policy, steps=steps, return_sequences=True))
        open_ = accelerate(build(policy, steps=None, return_sequences=True))
        for here, there in zip(results(open_, x[:, :steps]), results(given, x[:, :steps]), strict=True):
            np.testing.assert_allclose(here, there, rtol=1e-5, atol=1e-6 if policy == "float32" else 2e-3)
    spec = tf.TensorSpec([3, None, 24]), *[tf.TensorSpec([3, 6])] * 2
    others = tf.zeros([6, 24]), tf.zeros([24])

    def scan(inputs, state, carry):
        return recurrent._scan(tf.transpose(inputs, [1, 0, 2]), state, carry, *others, tf.constant([[[True]]]))[0]

    graph = tf.function(scan, input_signature=spec).get_concrete_function().graph.as_graph_def()
    compiled = [each.signature.name for each in graph.library.function if each.attr["_XlaMustCompile"].b]
    assert compiled, "XLA has no part in it"


@pytest.mark.parametrize("settings", [{}, {"return_sequences": True}, {"return_sequences": True, "go_backwards": True}])
@pytest.mark.parametrize("zero", [False, True])
def test_masked_steps_leave_the_state(settings, zero):
    def make():
        keras.utils.set_random_seed(0)
        inputs = keras.Input([7, 5])
        lstm = keras.layers.LSTM(6, **settings)
        lstm.zero_output_for_mask = zero
        return keras.Model(inputs, lstm(keras.layers.Masking()(inputs)))

    x = X.copy()
    x[0, 4:] = x[1, :2] = x[2, 3] = 0
    for here, there in zip(results(accelerate(make()), x), results(make(), x), strict=True):
        np.testing.assert_allclose(here, there, rtol=1e-4, atol=1e-5)


def test_initial_and_kept_state():
    def make(**settings):
        keras.utils.set_random_seed(0)
        sequence, state, carry = keras.Input([7, 5]), keras.Input([6]), keras.Input([6])
        return keras.Model([sequence, state, carry], keras.layers.LSTM(6)(sequence, initial_state=[state, carry]))

    inputs = [X, np.ones([3, 6], "float32"), np.full([3, 6], -0.5, "float32")]
    np.testing.assert_allclose(accelerate(make())(inputs), make()(inputs), atol=1e-6)

    def stateful():
        keras.utils.set_random_seed(0)
        return keras.Sequential([keras.Input([7, 5], batch_size=3), keras.layers.LSTM(6, stateful=True)])

    stock, ours = stateful(), accelerate(stateful())
    for _ in range(3):
        np.testing.assert_allclose(ours(X), stock(X), atol=1e-6)


@pytest.mark.parametrize("sequences", [False, True])
@pytest.mark.parametrize("backwards", [False, True])
def test_masked_first_steps_put_out_zeros_whatever_the_first_state(sequences, backwards):
    def make():
        keras.utils.set_random_seed(0)
        inputs = [keras.Input([7, 5]), keras.Input([6]), keras.Input([6]), keras.Input([7], dtype="int32")]
        lstm = keras.layers.LSTM(6, return_sequences=sequences, return_state=True, go_backwards=backwards)
        return keras.Model(inputs, lstm(inputs[0], initial_state=inputs[1:3], mask=inputs[3]))

    mask = np.array([[0, 0, 1, 1, 0, 1, 0], [1, 0, 1, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0]], "int32")
    random = np.random.default_rng(1)
    inputs = [X, *random.normal(size=[2, 3, 6]).astype("float32"), mask]
    for here, there in zip(accelerate(make())(inputs), make()(inputs), strict=True):
        np.testing.assert_allclose(here, there, atol=1e-6)


@pytest.mark.parametrize("wrap", [lambda lstm: lstm, keras.layers.Bidirectional])
def test_eager_training_step(wrap):
    losses = []
    for speed_up in (lambda model: model, accelerate):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input([7, 5]), wrap(keras.layers.LSTM(6)), keras.layers.Dense(1)])
        speed_up(model).compile(keras.optimizers.SGD(0.1), "mse", run_eagerly=True)
        losses.append([float(model.train_on_batch(X, np.ones([3, 1]))) for _ in range(3)])
    np.testing.assert_allclose(*losses, rtol=1e-4)


def test_cell_of_ones_own_is_left_alone():
    class Cell(keras.layers.LSTMCell):
        def call(self, inputs, states, training=False):
            output, states = super().call(inputs, states, training=training)
            return 2 * output, states

    class Own(keras.layers.LSTM):
        def __init__(self, units):
            super().__init__(units)
            self.cell = Cell(units)

    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input([7, 5]), Own(6)])
    stock = np.array(model(X))
    np.testing.assert_array_equal(accelerate(model)(X), stock)


def test_dropout_of_inputs_is_active_in_training_only():
    model = accelerate(build(dropout=0.5, return_sequences=True))
    still = np.array(model(X))
    np.testing.assert_array_equal(model(X), still)
    assert np.abs(np.array(model(X, training=True)) - still).max() > 1e-3


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_half_is_nearer_to_float32_than_keras_half(policy):
    exact = results(build(return_sequences=True), X)
    stock = results(build(policy, return_sequences=True), X)
    ours = results(accelerate(build(policy, return_sequences=True)), X)
    for here, there, right in zip(ours, stock, exact, strict=True):
        assert np.linalg.norm(here - right) <= 1.1 * np.linalg.norm(there - right)


def test_a_long_sequence_keeps_its_carry():
    """A carry that grows by 2^-10 a step: in float16 it would stop at 2."""
    ones = {"x": tf.ones([1, 4096, 1], tf.float16), "state": tf.zeros([1, 1], tf.float16), "carry": tf.zeros([1, 1])}
    # Gates input, forget, cell, output: 1, 1, tanh(...) = 2^-10, 1.
    bias = tf.constant([20.0, 20.0, np.arctanh(2.0**-10), 20.0])
    zeros = tf.zeros([1, 4], tf.float16)
    _, _, carry = recurrent.lstm(**ones, kernel=zeros, recurrent_kernel=zeros, bias=bias)
    np.testing.assert_allclose(carry, [[4.0]], rtol=1e-3)


def test_accelerator_runs_keras_loop():
    model = accelerate(build(return_sequences=True))
    with kernels.as_on_accelerator():
        np.testing.assert_allclose(model(X), build(return_sequences=True)(X), atol=1e-6)
