"""A short trial of a model in several policies: real steps on real batches, in turn.

Every policy has a model of its own. In each round each takes one step on the same batch; their order goes through all
permutations, so that none always follows the same other one. What isn't worth measuring further drops out, and the
trial ends when it is decided, after enough rounds, or when the time is over (the fewest rounds are made anyway). What
decides is handed in (`tfhalf.fastest`).

A policy fails where an operation has no kernel, memory runs out, the loss or an output isn't finite, or every step is
skipped; the others go on. The input pipeline is timed alone, from the second batch on, as the first one starts it.
"""

import dataclasses
import gc
import itertools
import re
import time
from collections.abc import Callable, Iterable, Mapping

import keras
import numpy as np
import tensorflow as tf

from tfhalf.footprint import Footprint, footprint, variables_bytes
from tfhalf.optimizer import LossScaleOptimizer

Batch = tuple  # (x, y, sample weight), of tensors or None
Step = Callable[[int], float]
# Steps of each policy before the rounds: the first traces, the next ones fill what is cached.
_WARM_UP = 3
_MOST_BATCHES, _PIPELINE_SHARE = 16, 0.1
_LONGEST_REASON = 200
MEMORY = "memory: "  # begins the reason of a policy that needs more than there is
CROWDED = "out of memory beside the other models"  # is one that might fit alone


class PolicyFailed(Exception):  # noqa: N818 - a result, not a mistake
    """A policy can't be used with this model; the message is the reason."""


@dataclasses.dataclass
class Trial:
    """What was measured of one policy.

    Attributes:
        seconds: of its steps, by round.
        failed: why it can't be used, or "".
        start_seconds: for building, tracing and warming up.
        memory_bytes: that a step needs: a GPU's peak, or what the graph tells (`tfhalf.footprint`).
        kept_bytes, cast_share: as in `footprint.Footprint`; None where the step couldn't be traced.
        odd_sizes: as there.
        steps, skipped: training steps that were taken in all, and those that the loss scale skipped.
    """

    seconds: list[float] = dataclasses.field(default_factory=list)
    failed: str = ""
    start_seconds: float = 0.0
    memory_bytes: int | None = None
    kept_bytes: int | None = None
    cast_share: float | None = None
    odd_sizes: tuple[str, ...] = ()
    steps: int = 0
    skipped: int = 0


@dataclasses.dataclass(frozen=True)
class Rules:
    """What the trial asks between rounds.

    Attributes:
        is_out: times of a policy, times of the first one -> whether it drops out.
        is_decided: policy to times -> whether the trial can end.
        least, most: rounds.
    """

    is_out: Callable[[list[float], list[float]], bool]
    is_decided: Callable[[Mapping[str, list[float]]], bool]
    least: int
    most: int


