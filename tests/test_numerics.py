"""The monitor: what it records against numpy, whom it names when overflows are planted, and that it changes nothing."""

import json
import logging
import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

import tfhalf
from tests import planted
from tests.test_optimizer import replicas
from tfhalf import recorder
from tfhalf.numerics import Monitor

ROUNDOFF = 2.0**-11  # float16's


def records(monitor: Monitor, kind: str) -> list[dict]:
    def refuse(word):
        raise ValueError(f"{word} is no JSON")

    file = monitor.log_dir / "numerics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    found = [json.loads(line, parse_constant=refuse) for line in lines]
    return [record for record in found if record["kind"] == kind]


def compiled(layers, inputs=(4,), policy="mixed_float16", optimizer=None, loss="mse", dtype="float32", **settings):
    keras.utils.set_random_seed(1)
    with tfhalf.PrecisionPlan(policy).scope():
        model = keras.Sequential([keras.Input(inputs, dtype=dtype), *layers()])
    tfhalf.compile_model(model, optimizer or keras.optimizers.SGD(0.1), loss=loss, **settings)
    return model


def head(units=2):
    return keras.layers.Dense(units, dtype="float32", name="head")


class Weighted(keras.losses.Loss):
    """Mean squared error times a variable."""

    def __init__(self):
        super().__init__()
        self.factor = tf.Variable(1.0, trainable=False)

    def call(self, y_true, y_pred):
        return tf.reduce_mean((y_true - y_pred) ** 2, -1) * self.factor


@pytest.mark.parametrize("num_steps", [25, pytest.param(100, marks=pytest.mark.soak)])
def test_planted_overflows_are_put_down_to_the_right_layer(num_steps, tmp_path):
    model, plants = planted.build(depth=4)
    loss = Weighted()
    settings = {"initial_scale": 2.0**10, "min_scale": 2.0**10, "max_consecutive_skips": 1000}
    tfhalf.compile_model(model, keras.optimizers.Adam(1e-4), loss=loss, **settings)
    random = np.random.default_rng(3)
    x, y = random.normal(size=[8, 16]).astype("float32"), random.normal(size=[8, 4]).astype("float32")
    x[:, 0] = 1.0
    monitor = Monitor(tmp_path, every=1000)
    monitor.set_model(model)
    expected = []
    for _ in range(num_steps):
        kind, path = random.choice(["forward", "backward", "loss"]), random.choice(sorted(plants))
        if kind == "loss":
            loss.factor.assign(np.inf)
            expected.append(("(loss)", "forward", False))
        else:
            plants[path].plant(kind)
            expected.append((path, kind, kind == "backward"))
        model.train_on_batch(x, y)
        loss.factor.assign(1.0)
        plants[path].plant(None)
    assert model.optimizer.steps_skipped == num_steps
    monitor.close()
    found = records(monitor, "skipped")
    assert [(each["layer"], each["phase"], each["loss_is_finite"]) for each in found] == expected
    assert [each["step"] for each in found] == list(range(1, num_steps + 1))
    assert {each["batch"] for each in found} == {recorder.fingerprint((x, y))}
    assert {each["scale"] for each in found} == {2.0**10}
    before = [each["range_before"] for each in found if each["layer"] != "(loss)"]
    assert all(0 < smallest < largest < 65504 for smallest, largest in before)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("distribute", "more"), [("mirrored", ()), pytest.param("multi_worker", ("--every",), marks=pytest.mark.soak)]
)
def test_replica_whose_part_overflows_is_named(distribute, more):
    results = replicas("monitor", distribute, *more)
    for result in results:
        assert result["same_weights"]
        assert result["equal"]
    expected = [planted for planted in results[0]["planted"] for _ in range(2)]  # two steps each
    found = [[each for each in result["found"] if each[0] != "(elsewhere)"] for result in results]
    for index, some in enumerate(found):
        assert some == [each for each in expected if len(results) == 1 or each[2] == index]
    assert [each for result in results for each in result["evaluated"]] == [["block_1/b", 1]]


def build_mixture():
    """Layers that random numbers, statistics, sparse gradients, masks, loops and added losses come from."""
    keras.utils.set_random_seed(1)
    with tfhalf.PrecisionPlan().scope():
        ids = keras.Input([6], dtype="int32")
        x = keras.layers.Embedding(20, 8, mask_zero=True)(ids)
        x = keras.layers.LSTM(8, return_sequences=True)(x)
        x = keras.layers.MultiHeadAttention(2, 4, dropout=0.1)(x, x)
        x = keras.layers.Conv1D(16, 3, activation="gelu", activity_regularizer="l2")(x)
        x = keras.layers.BatchNormalization()(x)
        x = keras.layers.SpatialDropout1D(0.2)(x)
        x = keras.layers.GlobalAveragePooling1D()(x)
        x = keras.layers.Dense(16, kernel_regularizer="l2")(x)
        shared = keras.layers.Dense(16, activation="relu")
        x = shared(keras.layers.GaussianNoise(0.1)(shared(x)))
        model = keras.Model(ids, keras.layers.Dense(3, dtype="float32")(x))
    tfhalf.accelerate(model)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    settings = {"initial_scale": 2.0**24, "dynamic_growth_steps": 10, "metrics": ["accuracy"]}
    tfhalf.compile_model(model, keras.optimizers.AdamW(1e-3, clipnorm=1.0), loss=loss, **settings)
    return model


