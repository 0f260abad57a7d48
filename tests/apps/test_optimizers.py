"""Muon against numpy in float64 and against Keras', the schedule by hand."""

import keras
import numpy as np

from apps import optimizers

SETTINGS = {"weight_decay": None, "adam_weight_decay": None}


def test_schedule_by_hand():
    schedule = optimizers.InverseSquareRoot(0.01, warmup_steps=100, cooldown_steps=5000, num_steps=20_000)
    steps = (0, 49, 99, 399, 9999, 15_000, 17_500, 19_999, 20_000)
    expected = [0.0001, 0.005, 0.01, 0.005, 0.001, 0.1 * 15_001**-0.5, 0.05 * 17_501**-0.5, 2e-5 * 20_000**-0.5, 0]
    rates = [float(schedule(step)) for step in steps]
    np.testing.assert_allclose(rates, expected, rtol=1e-5)
    copied = keras.optimizers.schedules.deserialize(keras.optimizers.schedules.serialize(schedule))
    assert [float(copied(step)) for step in steps] == rates


def variables_of(layer) -> dict:
    return {variable.path.split("/", 1)[1]: variable for variable in layer.trainable_variables}


def attention() -> keras.layers.Layer:
    keras.utils.set_random_seed(0)
    layer = keras.layers.MultiHeadAttention(4, 8, name="attention")
    layer.build([None, None, 32], [None, None, 32])
    return layer


def orthogonalized(matrix: np.ndarray) -> np.ndarray:
    """Five rounds of the quintic iteration, written out."""
    x = matrix / np.linalg.norm(matrix)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x


def test_kernels_of_attention_are_matrices_of_all_heads():
    layer = attention()
    optimizer = optimizers.Muon(0.1, **SETTINGS)
    variables = variables_of(layer)
    random = np.random.default_rng(1)
    before = {name: variable.numpy() for name, variable in variables.items()}
    momenta = {name: np.zeros([32, 32]) for name in variables if name.endswith("kernel")}
    assert len(momenta) == 4
    expected = {name: before[name].reshape([32, 32]).astype("float64") for name in momenta}
    for _ in range(2):
        grads = {name: random.normal(size=variable.shape).astype("float32") for name, variable in variables.items()}
        optimizer.apply([keras.ops.convert_to_tensor(grad) for grad in grads.values()], list(variables.values()))
        for name, momentum in momenta.items():
            grad = grads[name].reshape([32, 32]).astype("float64")
            momentum[:] = 0.95 * momentum + grad
            expected[name] -= 0.1 * 0.2 * 32**0.5 * orthogonalized(grad + 0.95 * momentum)
    for name in momenta:
        np.testing.assert_allclose(variables[name].numpy().reshape([32, 32]), expected[name], atol=1e-4)
        singular = np.linalg.svd(expected[name] - before[name].reshape([32, 32]), compute_uv=False)
        assert singular.max() < 2 * 0.1 * 0.2 * 32**0.5 * 1.3  # orthogonal, roughly


def test_everything_else_is_adams():
    keras.utils.set_random_seed(2)
    layers = [keras.layers.Embedding(7, 6, name="table"), keras.layers.LayerNormalization(name="norm"), attention()]
    layers[0].build([None, None])
    layers[1].build([None, 6])
    variables = [v for layer in layers for v in layer.trainable_variables if not v.path.endswith("kernel")]
    convolution = keras.layers.Conv1D(16, 3)  # its kernel has three axes too
    convolution.build([None, None, 8])
    variables += convolution.trainable_variables
    assert len(variables) == 1 + 2 + 4 + 2
    before = [variable.numpy() for variable in variables]
    grads = [np.random.default_rng(3).normal(size=variable.shape).astype("float32") for variable in variables]
    moved = []
    for optimizer in (
        optimizers.Muon(0.1, adam_beta_2=0.98, epsilon=1e-9, **SETTINGS),
        keras.optimizers.Adam(0.1, beta_2=0.98, epsilon=1e-9),
    ):
        for variable, value in zip(variables, before, strict=True):
            variable.assign(value)
        for _ in range(3):
            optimizer.apply([keras.ops.convert_to_tensor(grad) for grad in grads], variables)
        moved.append([variable.numpy() for variable in variables])
    for ours, theirs, value in zip(*moved, before, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
        assert np.abs(ours - value).max() > 0.1


def test_dense_kernels_are_moved_as_by_keras():
    def train(optimizer) -> np.ndarray:
        keras.utils.set_random_seed(4)
        layer = keras.layers.Dense(5, name="dense")
        layer.build([None, 9])
        grads = [np.random.default_rng(5).normal(size=v.shape).astype("float32") for v in layer.trainable_variables]
        for _ in range(3):
            optimizer.apply([keras.ops.convert_to_tensor(grad) for grad in grads], layer.trainable_variables)
        return layer.kernel.numpy()

    np.testing.assert_array_equal(
        train(optimizers.Muon(0.1, **SETTINGS)), train(keras.optimizers.Muon(0.1, **SETTINGS))
    )


def test_keras_leaves_attention_to_adam():
    # The reason for our class; when it fails, Keras was mended.
    optimizer = keras.optimizers.Muon(0.1)
    variables = variables_of(attention())
    optimizer.build(list(variables.values()))
    by_adam = {
        name for name, velocity in zip(variables, optimizer.adam_velocities, strict=True) if velocity is not None
    }
    assert by_adam == {name for name in variables if name.endswith("kernel")} | {"attention_output/bias"}


def test_it_is_saved_with_its_settings():
    optimizer = optimizers.Muon(optimizers.InverseSquareRoot(0.1, 2, 3, 10), adam_beta_2=0.98, **SETTINGS)
    copied = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    assert type(copied) is optimizers.Muon
    assert copied.get_config() == optimizer.get_config()
