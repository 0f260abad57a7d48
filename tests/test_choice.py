"""Models whose policies take a known time, or fail; the share of a pipeline that sleeps; choices kept and found."""

import json
import random
import time

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfhalf
from tfhalf.choice import choose_precision
from tfhalf.fastest import BFLOAT16, FLOAT16, FLOAT32

X, Y = np.ones([8, 16], "float32"), np.ones([8, 4], "float32")
QUICK = {"seconds": 4.0, "optimizer": keras.optimizers.SGD, "accelerate": False}


class Sleeps(keras.layers.Layer):
    """Hands its input on after a time that its dtype decides; what it is given in one of `bad` becomes that number."""

    def __init__(self, seconds, bad, **kwargs):
        super().__init__(**kwargs)
        self.seconds, self.bad = seconds, bad

    def call(self, x):
        value = self.bad.get(self.compute_dtype, 0.0)

        def pause():
            if isinstance(value, Exception):  # TensorFlow makes UnimplementedError, ResourceExhaustedError of them
                raise value
            time.sleep(self.seconds.get(self.compute_dtype, 0.02))
            return np.float32(value)

        return x + tf.cast(tf.ensure_shape(tf.numpy_function(pause, [], tf.float32), []), x.dtype)

    def get_config(self):
        return super().get_config() | {"seconds": self.seconds, "bad": list(self.bad)}


def builder(seconds, bad=None, units=16, depth=1):
    """A function that builds a model whose steps take these times, by dtype, and counts how often it was called."""

    def build():
        build.count += 1
        body = [keras.layers.Dense(units, activation="relu", name=f"body_{index}") for index in range(depth)]
        layers = [keras.Input([16]), *body, Sleeps(seconds, bad or {}, name="sleeps")]
        return keras.Sequential([*layers, keras.layers.Dense(4, dtype="float32", name="head")])

    build.count = 0
    return build


def choose(build, **settings):
    return choose_precision(build, X, Y, "mse", **QUICK | settings)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ({"float32": 0.06, "float16": 0.02, "bfloat16": 0.04}, FLOAT16),
        ({"float32": 0.06, "float16": 0.08, "bfloat16": 0.02}, BFLOAT16),
        ({"float32": 0.02, "float16": 0.05, "bfloat16": 0.05}, FLOAT32),
    ],
)
def test_the_fastest_is_chosen_and_its_time_is_told(seconds, expected):
    choice = choose(builder(seconds))
    assert choice.policy == expected
    assert choice.measurements["kind"] == "training"
    rows = choice.measurements["policies"]
    for dtype, row in zip(("float32", "float16", "bfloat16"), rows.values(), strict=True):
        assert seconds[dtype] < row["median_seconds"] < seconds[dtype] + 0.05
    for name in (FLOAT16, BFLOAT16):
        fraction = rows[name]["median_seconds"] / rows[FLOAT32]["median_seconds"]
        assert rows[name]["ratio"][0] == pytest.approx(fraction, rel=0.2)
    if expected == FLOAT32:
        assert choice.reason.startswith("no half policy took less time than float32 beyond noise: mixed_bfloat16 takes")
    else:
        assert choice.reason.startswith("a step takes 0.")
    (marked,) = [line for line in str(choice).splitlines() if "<- chosen" in line]
    assert marked.startswith(expected)
    assert str(choice).endswith(f"{expected}: {choice.reason}")
    json.dumps(choice.measurements, allow_nan=False)


def test_a_policy_that_fails_is_shown_and_not_chosen():
    seconds = {"float32": 0.04, "float16": 0.01, "bfloat16": 0.01}
    no_kernel = NotImplementedError("there is no kernel\nfor it")
    choice = choose(builder(seconds, {"float16": np.inf, "bfloat16": no_kernel}))
    assert choice.policy == FLOAT32
    rows = choice.measurements["policies"]
    assert rows[FLOAT16]["failed"] == "the loss of step 1 isn't finite"
    assert "UnimplementedError" in rows[BFLOAT16]["failed"]
    assert "failed: the loss" in str(choice)
    assert "mixed_float16 failed (the loss of step 1 isn't finite)" in choice.reason
    with pytest.raises(ValueError, match=r"no policy can be used.*float32: the loss of step 1 isn't finite"):
        choose(builder({}, dict.fromkeys(["float32", "float16"], np.nan)), policies=(FLOAT32, FLOAT16))


def test_a_mistake_of_the_model_is_no_failed_policy():
    with pytest.raises(ZeroDivisionError):
        choose(lambda: 1 / 0)