def take_batches(batches: Iterable[Batch], seconds: float) -> tuple[list[Batch], float | None]:
    """Takes the first batches, and times the pipeline that makes them.

    Args:
        batches: whose first ones are taken; no more than these are asked for.
        seconds: of the whole trial; a small share of it is used here, two batches are taken anyway.

    Returns:
        The batches, and the seconds for one; None where there is only one batch.
    """
    taken, times = [], []
    for batch in itertools.islice(batches, _MOST_BATCHES):
        taken.append(batch)
        times.append(time.perf_counter())
        if len(times) > 1 and times[-1] - times[0] > _PIPELINE_SHARE * seconds:
            break
    return taken, (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None


def run(
    build: Callable[[str], keras.Model],
    policies: Iterable[str],
    batches: list[Batch],
    seconds: float,
    rules: Rules,
    memory_limit: int | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Trial]:
    """Builds a model in each policy, and takes steps in turn.

    Args:
        build: policy to a model. Training steps are measured where it is compiled and the batches have targets, else
            steps of inference.
        policies: the first one is what others are compared with, and is alone in memory when it starts.
        batches: at least one; used again and again.
        seconds: bound on the time in all, about.
        rules: when to stop.
        memory_limit: bytes that a step may need.
        report: is called with a line before each policy.

    Returns:
        Policy to what was measured.
    """
    end = time.perf_counter() + seconds
    trials, steps = {policy: Trial() for policy in policies}, {}
    for policy, trial in trials.items():
        report(f"trying {policy}")
        is_alone = not steps
        start = time.perf_counter()
        try:
            steps[policy] = _start(build(policy), batches, trial, memory_limit)
        except Exception as error:
            trial.failed = _reason(error, is_alone)
        trial.start_seconds = time.perf_counter() - start
        gc.collect()  # a model that failed makes room for the next one
    take_turns(steps, trials, end, rules)
    for trial in trials.values():
        if trial.steps and trial.skipped == trial.steps:
            trial.failed = trial.failed or f"every one of {trial.steps} steps overflowed and was skipped"
    return trials


def take_turns(steps: dict[str, Step], trials: dict[str, Trial], end: float, rules: Rules) -> None:
    """Lets policies take steps in turn until the rules or the time end it, and notes the seconds.

    Args:
        steps: policy to a function of the round's number that takes a step and gives its seconds; emptied of those that
            drop out or fail.
        trials: where it is noted.
        end: of the time, by `time.perf_counter`.
        rules: when to stop.
    """
    first = next(iter(steps), None)
    for turn in range(rules.most):
        orders = list(itertools.permutations(steps))
        for policy in orders[turn % len(orders)]:
            try:
                trials[policy].seconds.append(steps[policy](turn))
            except Exception as error:
                trials[policy].failed = _reason(error, is_alone=len(steps) == 1)
                del steps[policy]
        times = {name: trial.seconds for name, trial in trials.items() if trial.seconds and not trial.failed}
        if first in times:
            for policy in [one for one in steps if one != first and rules.is_out(times[one], times[first])]:
                del steps[policy]
        if len(steps) < 2:
            return
        if turn + 1 >= rules.least and (time.perf_counter() > end or rules.is_decided(times)):
            return


def _reason(error: Exception, is_alone: bool) -> str:
    """Says why a policy failed; raises what is no failure of a policy."""
    if isinstance(error, tf.errors.ResourceExhaustedError | MemoryError):
        return f"{MEMORY}the device has too little" if is_alone else CROWDED
    if isinstance(error, PolicyFailed):
        return str(error)
    if isinstance(error, tf.errors.OpError | TypeError | ValueError | NotImplementedError):
        text = re.sub(r"\x1b\[\d*m", "", str(error))  # Keras' bold
        return f"{type(error).__name__}: {' '.join(text.split())[:_LONGEST_REASON]}"
    raise error


def _start(model: keras.Model, batches: list[Batch], trial: Trial, limit: int | None) -> Step:
    """Warms a model up; returns the function that takes a step."""
    training = model.compiled and batches[0][1] is not None
    if training and not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    traced = _footprint(model, batches[0], training)
    if traced is not None:
        trial.kept_bytes, trial.cast_share, trial.odd_sizes = traced.kept_bytes, traced.cast_share, traced.odd_sizes
        trial.memory_bytes = traced.memory_bytes
        _require_memory(trial, limit)  # now: a CPU out of memory isn't an error but the end
    gpu = tf.config.list_logical_devices("GPU")
    before = tf.config.experimental.get_memory_info("GPU:0")["current"] - _weights_bytes(model) if gpu else 0

    def step(turn: int) -> float:
        batch = batches[turn % len(batches)]
        start = time.perf_counter()
        found = model.train_on_batch(*batch, return_dict=True) if training else model.predict_on_batch(batch[0])
        taken = time.perf_counter() - start
        trial.steps += training
        if isinstance(getattr(model, "optimizer", None), LossScaleOptimizer):
            trial.skipped = model.optimizer.steps_skipped
        values = [found["loss"]] if training else keras.tree.flatten(found)
        if not all(
            np.all(np.isfinite(value)) for value in values if np.issubdtype(np.asarray(value).dtype, np.floating)
        ):
            what = f"the loss of step {trial.steps}" if training else "an output"
            raise PolicyFailed(f"{what} isn't finite")
        return taken

    shapes = {}
    for index, batch in enumerate(batches):
        shapes.setdefault(str(keras.tree.map_structure(lambda value: value.shape, batch, none_is_leaf=False)), index)
    firsts = list(shapes.values())
    for index in range(max(_WARM_UP, len(firsts))):
        if gpu and index == _WARM_UP - 1:
            tf.config.experimental.reset_memory_stats("GPU:0")
        step(firsts[index % len(firsts)])
    if gpu:
        trial.memory_bytes = tf.config.experimental.get_memory_info("GPU:0")["peak"] - before
        _require_memory(trial, limit)
    return step


def _footprint(model: keras.Model, batch: Batch, training: bool) -> Footprint | None:
    try:
        return footprint(model, batch, training)
    except (TypeError, ValueError, AttributeError, NotImplementedError):  # a training step of its own, perhaps
        return None


def _require_memory(trial: Trial, limit: int | None) -> None:
    if limit is not None and trial.memory_bytes > limit:
        raise PolicyFailed(
            f"{MEMORY}a step needs {trial.memory_bytes / 1e6:,.0f} MB or more, of at most {limit / 1e6:,.0f}"
        )


def _weights_bytes(model: keras.Model) -> int:
    variables = {id(v): v for v in [*model.variables, *getattr(getattr(model, "optimizer", None), "variables", ())]}
    return variables_bytes(variables.values())
