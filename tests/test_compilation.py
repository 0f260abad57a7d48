"""What compile_model puts on a model; stock Keras fails first in each case."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfhalf
from tests.test_optimizer import replicas
from tfhalf import PrecisionPlan, compilation, compile_model

HALVES = ("mixed_float16", "mixed_bfloat16")


def compiled(model, optimizer=None, **more):
    compile_model(model, optimizer or keras.optimizers.Adam(0.01), loss="mse", metrics=["mae"], **more)
    return model


@pytest.mark.parametrize(("policy", "scaled"), [("mixed_float16", True), ("mixed_bfloat16", False), ("float32", False)])
def test_loss_is_scaled_exactly_if_a_layer_computes_in_float16(build_convnet, policy, scaled):
    assert isinstance(compiled(build_convnet(policy)).optimizer, tfhalf.LossScaleOptimizer) is scaled


def test_loss_is_scaled_for_one_float16_layer_in_a_float32_model(build_convnet):
    # KERAS.md row 7: stock Keras looks at the model's own policy only.
    model = PrecisionPlan("float32", {"conv": "mixed_float16"}).apply(build_convnet("float32"))
    model.compile("adam", "mse")
    assert not isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    assert isinstance(compiled(model, initial_scale=4.0).optimizer, tfhalf.LossScaleOptimizer)
    assert model.optimizer.scale == 4.0


def test_model_shows_that_it_was_compiled_by_us(build_convnet):
    model = build_convnet()
    model.compile("sgd", "mse")
    assert not compilation.compiled_by_us(model)
    assert compilation.compiled_by_us(compiled(model))
    assert compilation.compiled_by_us(compiled(build_convnet("float32")))
    model.compile("sgd", "mse")  # leaves on the model what we put there
    assert compilation.compiled_by_us(model)
    assert not compilation.compiled_by_us(keras.models.clone_model(model))


def test_half_outputs_are_refused(build_convnet):
    # KERAS.md row 12: stock Keras says nothing, and the loss is six times worse.
    with pytest.raises(ValueError, match="head is float16"):
        compiled(build_convnet(output=None))


def test_optimizer_that_scales_already_is_taken_as_it_is(build_convnet):
    optimizer = tfhalf.LossScaleOptimizer(keras.optimizers.Adam(), initial_scale=4.0)
    assert compiled(build_convnet("float32"), optimizer).optimizer is optimizer
    with pytest.raises(ValueError, match="give it these settings itself"):
        compiled(build_convnet(), optimizer, initial_scale=8.0)
    with pytest.raises(ValueError, match="scales the loss already"):
        compiled(build_convnet(), keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam()))


def values(variables) -> dict:
    return {variable.path: np.array(keras.ops.convert_to_numpy(variable)) for variable in variables}


@pytest.mark.parametrize("how", ["traced", "jit_compile", "run_eagerly"])
@pytest.mark.parametrize("spoil", ["overflow", "nan"])
def test_skipped_step_changes_random_states_and_counters_only(build_convnet, pictures, spoil, how):
    model = compiled(build_convnet(), jit_compile="jit_compile" in how, initial_scale=64.0)
    model.run_eagerly = "run_eagerly" in how
    targets = np.ones([12, 3], "float32")
    model.train_on_batch(pictures, targets)
    bad = pictures.copy()
    bad[0] = np.nan if spoil == "nan" else 60000.0  # its convolution overflows float16
    before = values(model.variables + model.optimizer.variables)
    model.train_on_batch(bad, targets)
    after = values(model.variables + model.optimizer.variables)
    changed = {path for path in before if not np.array_equal(before[path], after[path])}
    ours = {"steps_skipped", "consecutive_skips"}
    metrics = {path for path in changed if path.split("/")[0] in ("loss", "mae", "compile_metrics")}
    random = {path for path in changed if "seed_generator" in path}
    assert len(random) == 1
    assert {path.split("/")[-1] for path in changed - random - metrics} == ours
    assert model.optimizer.steps_skipped == 1
    model.train_on_batch(pictures, targets)
    moved = values(model.weights)
    assert not any(np.array_equal(before[path], moved[path]) for path in moved if "moving" in path)


def test_stock_keras_poisons_the_statistics_on_a_skipped_step(build_convnet, pictures):
    # KERAS.md row 19; when this fails, Keras was mended and the guard can go.
    model = build_convnet()
    model.compile("adam", "mse", jit_compile=False)  # XLA takes a minute for it
    bad = pictures.copy()
    bad[0] = 60000.0
    model.train_on_batch(bad, np.ones([12, 3], "float32"))
    assert all(np.all(np.isfinite(weight)) for weight in model.trainable_weights)
    assert not np.all(np.isfinite(model.get_layer("norm").moving_variance))


def test_statistics_are_keras_own_while_steps_are_taken(build_convnet, pictures):
    ours, stock = compiled(build_convnet(), keras.optimizers.SGD(0.01)), build_convnet()
    stock.compile(keras.optimizers.SGD(0.01), "mse")
    for model in (ours, stock):
        model.fit(pictures, np.ones([12, 3], "float32"), epochs=3, verbose=0)
    for one, two in zip(ours.get_weights(), stock.get_weights(), strict=True):
        np.testing.assert_array_equal(one, two)


def test_frozen_weights_are_not_copied_at_each_step(build_convnet, pictures):
    model = build_convnet()
    model.get_layer("dense").trainable = False
    compiled(model)
    model.train_on_batch(pictures, np.ones([12, 3], "float32"))
    step = tf.function(model.train_step).get_concrete_function((pictures, np.ones([12, 3], "float32")))
    kernel = model.get_layer("dense").kernel.value.handle
    captured = {id(outer): inner for outer, inner in step.graph.captures}
    users = {operation.type for operation in captured[id(kernel)].consumers()}
    assert "AssignVariableOp" not in users


class Counting(keras.layers.Layer):
    """Has a count and a table of its own, and is no BatchNormalization."""

    def build(self, shape):
        self.count = self.add_weight(shape=(), dtype="int32", initializer="zeros", trainable=False, name="count")
        self.largest = self.add_weight(shape=(), initializer="zeros", trainable=False, name="largest")

    def call(self, x, training=False):
        if training:
            self.count.assign(self.count + 1)
            self.largest.assign(tf.reduce_max(tf.cast(x, tf.float32)))
        return x


def test_any_layers_own_variables_are_guarded():
    with PrecisionPlan().scope():
        inputs = keras.Input([4])
        x = Counting(name="counting")(inputs)
        model = compiled(keras.Model(inputs, keras.layers.Dense(1, dtype="float32")(x)))
    x = np.ones([4, 4], "float32")
    for factor in (1.0, np.nan, 2.0, np.inf):
        model.train_on_batch(x * np.float32(factor), x[:, :1])
    assert (int(model.get_layer("counting").count), float(model.get_layer("counting").largest)) == (2, 2.0)


def test_kernel_that_its_layer_assigns_is_guarded():
    with PrecisionPlan().scope():
        inputs = keras.Input([4])
        x = keras.layers.SpectralNormalization(keras.layers.Dense(4), name="spectral")(inputs)
        model = compiled(keras.Model(inputs, keras.layers.Dense(1, dtype="float32")(x)))
    x = np.ones([4, 4], "float32")
    model.train_on_batch(x, x[:, :1])
    before = values(model.weights)
    model.train_on_batch(x * np.float32(np.nan), x[:, :1])
    for path, value in values(model.weights).items():
        np.testing.assert_array_equal(value, before[path], err_msg=path)


class Penalty(keras.layers.Layer):
    """Adds a half loss."""

    def call(self, x):
        self.add_loss(keras.ops.mean(keras.ops.square(x)))
        return x


def regularised(policy: str, strength: float = 0.01, penalty: bool = True) -> keras.Model:
    keras.utils.set_random_seed(3)
    with PrecisionPlan(policy).scope():
        inputs = keras.Input([16])
        regularizer = keras.regularizers.L2(strength)
        x = keras.layers.Dense(32, activity_regularizer=regularizer, kernel_regularizer="l2", name="dense")(inputs)
        return keras.Model(inputs, keras.layers.Dense(1, dtype="float32", name="head")(Penalty()(x) if penalty else x))


@pytest.mark.parametrize("policy", HALVES)
def test_added_losses_work_in_half(policy):
    # KERAS.md row 4: stock Keras can't add them.
    x, y = np.random.default_rng(0).normal(size=[2, 8, 16]).astype("float32")
    stock = regularised(policy)
    stock.compile("sgd", "mse")
    with pytest.raises(TypeError):
        stock.fit(x, y[:, :1], verbose=0)
    expected = compiled(regularised("float32")).evaluate(x, y[:, :1], verbose=0)[0]
    model = compiled(regularised(policy))
    # Inputs, weights and outputs are rounded once each: 2^-8 in bfloat16, and the loss has their squares.
    assert model.evaluate(x, y[:, :1], verbose=0)[0] == pytest.approx(expected, rel=6 * 2**-8)
    assert model.fit(x, y[:, :1], verbose=0).history["loss"][0] == pytest.approx(expected, rel=6 * 2**-8)


def test_activity_regulariser_sums_in_float32():
    # 8 x 32 squares of about 600 are over 65504; the activities themselves are far from it.
    x = np.full([8, 16], 150.0, "float32") * np.sign(np.random.default_rng(0).normal(size=[8, 16])).astype("float32")
    y = np.zeros([8, 1], "float32")
    expected = compiled(regularised("float32", penalty=False)).evaluate(x, y, verbose=0)[0]
    model = compiled(regularised("mixed_float16", penalty=False), keras.optimizers.SGD(0.0))
    assert model.evaluate(x, y, verbose=0)[0] == pytest.approx(expected, rel=6 * 2**-11)
    logs = model.train_on_batch(x, y, return_dict=True)
    assert logs["loss"] == pytest.approx(expected, rel=6 * 2**-11)
    assert model.optimizer.steps_skipped <= 1  # 2^15 times these gradients may overflow; the loss doesn't


def test_layers_are_saved_as_they_were_made():
    model = compiled(regularised("mixed_float16"))
    x = np.ones([8, 16], "float32")
    model.fit(x, x[:, :1], verbose=0)
    assert type(model.get_layer("dense").activity_regularizer) is keras.regularizers.L2
    assert "tfhalf" not in json.dumps(model.get_config())


def test_compiling_again_starts_from_keras_own_step(build_convnet, pictures):
    model = compiled(build_convnet())
    first = model.train_step
    compiled(model)
    assert model.train_step is not first
    assert model.train_step.__wrapped__ == type(model).train_step.__get__(model)
    model.train_on_batch(pictures, np.ones([12, 3], "float32"))


class Counted(keras.optimizers.SGD):
    """Counts how often Python applies it: once a trace."""

    traces = 0

    def apply(self, grads, trainable_variables=None):
        self.traces += 1
        return super().apply(grads, trainable_variables)


class Rows(keras.Model):
    """Makes ragged rows dense."""

    def call(self, inputs, training=None, mask=None):
        rows = inputs.to_tensor() if isinstance(inputs, tf.RaggedTensor) else inputs
        return super().call(rows, training, mask)


class OwnStep(keras.Model):
    """What a batch is, only its step knows."""

    def train_step(self, data):
        return super().train_step((data["in"], data["out"]))


def test_step_is_traced_once(build_convnet, pictures):
    targets = np.ones([12, 3], "float32")

    def traces(compile_it, train) -> int:
        model, optimizer = build_convnet("float32"), Counted()
        compile_it(model, optimizer)
        train(model)
        return optimizer.traces

    def as_keras(model, optimizer):
        model.compile(optimizer, "mse", metrics=["mae"])

    for train in (
        lambda model: model.fit(pictures, targets, batch_size=6, epochs=2, verbose=0),
        lambda model: model.fit(tf.data.Dataset.from_tensors((pictures, targets)), verbose=0),
        lambda model: [model.train_on_batch(pictures, targets) for _ in range(2)],
    ):
        assert traces(compiled, train) == 1
        assert traces(as_keras, train) == 2


def test_no_batch_is_read_for_building(build_convnet, pictures):
    starts = []

    def batches():
        starts.append(len(starts))
        yield pictures, np.ones([12, 3], "float32")

    specs = tf.TensorSpec([12, 8, 8, 3]), tf.TensorSpec([12, 3])
    dataset = tf.data.Dataset.from_generator(batches, output_signature=specs)
    compiled(build_convnet()).fit(dataset, steps_per_epoch=1, verbose=0)
    assert starts == [0]


def test_what_cannot_be_built_without_a_batch_is_left_to_the_step():
    x, y = np.ones([6, 4], "float32"), np.ones([6, 1], "float32")
    inputs = keras.Input([4])
    outputs = keras.layers.Dense(1)(inputs)
    model = compiled(OwnStep(inputs, outputs))
    assert np.isfinite(model.fit(tf.data.Dataset.from_tensors({"in": x, "out": y}), verbose=0).history["mae"][0])

    ragged = tf.data.Dataset.from_tensors(tuple(map(tf.RaggedTensor.from_tensor, (x, y))))
    model = Rows(inputs, outputs)
    compile_model(
        model, keras.optimizers.Adam(), loss=lambda true, seen: tf.reduce_mean((true.to_tensor() - seen) ** 2)
    )
    assert np.isfinite(model.fit(ragged, verbose=0).history["loss"][0])


@pytest.mark.parametrize("policy", ["float32", *HALVES])
def test_accumulation_in_every_policy_equals_the_larger_batch(policy):
    def train(batch_size, **more):
        model = compiled(regularised(policy, strength=0.0), keras.optimizers.SGD(0.1, clipnorm=0.05), **scale, **more)
        x, y = np.random.default_rng(0).normal(size=[2, 32, 16]).astype("float32")
        model.fit(x, y[:, :1], batch_size=batch_size, shuffle=False, verbose=0)
        return model

    scale = {"initial_scale": 64.0} if policy == "mixed_float16" else {}
    whole, parts = train(8), train(4, gradient_accumulation_steps=2)
    for one, two in zip(whole.get_weights(), parts.get_weights(), strict=True):
        # Gradients of two halves are rounded separately, by 2^-8 in bfloat16, of 4 steps of at most 0.1 * 0.05.
        np.testing.assert_allclose(one, two, atol=4 * 0.1 * 0.05 * (2**-8 if policy != "float32" else 2**-20))
    assert (parts.optimizer.steps_taken, parts.optimizer.scale) == (4, scale.get("initial_scale", 1.0))


@pytest.mark.soak
def test_stock_keras_cannot_fit_on_two_workers():
    # KERAS.md row 3; when it fails, Keras was mended.
    assert all(result["failed"] for result in replicas("stock_fit", "multi_worker"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("distribute", "processes"), [("mirrored", 1), pytest.param("multi_worker", 2, marks=pytest.mark.soak)]
)
def test_fit_on_two_replicas_equals_one_device_in_every_policy(distribute, processes):
    # KERAS.md rows 3, 8 and 9.
    results = replicas("fit", distribute)
    assert len(results) == processes
    assert all(result == results[0] for result in results), "workers differ"
    result = results[0]
    overflow = result.pop("overflow in the forward pass")
    # Two halves of a batch have their gradients rounded separately; float16 has 11 bits, bfloat16 8. Twice a
    # rounding for each of the 6 steps of at most 0.1 * 0.1, with momentum ten times that.
    bits = {"float32": 20, "mixed_float16": 11, "mixed_bfloat16": 8}
    assert len(result) == 4
    for name, about in result.items():
        unit = 2.0 ** -bits[name.split(",")[0]]
        assert about["difference"] < 12 * 0.1 * unit, name
        assert about["equal"], name
        assert about["predicted"] == [4, 3]
        for metric, value in about["one_device"].items():
            assert about["logs"][metric] == pytest.approx(value, rel=12 * 0.1 * unit), (name, metric)
    assert overflow["finite"]
    assert overflow["equal"]
    assert overflow["counters"][1:3] == [5, 1]
