"""Turns of made-up steps whose times are known; pipelines that sleep; models that fail."""

import collections
import itertools
import math
import time

import keras
import pytest
import tensorflow as tf

import tfhalf
from tfhalf import fastest, trial

RULES = trial.Rules(fastest.is_out, fastest.is_decided, fastest.LEAST_ROUNDS, fastest.MOST_ROUNDS)
NEVER = trial.Rules(lambda times, others: False, lambda times: False, 6, 24)


def turns(rules, end=math.inf, **steps):
    """Takes turns; returns what was measured, and who stepped in which round."""
    called, trials = [], {name: trial.Trial() for name in steps}

    def step_of(name):
        def step(turn):
            called.append((turn, name))
            return steps[name](turn)

        return step

    trial.take_turns({name: step_of(name) for name in steps}, trials, end, rules)
    return trials, called


def test_nobody_always_follows_the_same_one():
    trials, called = turns(NEVER, **dict.fromkeys("abc", lambda turn: 1.0))
    assert {name: len(one.seconds) for name, one in trials.items()} == dict.fromkeys("abc", 24)
    orders = ["".join(name for _, name in group) for _, group in itertools.groupby(called, key=lambda pair: pair[0])]
    assert collections.Counter(orders) == dict.fromkeys(map("".join, itertools.permutations("abc")), 4)


def test_ends_when_the_time_is_over_but_not_before_the_fewest_rounds():
    trials, _ = turns(NEVER, end=time.perf_counter(), a=lambda turn: 1.0, b=lambda turn: 1.0)
    assert len(trials["a"].seconds) == 6
    trials, _ = turns(RULES, a=lambda turn: 1.0, b=lambda turn: 0.8)
    assert len(trials["a"].seconds) == len(trials["b"].seconds) == 6  # decided
    trials, _ = turns(RULES, a=lambda turn: 1.0, b=lambda turn: 0.99 + 0.02 * (turn % 2))
    assert len(trials["a"].seconds) == fastest.MOST_ROUNDS


def test_what_is_much_slower_drops_out_and_ends_it_where_one_is_left():
    trials, _ = turns(RULES, a=lambda turn: 1.0, b=lambda turn: 6.0, c=lambda turn: 0.99 + 0.02 * (turn % 2))
    assert len(trials["b"].seconds) == 3
    assert len(trials["c"].seconds) == fastest.MOST_ROUNDS
    trials, _ = turns(RULES, a=lambda turn: 1.0, b=lambda turn: 6.0)
    assert len(trials["a"].seconds) == 3


def test_one_that_fails_leaves_the_others():
    def fails(turn):
        if turn == 2:
            raise tf.errors.ResourceExhaustedError(None, None, "OOM")
        return 1.0

    trials, _ = turns(NEVER, a=lambda turn: 1.0, b=fails, c=lambda turn: 1.0)
    assert trials["b"].failed == trial.CROWDED
    assert [len(trials[name].seconds) for name in "abc"] == [24, 2, 24]
    with pytest.raises(KeyError):
        turns(NEVER, a=lambda turn: {}["x"], b=lambda turn: 1.0)


def test_pipelines_are_timed_from_their_second_batch_on():
    def batches(first, each, number):
        time.sleep(first)
        for _ in range(number):
            yield ()
            time.sleep(each)

    taken, seconds = trial.take_batches(batches(0.5, 0.05, 99), 60.0)
    assert (len(taken), seconds) == (16, pytest.approx(0.05, rel=0.3))
    taken, seconds = trial.take_batches(batches(0.0, 0.3, 99), 2.0)  # a tenth of the time
    assert (len(taken), seconds) == (2, pytest.approx(0.3, rel=0.3))
    assert trial.take_batches(batches(0, 0, 1), 60.0) == ([()], None)


def test_a_policy_that_skips_every_step_fails():
    def build(policy):
        with tfhalf.PrecisionPlan(policy).scope():
            model = keras.Sequential([keras.Input([4]), keras.layers.Dense(1, name="body")])
            model.add(keras.layers.Activation("linear", dtype="float32"))
        tfhalf.compile_model(model, keras.optimizers.SGD(1e-9), loss="mse", initial_scale=2.0**24, min_scale=2.0**24)
        return model

    batches = [(tf.fill([4, 4], 100.0), tf.fill([4, 1], 1e4), None)]
    trials = trial.run(build, ["mixed_bfloat16", "mixed_float16"], batches, 0.1, RULES)
    taken = trials["mixed_float16"].steps
    assert trials["mixed_float16"].failed == f"every one of {taken} steps overflowed and was skipped"
    assert trials["mixed_bfloat16"].failed == ""
    assert trials["mixed_bfloat16"].start_seconds > 0


def test_every_shape_is_warmed_up():
    shapes = []

    class Noting(keras.layers.Layer):
        def call(self, x):
            shapes.append(x.shape[1])
            return tf.reduce_sum(x, 1)

    def build(policy):
        return keras.Sequential([keras.Input([None, 3]), Noting(dtype="float32")])

    batches = [(tf.ones([2, length, 3]), None, None) for length in (5, 7, 5, 9)]
    trials = trial.run(build, ["float32"], batches, 0.1, RULES)
    assert trials["float32"].failed == ""
    assert None in shapes or {5, 7, 9} <= set(shapes)