@pytest.mark.slow
def test_weights_after_hundred_steps_are_the_same_bits(tmp_path):
    random = np.random.default_rng(0)
    ids, targets = random.integers(0, 20, [200, 6]), random.integers(0, 3, [200])
    states, histories = [], []
    for every in (None, 7):
        model = build_mixture()
        monitor = Monitor(tmp_path, every=every, report=lambda line: None) if every else None
        history = model.fit(
            ids, targets, batch_size=4, epochs=2, verbose=0, callbacks=[monitor] if monitor else [],
            validation_data=(ids[:8], targets[:8]),
        )  # fmt: skip
        states.append([variable.numpy() for variable in [*model.variables, *model.optimizer.variables]])
        histories.append(history.history)
    assert histories[0] == histories[1]
    for one, two in zip(*states, strict=True):
        np.testing.assert_array_equal(one, two)
    assert model.optimizer.batches_seen == 100
    skipped = records(monitor, "skipped")
    assert len(skipped) == model.optimizer.steps_skipped > 3
    assert all(record["layer"] not in ("(elsewhere)", "(data)") for record in skipped)
    assert [record["step"] for record in records(monitor, "statistics")] == list(range(1, 101, 7))


def test_statistics_are_those_of_the_computation(tmp_path):
    x = np.random.default_rng(0).normal(size=[32, 4]).astype("float16").astype("float32")
    y = np.zeros([32, 2], "float32")
    model = compiled(lambda: [keras.layers.Dense(8, "relu", name="body"), head()], initial_scale=2.0**10)
    body, last = ([np.array(v, "float64") for v in layer.get_weights()] for layer in model.layers)
    monitor = Monitor(tmp_path, every=1)
    model.fit(x, y, batch_size=32, callbacks=[monitor], verbose=0)
    (record,) = records(monitor, "statistics")
    hidden = np.maximum(x.astype("float64") @ body[0] + body[1], 0)
    outputs = hidden @ last[0] + last[1]
    d_outputs = 2 * outputs / outputs.size * 2.0**10
    d_hidden = d_outputs @ last[0].T
    d_body = x.T.astype("float64") @ (d_hidden * (hidden > 0)), (d_hidden * (hidden > 0)).sum(0)
    updates = [0.1 * gradient / 2.0**10 for gradient in d_body]
    expected = {"activations": [hidden], "activation_gradients": [d_hidden], "weights": body, "updates": updates}
    expected["weight_gradients"] = d_body
    for kind, arrays in expected.items():
        found = record["layers"]["body"][kind]
        values = np.concatenate([np.ravel(array) for array in arrays])
        assert found["count"] == values.size, kind
        assert found["norm"] == pytest.approx(np.linalg.norm(values), rel=8 * ROUNDOFF), kind
        assert found["maximum"] == pytest.approx(np.max(np.abs(values)), rel=8 * ROUNDOFF), kind
    assert record["layers"]["body"]["activations"]["zero"] == pytest.approx(np.mean(hidden == 0))
    assert record["scale"] == 2.0**10
    assert record["loss"] == pytest.approx(np.mean(outputs**2), rel=8 * ROUNDOFF)


@pytest.mark.parametrize("kind", ["NaN in the data", "input over float16's range", "a sum over its range", "the scale"])
def test_what_is_no_defect_of_a_layer_is_told_apart(kind, tmp_path):
    x, y = np.ones([8, 4], "float32"), np.zeros([8, 2], "float32")
    lines = []
    model = compiled(lambda: [keras.layers.Dense(8, name="body"), head()], initial_scale=2.0**10)
    expected = ("(data)", "forward", "the batch")
    if kind.startswith("NaN"):
        x[3, 1] = np.nan
    elif kind.startswith("input"):
        x[3, 1], expected = 70_000, ("body", "forward", "its input, in its dtype")
    elif kind.startswith("a sum"):
        model.layers[0].kernel.assign(np.full([4, 8], 20_000.0))
        expected = ("body", "forward", "its output")
    else:
        model.optimizer.build(model.trainable_variables)
        model.optimizer.dynamic_scale.assign(2.0**24)
        expected = ("body", "backward", "the gradient of its output")
        y += 1e4
    monitor = Monitor(tmp_path, report=lines.append)
    model.fit(x, y, batch_size=8, callbacks=[monitor], verbose=0)
    (record,) = records(monitor, "skipped")
    assert (record["layer"], record["phase"], record["what"]) == expected
    scale = 2.0**24 if kind == "the scale" else 2.0**10
    assert lines == [f"1 of 1 steps skipped; it began in {expected[0]} ({expected[1]}: {expected[2]}), scale {scale:g}"]