def test_memory_is_the_reason_where_float32_does_not_fit():
    seconds = {"float32": 0.001, "float16": 0.06, "bfloat16": 0.03}
    large = {"inputs": np.ones([512, 16], "float32"), "targets": np.ones([512, 4], "float32"), "loss": "mse"}
    large |= QUICK | {"seconds": 0.5, "policies": (FLOAT32, BFLOAT16)}
    choice = choose_precision(builder(seconds, units=64, depth=4), **large)
    assert choice.policy == FLOAT32
    needs = {name: row["memory_bytes"] for name, row in choice.measurements["policies"].items()}
    assert needs[BFLOAT16] < needs[FLOAT32]
    limit = (needs[BFLOAT16] + needs[FLOAT32]) // 2
    choice = choose_precision(builder(seconds, units=64, depth=4), **large, memory_limit=limit)
    assert choice.policy == BFLOAT16
    assert choice.reason.startswith("float32 can't be used (memory: a step needs")
    oom = MemoryError("too little")
    choice = choose(builder(seconds, {"float32": oom}), seconds=0.5)
    assert choice.policy == BFLOAT16
    assert choice.reason.startswith("float32 can't be used (memory: the device has too little)")
    choice = choose(builder(seconds, {"float16": oom}), seconds=0.5, policies=(FLOAT32, FLOAT16))
    assert choice.policy == FLOAT32
    assert "mixed_float16 failed (out of memory beside the other models)" in choice.reason


def test_input_bound_training_is_told():
    def slow_batches():
        for _ in range(6):
            time.sleep(0.1)
            yield X, Y

    settings = QUICK | {"loss": "mse", "policies": (FLOAT32,)}
    choice = choose_precision(builder({}), slow_batches(), **settings)
    about = choice.measurements
    assert about["input_seconds"] == pytest.approx(0.1, rel=0.3)
    step = about["policies"][choice.policy]["median_seconds"]
    assert about["input_share"] == pytest.approx(about["input_seconds"] / (about["input_seconds"] + step), rel=1e-6)
    assert about["input_share"] > 0.5
    assert "no dtype can help much" in choice.reason
    fast = tf.data.Dataset.from_tensors((X, Y)).repeat(5)
    choice = choose_precision(builder({"float32": 0.05}), fast, **settings)
    assert choice.measurements["input_share"] < 0.5
    assert "no dtype" not in choice.reason


def test_inference_where_there_is_no_loss():
    choice = choose_precision(builder({"float32": 0.05, "float16": 0.01}), X, seconds=4.0, policies=(FLOAT32, FLOAT16))
    assert (choice.policy, choice.measurements["kind"]) == (FLOAT16, "inference")
    bad = builder({"float32": 0.05}, {"float16": np.inf})
    rows = choose_precision(bad, X, **QUICK | {"policies": (FLOAT32, FLOAT16)}).measurements["policies"]
    assert rows[FLOAT16]["failed"] == "an output isn't finite"


def test_compiled_models_are_taken_as_they_are():
    plain = builder({"float32": 0.02, "float16": 0.05})

    def build():
        model = plain()
        tfhalf.compile_model(model, keras.optimizers.SGD(0.5), loss="mae", initial_scale=64.0)
        return model

    choice = choose_precision(build, X, Y, seconds=4.0, policies=(FLOAT32, FLOAT16))
    assert choice.measurements["kind"] == "training"
    assert choice.policy == FLOAT32


def test_choices_are_kept_and_found_again(tmp_path):
    lines = []
    seconds = {"float32": 0.05, "float16": 0.02, "bfloat16": 0.08}
    build = builder(seconds)
    first = choose(build, cache=tmp_path / "cache", report=lines.append)
    assert (first.is_cached, build.count) == (False, 4)  # one to look at, and three to try
    again = choose(build, cache=tmp_path / "cache")
    assert (again.is_cached, build.count) == (True, 5)
    assert (again.policy, again.reason, again.measurements) == (first.policy, first.reason, first.measurements)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_random_states_are_as_before():
    random.seed(3)
    np.random.seed(4)
    expected = random.random(), np.random.rand()
    random.seed(3)
    np.random.seed(4)
    policy = keras.config.dtype_policy().name
    choose(builder({}), seconds=0.1, policies=(FLOAT32,))
    assert (random.random(), np.random.rand()) == expected
    assert keras.config.dtype_policy().name == policy


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"policies": ("float16",)}, "policies must be some of float32, mixed_float16"),
        ({"seconds": 0}, "seconds must be above 0, got 0"),
        ({"inputs": iter([]), "targets": None}, "inputs gave no batch"),
        ({"inputs": iter([X])}, "an iterable of batches has its own"),
        ({"targets": None}, "loss needs targets"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        choose_precision(builder({}), **{"inputs": X, "targets": Y, "loss": "mse"} | arguments)
