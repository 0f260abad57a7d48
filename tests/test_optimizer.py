"""Bounded, counted loss scaling; the oracle is plain numpy and stock Keras."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfhalf import LossScaleOptimizer


def step(optimizer, variable, gradient: float) -> None:
    """One step on the scaled gradient, as `fit` does it."""
    scale = optimizer.scale_loss(1.0)
    optimizer.apply([tf.constant([gradient]) * scale], [variable])


@pytest.fixture
def variable() -> keras.Variable:
    return keras.Variable(np.array([3.0], "float32"))


def test_steps_equal_unscaled_sgd(variable):
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(0.5, momentum=0.9), initial_scale=8.0, dynamic_growth_steps=2)
    expected, momentum = 3.0, 0.0
    for gradient in (0.25, -1.0, 0.5, 2.0):
        step(optimizer, variable, gradient)
        momentum = 0.9 * momentum - 0.5 * gradient
        expected += momentum
    np.testing.assert_allclose(variable.numpy(), [expected], rtol=1e-6)
    assert (optimizer.scale, optimizer.steps_taken, optimizer.steps_skipped) == (32.0, 4, 0)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_overflow_skips_and_halves(variable, bad):
    optimizer = LossScaleOptimizer(keras.optimizers.Adam(0.1, use_ema=True), initial_scale=8.0)
    step(optimizer, variable, 1.0)
    before = [v.numpy() for v in [variable, *optimizer.inner_optimizer.variables]]
    step(optimizer, variable, bad)
    step(optimizer, variable, bad)
    after = [v.numpy() for v in [variable, *optimizer.inner_optimizer.variables]]
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(old, new)
    assert (optimizer.scale, optimizer.steps_taken, optimizer.steps_skipped) == (2.0, 1, 2)
    assert optimizer.consecutive_skips == 2
    step(optimizer, variable, 1.0)
    assert (optimizer.consecutive_skips, optimizer.steps_skipped) == (0, 2)


def test_scale_stays_within_bounds_where_keras_runs_away(variable):
    # KERAS.md row 5: stock Keras halves down to 0 and doubles up to infinity.
    stock = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.0), dynamic_growth_steps=1)
    ours = LossScaleOptimizer(keras.optimizers.SGD(0.0), dynamic_growth_steps=1)
    other = keras.Variable(np.array([3.0], "float32"))
    for gradient, stock_end, our_end in ((np.inf, 0.0, 2.0**-14), (0.0, np.inf, 2.0**24)):
        stock.build([other])
        stock.dynamic_scale.assign(1.0)
        for _ in range(180):
            stock.apply([tf.constant([gradient])], [other])
            ours.apply([tf.constant([gradient])], [variable])
        assert float(stock.dynamic_scale) == stock_end
        assert ours.scale == our_end


def test_stalled_after_the_given_number_of_skips(variable):
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(), max_consecutive_skips=3)
    for stalled in (False, False, True):
        step(optimizer, variable, np.inf)
        assert optimizer.stalled is stalled


def test_half_loss_times_scale_does_not_overflow():
    optimizer = LossScaleOptimizer(keras.optimizers.SGD())
    scaled = optimizer.scale_loss(tf.constant(100.0, tf.float16))
    assert scaled.dtype == tf.float32
    assert float(scaled) == 100 * 2**15


def test_counters_before_build():
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(), initial_scale=4.0)
    assert (optimizer.scale, optimizer.steps_taken, optimizer.steps_skipped, optimizer.consecutive_skips) == (
        4.0,
        0,
        0,
        0,
    )


def test_survives_saving_with_its_model(tmp_path, build_convnet, pictures):
    model = build_convnet()
    optimizer = LossScaleOptimizer(keras.optimizers.Adam(0.01), 16.0, 7, 2.0, 64.0, 1, 9, name="scaled")
    model.compile(optimizer, "mse")
    model.fit(pictures, np.zeros([12, 3], "float32"), epochs=2, verbose=0)
    step_inputs = pictures.copy()
    step_inputs[0] = np.nan
    model.fit(step_inputs, np.zeros([12, 3], "float32"), verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras").optimizer
    assert type(loaded) is LossScaleOptimizer
    assert loaded.get_config() == optimizer.get_config()
    assert (loaded.scale, loaded.steps_taken, loaded.steps_skipped) == (8.0, 2, 1)


def test_works_inside_fit_and_counts(build_convnet, pictures):
    model = build_convnet()
    model.compile(LossScaleOptimizer(keras.optimizers.SGD(0.01), initial_scale=2.0**24), "mse")
    model.fit(pictures, np.ones([12, 3], "float32"), epochs=12, verbose=0)
    assert model.optimizer.steps_skipped > 0  # fails when Keras no longer calls the methods that we override
    assert model.optimizer.steps_taken > 0
    assert model.optimizer.steps_taken + model.optimizer.steps_skipped == 12
    assert model.optimizer.scale == 2.0 ** (24 - model.optimizer.steps_skipped)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"initial_scale": 0.0}, "min_scale <= initial_scale"),
        ({"initial_scale": 2.0**25}, "min_scale <= initial_scale"),
        ({"min_scale": 4.0, "max_scale": 2.0}, "min_scale <= initial_scale"),
        ({"max_scale": float("inf")}, "initial_scale <= max_scale"),
        ({"dynamic_growth_steps": 0}, "dynamic_growth_steps must be at least 1"),
        ({"max_consecutive_skips": 0}, "max_consecutive_skips must be at least 1"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps"),
    ],
)
def test_refuses_what_it_cannot_do(arguments, message):
    with pytest.raises(ValueError, match=message):
        LossScaleOptimizer(keras.optimizers.SGD(), **arguments)


def test_refuses_scaling_twice():
    with pytest.raises(ValueError, match="scales the loss already"):
        LossScaleOptimizer(LossScaleOptimizer(keras.optimizers.SGD()))