def test_epochs_are_told_in_words_by_the_logger(tmp_path, caplog):
    x, y = np.ones([24, 4], "float32"), np.zeros([24, 2], "float32")
    x[8:, 0] = 70_000.0
    x[16:, 0] = np.inf
    model = compiled(lambda: [keras.layers.Dense(8, name="body"), head()])
    with caplog.at_level(logging.WARNING, "tfhalf"):
        model.fit(x, y, batch_size=8, shuffle=False, callbacks=[Monitor(tmp_path)], verbose=0)
    (line,) = [record.message for record in caplog.records if record.name == "tfhalf"]
    assert line == (
        "2 of 3 steps skipped; 1 began in body (forward: its input, in its dtype), scale 32768; "
        "1 began in (data) (forward: the batch), scale 32768"
    )


@pytest.mark.parametrize("hidden", [True, False])
def test_overflow_in_evaluation_is_named(hidden, tmp_path):
    squash = "tanh" if hidden else "linear"
    model = compiled(lambda: [keras.layers.Dense(8, name="body"), keras.layers.Activation(squash), head()])
    model.layers[0].kernel.assign(np.ones([4, 8]))
    x, y = np.ones([12, 4], "float32"), np.zeros([12, 2], "float32")
    lines = []
    monitor = Monitor(tmp_path, every=2, report=lines.append)
    assert np.isfinite(model.evaluate(x, y, batch_size=4, callbacks=[monitor], verbose=0))
    assert records(monitor, "evaluation") == []
    x[8:] = 60_000.0  # the third batch, in range; the sum isn't
    loss = model.evaluate(x, y, batch_size=4, callbacks=[monitor], verbose=0)
    assert np.isfinite(loss) == hidden
    (record,) = records(monitor, "evaluation")
    assert (record["layer"], record["what"], record["batch"]) == ("body", "its output", 2)
    assert record["range_before"] == [pytest.approx(60_000, rel=ROUNDOFF)] * 2
    assert lines[-1].startswith("evaluation: its output of body isn't finite in 1 of the batches that were looked at")


@pytest.mark.parametrize("case", ["Keras' scaling", "bfloat16", "float32", "XLA", "accumulation", "eager"])
def test_other_ways_to_train(case, tmp_path):
    x, y = np.ones([24, 4], "float32"), np.zeros([24, 2], "float32")
    x[8:16] = 60_000.0

    def layers():
        return [keras.layers.Dense(8, name="body"), head()]

    monitor = Monitor(tmp_path, every=2, report=lambda line: None)
    policy = {"bfloat16": "mixed_bfloat16", "float32": "float32"}.get(case, "mixed_float16")
    settings = {"XLA": {"jit_compile": True}, "accumulation": {"gradient_accumulation_steps": 2}}.get(case, {})
    model = compiled(layers, policy=policy, **settings)
    if case in ("Keras' scaling", "eager"):
        optimizer = keras.optimizers.SGD(0.1)
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer) if case != "eager" else model.optimizer
        model.compile(optimizer, "mse", run_eagerly=case == "eager")
    model.fit(x, y, batch_size=8, shuffle=False, callbacks=[monitor], verbose=0)
    assert [record["step"] for record in records(monitor, "statistics")] == [1, 3]
    skipped = records(monitor, "skipped")
    if case in ("bfloat16", "float32"):
        assert skipped == []
    else:
        assert [(record["step"], record["layer"], record["phase"]) for record in skipped] == [(2, "body", "forward")]


def test_counts_go_on_and_what_is_put_on_a_model_comes_off(tmp_path):
    x, y = np.ones([24, 4], "float32"), np.zeros([24, 2], "float32")
    model = compiled(lambda: [keras.layers.Dense(8), head()])
    own = vars(model).get("train_step")
    first = Monitor(tmp_path / "first", every=2)
    for _ in range(2):
        model.fit(x, y, batch_size=8, callbacks=[first], verbose=0)
    assert [record["step"] for record in records(first, "statistics")] == [1, 3, 5]
    first.close()
    assert vars(model).get("train_step") is own
    second = Monitor(tmp_path / "second", every=2)
    model.fit(x, y, batch_size=8, callbacks=[second], verbose=0)
    assert [record["step"] for record in records(second, "statistics")] == [7, 9]
    tfhalf.compile_model(model, keras.optimizers.SGD(0.1), loss="mse")
    model.fit(x, y, batch_size=8, verbose=0)
    assert len(records(second, "statistics")) == 2


