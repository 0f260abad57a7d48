"""The window of loss scales, against numbers worked out by hand; models without one, and whose fault it is."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfhalf
from tests.test_twins import Factors, batch_of, chain
from tfhalf import scale_window
from tfhalf.scale_window import loss_scale_window

ONE = np.ones([1, 1], "float32")
SMALLEST = -24  # exponent of float16's smallest subnormal; half of it is rounded to 0
LARGEST = 15  # exponent of the largest power of 2


def dense_model(num_inputs: int, loss) -> keras.Model:
    """One Dense in mixed_float16 without a bias, whose loss is a function of what it puts out."""
    with tfhalf.PrecisionPlan().scope():
        model = keras.Sequential([keras.Input([num_inputs]), keras.layers.Dense(1, use_bias=False, name="dense")])
    model.compile("sgd", lambda y, y_pred: loss(y_pred), auto_scale_loss=False)
    return model


def row(window: scale_window.Window, name: str) -> scale_window.VariableWindow:
    return next(one for one in window.variables if one.name == name)


@pytest.mark.parametrize("exponent", [-30, -3, 10])
def test_one_gradient_is_lost_below_and_overflows_above(exponent):
    model = dense_model(1, lambda y_pred: 2.0**exponent * y_pred)
    window = loss_scale_window(model, [(ONE, ONE)])
    low, high = max(-14, SMALLEST - exponent), min(24, LARGEST - exponent)
    assert (window.low, window.high) == (2.0**low, 2.0**high)
    assert window.bits == high - low
    kernel = row(window, "dense/kernel")
    logs = np.log2(window.scales)
    np.testing.assert_array_equal(kernel.finite, logs <= LARGEST - exponent)
    np.testing.assert_array_equal(kernel.lost[kernel.finite], (logs < SMALLEST - exponent)[kernel.finite])
    assert window.trouble == []
    assert bool(window.limit) == (high < 24)
    assert (
        not window.limit or f"at 2^{high + 1} the first overflow is in (loss) (backward: its" in window.limit
    )  # the output is half


@pytest.mark.parametrize(("second", "low"), [(-8, -6), (-12, -14)])
def test_mass_decides_and_not_the_number_of_elements(second, low):
    """Gradients of 2^-10 and 2^(second-10): the smaller one is lost up to scale 2^(-25 - second + 10)."""
    model = dense_model(2, lambda y_pred: 2.0**-10 * y_pred)
    window = loss_scale_window(model, [(np.array([[1, 2.0**second]], "float32"), ONE)])
    kernel = row(window, "dense/kernel")
    lost = np.log2(window.scales) <= -15 - second
    np.testing.assert_allclose(kernel.lost[kernel.finite], (lost / (1 + 2.0**-second))[kernel.finite], rtol=1e-6)
    np.testing.assert_array_equal(kernel.lost_elements[kernel.finite], (lost * 0.5)[kernel.finite])
    assert window.low == 2.0**low


def test_losses_are_those_of_numpy_in_float16():
    random = np.random.default_rng(0)
    x = np.float16(random.normal(size=40) * 2.0 ** random.integers(-12, 4, 40))
    factor = 0.7 * 2.0**-9
    model = dense_model(40, lambda y_pred: factor * y_pred)
    kernel = row(loss_scale_window(model, [(np.float32(x)[np.newaxis], ONE)]), "dense/kernel")
    true = np.float64(x) * np.float32(factor)
    least = 1.0
    with np.errstate(over="ignore"):
        expected = []
        for scale in scale_window.SCALES:
            half = np.float16(np.float32(x) * np.float32(np.float16(np.float32(factor) * np.float32(scale))))
            expected.append(np.sum(np.abs(true)[half == 0]) / np.sum(np.abs(true)))
            assert kernel.finite[len(expected) - 1] == np.isfinite(half).all()
            least = min(least, expected[-1])
    assert least == 0.0
    np.testing.assert_allclose(kernel.lost[kernel.finite], np.array(expected)[kernel.finite], rtol=1e-4, atol=1e-7)
    assert 0 < kernel.lost[0] < 1


def test_batches_and_variables_are_intersected():
    model = dense_model(1, lambda y_pred: y_pred)
    batches = [(ONE * 2.0**4, ONE), (ONE * 2.0**-13, ONE)]
    window = loss_scale_window(model, batches)
    assert (window.low, window.high) == (2.0 ** (SMALLEST + 13), 2.0 ** (LARGEST - 4))
    one = loss_scale_window(model, batches[:1])
    assert (one.low, one.high) == (2.0**-14, 2.0 ** (LARGEST - 4))


@pytest.mark.parametrize(
    ("low", "high", "initial", "steps"),
    [(-14, 20, 18, 1000), (3, 7, 5, 1000), (3, 6, 4, 2000), (3, 4, 3, 2000), (3, 3, 3, 2000)],
)
def test_recommendation(low, high, initial, steps):
    window = scale_window.Window(scale_window.SCALES, [], 2.0**low, 2.0**high, "", [])
    assert (window.initial_scale, window.dynamic_growth_steps) == (2.0**initial, steps)
    none = scale_window.Window(scale_window.SCALES, [], None, None, "", [])
    assert (none.bits, none.initial_scale, none.dynamic_growth_steps) == (None, None, None)


def test_no_window_names_the_layer_whose_island_gives_one():
    """Half of the gradient overflows from scale 2^-13 on at the latest, the other half is lost up to 2^2 at least."""
    model = chain(lambda: Factors("up", "down", name="spread"))
    batch = batch_of(model)
    window = loss_scale_window(model, [batch])
    assert window.low is None
    assert row(window, "body/kernel").bits is None
    assert row(window, "head/kernel").bits == 38
    (words,) = window.trouble
    line = 'PrecisionPlan(layers={"spread": "float32"})'
    assert words == f"no loss scale fits body/kernel and 1 more; use bfloat16 or a float32 island here: spread, {line}"
    assert words in str(window)
    tfhalf.PrecisionPlan(layers={"spread": "float32"}).apply(model)
    mended = loss_scale_window(model, [batch])
    assert mended.trouble == []
    assert mended.bits > 20


def test_variables_that_exclude_each_other_are_both_named():
    with tfhalf.PrecisionPlan().scope():
        inputs = keras.Input([1])
        outputs = [keras.layers.Dense(1, use_bias=False, name=name)(inputs) for name in ("small", "large")]
        model = keras.Model(inputs, outputs)
    losses = [lambda y, y_pred: 2.0**-34 * y_pred, lambda y, y_pred: 2.0**10 * y_pred]
    model.compile("sgd", losses, auto_scale_loss=False)
    batch = (ONE, (ONE, ONE))
    window = loss_scale_window(model, [batch])
    assert window.low is None
    (words,) = window.trouble
    assert "no loss scale fits both large/kernel (at most 2^5) and small/kernel (at least 2^10); use bfloat16" in words
    assert words.endswith('here: large, PrecisionPlan(layers={"large": "float32"})')
    tfhalf.PrecisionPlan(layers={"large": "float32"}).apply(model)
    mended = loss_scale_window(model, [batch])
    assert (mended.low, mended.high) == (2.0**10, 2.0**24)


def test_gradient_too_small_for_any_scale_names_its_layer():
    model = dense_model(1, lambda y_pred: 2.0**-60 * y_pred)
    window = loss_scale_window(model, [(ONE, ONE)])
    assert window.trouble[0].startswith(
        "no loss scale fits dense/kernel; use bfloat16 or a float32 island here: dense,"
    )


@pytest.mark.parametrize("hides", [lambda: keras.layers.ReLU(6.0), lambda: keras.layers.Activation("tanh")])
def test_overflow_of_the_forward_pass_is_named_though_hidden(hides):
    model = chain(lambda: keras.layers.Rescaling(2.0**17, name="huge"), hides)
    window = loss_scale_window(model, [batch_of(model)])
    (words,) = window.trouble
    lead = "batch 0: the forward pass overflows, which no loss scale helps, in huge (its output); use bfloat16"
    assert words.startswith(lead)
    assert words.endswith('here: huge, PrecisionPlan(layers={"huge": "float32"})')
    assert window.low is None


def test_activities_are_regularised_in_float32_as_in_the_step():
    with tfhalf.PrecisionPlan().scope():
        layers = [keras.layers.Rescaling(300.0, activity_regularizer=keras.regularizers.L2(1e-9), name="large")]
        layers.append(keras.layers.Dense(1, dtype="float32", name="head"))
        model = keras.Sequential([keras.Input([4]), *layers])
    tfhalf.compile_model(model, keras.optimizers.SGD(1e-9), loss="mse")
    batch = np.ones([8, 4], "float32"), np.zeros([8, 1], "float32")  # 32 squares of 300: 2.9 million
    window = loss_scale_window(model, [batch])
    assert window.trouble == []
    assert window.low is not None
    assert tfhalf.compare(model, batch).forward is None


def test_model_without_trainable_weights_is_refused():
    model = chain(lambda: keras.layers.Rescaling(1.0), lambda: keras.layers.ReLU())
    model.trainable = False
    with pytest.raises(ValueError, match="has no trainable weights: no gradient to scale"):
        loss_scale_window(model, [batch_of(model)])


def test_what_is_not_finite_in_float32_is_no_fault_of_half():
    model = dense_model(1, lambda y_pred: y_pred)
    window = loss_scale_window(model, [(ONE, ONE), (ONE * np.nan, ONE)])
    assert window.trouble == ["batch 1: the pass isn't finite in float32 either, first in (data) (forward: the batch)"]
    model = dense_model(1, lambda y_pred: tf.math.log(-tf.abs(y_pred)))
    (words,) = loss_scale_window(model, [(ONE, ONE)]).trouble
    assert words.endswith("first in (loss) (forward: the loss)")
    model = dense_model(1, lambda y_pred: tf.sqrt(tf.nn.relu(y_pred)))  # 0 has no slope there
    (words,) = loss_scale_window(model, [(0 * ONE, ONE)]).trouble
    assert words.endswith("first in (loss) (backward: its gradient by the model's output)")


def test_variable_without_gradient_does_not_limit():
    model = chain()
    model.get_layer("head").kernel.assign(np.zeros([4, 1]))
    window = loss_scale_window(model, [batch_of(model)])
    assert not row(window, "body/kernel").has_gradient
    assert row(window, "body/kernel").bits is None
    assert window.bits == 38
    told = [line for line in str(window).splitlines() if line.startswith("body/kernel")]
    assert "no gradient" in told[0]
    for layer in ("body", "head"):
        model.get_layer(layer).trainable = layer == "body"
    flat = loss_scale_window(model, [batch_of(model)])
    assert flat.trouble == ["no variable has a gradient in float32: the loss is flat here"]


@pytest.mark.parametrize(("columns", "has_window"), [(1, True), (8, False)])
def test_unit_that_is_shut_in_half_only_is_no_scales_doing(columns, has_window):
    """Of 64 columns some are 0 in half: 1.6% and 12.5% of the gradient."""

    def shut(x):
        return x * tf.cast(tf.range(64) >= columns, x.dtype) if x.dtype == tf.float16 else x

    with tfhalf.PrecisionPlan().scope():
        layers = [keras.Input([1]), keras.layers.Dense(64, use_bias=False, name="body"), keras.layers.Lambda(shut)]
        model = keras.Sequential([*layers, keras.layers.Dense(1, kernel_initializer="ones", dtype="float32")])
    model.compile("sgd", lambda y, y_pred: y_pred, auto_scale_loss=False)
    body = row(loss_scale_window(model, [(ONE, ONE)]), "body/kernel")
    assert (body.low is not None) == has_window
    assert body.shut == pytest.approx(columns / 64 if has_window else 0.0)


def test_gradient_that_is_rounding_noise_does_not_limit():
    """What softmax takes out again: its gradient is 0, in float32 2^-24 of the others, in half 2^-11."""

    class Shift(keras.layers.Layer):
        def build(self, input_shape):
            self.shift = self.add_weight(shape=[1], name="shift")

        def call(self, x):
            return x + self.shift

    keras.utils.set_random_seed(1)
    with tfhalf.PrecisionPlan().scope():
        layers = [keras.Input([8]), keras.layers.Dense(10, name="body"), Shift(name="shift")]
        model = keras.Sequential([*layers, keras.layers.Activation("linear", dtype="float32")])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(True), auto_scale_loss=False)
    x = np.random.default_rng(0).normal(size=[32, 8]).astype("float32")
    window = loss_scale_window(model, [(x, np.arange(32) % 10)])
    assert [one.name for one in window.variables if one.is_noise] == ["shift/shift"]
    assert row(window, "shift/shift").low == 2.0**-14
    assert "rounding noise" in str(window)


def test_embedding_and_frozen_weights():
    with tfhalf.PrecisionPlan().scope():
        tokens = keras.Input([3], dtype="int32")
        x = keras.layers.Embedding(7, 4, name="embedding")(tokens)
        x = keras.layers.Dense(4, name="frozen")(keras.layers.Flatten()(x))
        model = keras.Model(tokens, keras.layers.Dense(1, dtype="float32", name="head")(x))
    model.get_layer("frozen").trainable = False
    model.compile("sgd", "mse", auto_scale_loss=False)
    window = loss_scale_window(model, [(np.array([[1, 1, 2]]), ONE)])
    assert [one.name for one in window.variables] == ["embedding/embeddings", "head/kernel", "head/bias"]
    assert window.bits > 10


def test_models_that_cannot_be_measured(build_convnet):
    model = build_convnet("mixed_bfloat16")
    with pytest.raises(ValueError, match="'small' isn't compiled"):
        loss_scale_window(model, [])
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="no layer computes in float16, but in bfloat16, float32"):
        loss_scale_window(model, [])
    half = dense_model(1, lambda y_pred: y_pred)
    with pytest.raises(ValueError, match="batches is empty"):
        loss_scale_window(half, [])
    for scales in ([], [3.0], [0.0], [-2.0], [np.inf]):
        with pytest.raises(ValueError, match="must be powers of 2"):
            loss_scale_window(half, [(ONE, ONE)], scales=scales)


def window_of(number: int) -> scale_window.Window:
    def variable(index: int) -> scale_window.VariableWindow:
        lost, finite = np.zeros(39), np.arange(39) < 30
        low = None if index == 7 else 2.0 ** (index % 5)
        return scale_window.VariableWindow(
            "a", f"a/{index}", lost, lost, finite, 0.0, False, True, low, low and 2.0**15
        )

    return scale_window.Window(
        scale_window.SCALES, [variable(index) for index in range(number)], 16.0, 2.0**15, "x", []
    )


def test_table_has_the_worst_first_and_at_most_40():
    lines = str(window_of(45)).splitlines()
    assert lines[0] == "loss scales 2^4 to 2^15, 11 bits: initial_scale=8192, dynamic_growth_steps=1000"
    rows = [line for line in lines if line.startswith("a/")]
    assert len(rows) == 40
    assert rows[0].split()[:2] == ["a/7", "none"]
    assert rows[1].split()[:4] == ["a/4", "2^4", "to", "2^15"]
    assert lines[-1] == "and 5 more"
    assert "more" not in str(window_of(40))


def test_json_and_pictures():
    for window in (window_of(45), scale_window.Window(scale_window.SCALES, [], None, None, "", ["none"])):
        told = json.loads(json.dumps(window.to_json(), allow_nan=False))
        assert len(told["variables"]) == len(window.variables)
        assert tf.io.decode_png(window.picture()).shape[-1] in (3, 4)
    assert json.loads(json.dumps(window_of(9).to_json()))["variables"][7]["low"] is None
