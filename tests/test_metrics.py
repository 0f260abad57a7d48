"""Metrics of a model against numpy and Keras' own evaluation."""

import keras
import numpy as np
import pytest

import tfhalf
from tfhalf import metrics, precision, twins


@pytest.fixture(scope="module")
def model() -> keras.Model:
    keras.utils.set_random_seed(1)
    with tfhalf.PrecisionPlan().scope():
        regularised = keras.layers.Dense(3, activity_regularizer="l2", name="body")
        layers = [regularised, keras.layers.Dropout(0.5), keras.layers.Dense(1, dtype="float32", name="head")]
        model = keras.Sequential([keras.Input([2]), *layers])
    tfhalf.compile_model(model, keras.optimizers.SGD(), loss="mse", metrics=["mae"])
    return model


def batches() -> list:
    random = np.random.default_rng(0)
    return [tuple(random.normal(size=[rows, width]).astype("float32") for width in (2, 1)) for rows in (8, 8, 3)]


def test_each_kind_agrees_with_keras_evaluation_and_with_numpy(model):
    x, y = (np.concatenate(parts) for parts in zip(*batches(), strict=True))
    loss, mae = model.evaluate(x, y, batch_size=8, verbose=0)
    errors = model.predict(x, verbose=0) - y
    for metric, expected in (
        ("loss", loss),
        ("mae", mae),
        (keras.metrics.MeanAbsoluteError(), np.mean(np.abs(errors))),
        (lambda y, y_pred: np.max(np.abs(y - y_pred)) * 0 + len(y), (8 * 8 + 8 * 8 + 3 * 3) / 19),
        (keras.losses.MeanSquaredError(), np.mean(errors**2)),
    ):
        score = metrics.Score(model, [twins.tensors(batch) for batch in batches()], metric)
        assert score() == pytest.approx(expected, rel=1e-3)
        assert score() == pytest.approx(expected, rel=1e-3), "it starts anew"
    assert metrics.Score(model, [], keras.metrics.MeanAbsoluteError(name="error")).name == "error"


def test_it_computes_as_the_model_does_now(model):
    half = metrics.Score(model, [twins.tensors(batch) for batch in batches()], "loss")()
    true = metrics.in_float32(model, batches(), "loss")
    assert half != true
    with precision.computing_in(model, "float32"):
        loss = model.compute_loss  # compiled for half: its sum of activities is in float32 in either
        assert loss is not None
        assert metrics.Score(model, [twins.tensors(batch) for batch in batches()], "loss")() == true
    assert half == pytest.approx(true, rel=1e-2)


def test_compiled_metrics_need_a_compiled_model():
    with tfhalf.PrecisionPlan().scope():
        model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1)])
    with pytest.raises(ValueError, match="isn't compiled"):
        metrics.Score(model, batches(), "loss")