def test_keras_compiling_again_is_noticed(tmp_path):
    x, y = np.ones([16, 4], "float32"), np.zeros([16, 2], "float32")
    model = compiled(lambda: [keras.layers.Dense(8, name="body"), head()])
    monitor = Monitor(tmp_path, report=lambda line: None)
    model.fit(x, y, batch_size=8, callbacks=[monitor], verbose=0)
    model.compile(keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1)), "mse")
    x[8:] = 70_000.0
    model.fit(x, y, batch_size=8, shuffle=False, callbacks=[monitor], verbose=0)
    assert [(record["step"], record["layer"]) for record in records(monitor, "skipped")] == [(2, "body")]


class OwnLoss(keras.Model):
    """A model in Keras' older way: no `training` in `call` and `compute_loss`, no loss in what evaluation returns."""

    def __init__(self):
        super().__init__()
        self.body, self.drop, self.head = keras.layers.Dense(8), keras.layers.Dropout(0.5), head()

    def call(self, x):
        return self.head(self.drop(self.body(x)))

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
        return 3.0 * keras.ops.mean((y - y_pred) ** 2)

    def test_step(self, data):
        return {"error": tf.zeros([])}


def test_models_in_an_older_way_are_replayed_as_keras_steps(tmp_path):
    x, y = np.ones([8, 4], "float32"), np.zeros([8, 2], "float32")
    keras.utils.set_random_seed(1)
    with tfhalf.PrecisionPlan().scope():
        model = OwnLoss()
    model(x)
    model.compile(tfhalf.LossScaleOptimizer(keras.optimizers.SGD(0.1)))
    expected = 3.0 * np.mean(np.square(model(x)))  # without dropout, as Keras steps
    monitor = Monitor(tmp_path)
    logs = model.fit(x, y, batch_size=8, callbacks=[monitor], validation_data=(x, y), verbose=0).history
    (record,) = records(monitor, "statistics")
    assert record["loss"] == pytest.approx(logs["loss"][0]) == pytest.approx(expected, rel=1e-3)


def test_bad_settings_are_refused(tmp_path):
    with pytest.raises(ValueError, match="every must be at least 1, and whole; got 0"):
        Monitor(tmp_path, every=0)

    class Own(keras.Model):
        def train_step(self, data):
            return {}

    inputs = keras.Input([4])
    model = Own(inputs, head()(inputs))
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="has a train_step of its own"):
        model.fit(np.ones([8, 4]), np.ones([8, 2]), callbacks=[Monitor(tmp_path)], verbose=0)


def test_full_disk_is_told_once_and_training_goes_on(tmp_path):
    lines = []
    monitor = Monitor(tmp_path, every=1, report=lines.append)
    (tmp_path / "numerics.jsonl").symlink_to("/dev/full")
    model = compiled(lambda: [keras.layers.Dense(8), head()])
    model.fit(np.ones([24, 4], "float32"), np.zeros([24, 2]), batch_size=8, epochs=2, callbacks=[monitor], verbose=0)
    assert lines == [
        f"{tmp_path}/numerics.jsonl can't be written: No space left on device; the records from here on are lost"
    ]
    assert model.optimizer.batches_seen == 6


def test_tensorboard_opens_on_the_half_precision_page(tmp_path):
    model = compiled(lambda: [keras.layers.Dense(8, name="body"), head()])
    x = np.ones([24, 4], "float32")
    x[:8] = np.inf
    model.fit(
        x, np.zeros([24, 2]), batch_size=8, shuffle=False, verbose=0,
        callbacks=[Monitor(tmp_path, every=1, report=lambda line: None)],
    )  # fmt: skip
    events = EventAccumulator(str(tmp_path), size_guidance={"tensors": 0})
    events.Reload()
    tags = events.Tags()["tensors"]
    layout = layout_pb2.Layout()
    (config,) = events.Tensors("custom_scalars__config__")
    layout.ParseFromString(config.tensor_proto.string_val[0])
    assert layout.category[0].title == "half precision: all layers"
    for category in layout.category:
        for chart in category.chart:
            assert any(re.fullmatch(pattern, tag) for pattern in chart.multiline.tag for tag in tags), chart.title
    assert {f"{kind}/zero/body" for kind in recorder.KINDS} < set(tags)
    assert [event.step for event in events.Tensors("weights/norm/body")] == [1, 2, 3]
    (words,) = events.Tensors("half_precision/skipped")
    assert words.tensor_proto.string_val[0] == b"step 1: (data) (forward: the batch), scale 32768"
    for kind in recorder.KINDS:
        picture = events.Tensors(f"half_precision/exponents/{kind}")[-1].tensor_proto.string_val[2]
        assert tf.io.decode_png(picture).shape[-1] in (3, 4)
