"""Which precision is fastest for this model on this machine: measured, with the reason in plain words.

    choice = tfhalf.choose_precision(build_model, x, y, loss="mse")
    print(choice)                                    # the table and the reason
    with tfhalf.PrecisionPlan(choice.policy).scope(): ...

`tfhalf.trial` takes real steps in each policy, in turn; `tfhalf.fastest` has the rule. A half policy is chosen only
where it took less time than float32 beyond noise, or where float32 can't be used, as it needs more memory than there is
(and then that is said). The reason is made of what was measured: what the machine multiplies natively, how much of the
time the input pipeline takes, what casts write, sizes that don't fill tensor cores, memory.

A choice can be kept in a folder, under a digest of everything that it rests on (`tfhalf.remembered`).
It doesn't look at how good the model becomes (`tfhalf.parity`), nor which layers need float32.
"""

import contextlib
import dataclasses
import datetime
import os
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from tfhalf import acceleration, compilation, fastest, hardware, remembered, trial, twins
from tfhalf.fastest import BFLOAT16, FLOAT16, FLOAT32
from tfhalf.precision import POLICIES, PrecisionPlan, dtype_of

# Of the time that the pipeline and the step take, one after the other: above it the pipeline is the bottleneck.
_INPUT_BOUND = 0.5
_MANY_CASTS = 0.25  # of the bytes that a step writes
_RULES = trial.Rules(fastest.is_out, fastest.is_decided, fastest.LEAST_ROUNDS, fastest.MOST_ROUNDS)


@dataclasses.dataclass(frozen=True)
class Choice:
    """A chosen policy; `str()` of it is the table and the reason.

    Attributes:
        policy: "float32", "mixed_float16" or "mixed_bfloat16".
        reason: why, in plain words, in one line.
        measurements: JSON values: "kind" of step, "rounds", "created" (UTC), "batch" (shapes), "input_seconds" for one
            batch, "input_share" (0 to 1) of input and step, "within_noise" (policies that may be as fast), and
            "policies": each one's `trial.Trial`, with "median_seconds" and "ratio" to float32 (centre, low, high).
        is_cached: whether it was measured by an earlier call.
    """

    policy: str
    reason: str
    measurements: dict[str, Any]
    is_cached: bool = False

    def __str__(self) -> str:
        about = self.measurements
        lines = [f"{about['kind']} steps, batch {about['batch']}, {about['rounds']} rounds, {about['created']}"]
        lines.append(f"{'policy':15} {'ms a step':>10}  {'of float32 (95%)':21} {'MB needed':>10} {'casts':>6}")
        for policy, row in about["policies"].items():
            time = "-" if row["median_seconds"] is None else f"{1e3 * row['median_seconds']:.1f}"
            ratio = str(fastest.Ratio.from_json(row["ratio"])) if row["ratio"] else "1" if policy == FLOAT32 else "-"
            memory = "-" if row["memory_bytes"] is None else f"{row['memory_bytes'] / 1e6:,.0f}"
            casts = "-" if row["cast_share"] is None else f"{row['cast_share']:.0%}"
            mark = "  <- chosen" if policy == self.policy else ""
            failed = f"  failed: {row['failed']}" if row["failed"] else ""
            lines.append(f"{policy:15} {time:>10}  {ratio:21} {memory:>10} {casts:>6}{mark}{failed}".rstrip())
        if about["input_seconds"] is not None:
            lines.append(f"input pipeline alone: {1e3 * about['input_seconds']:.1f} ms a batch")
        return "\n".join([*lines, f"{self.policy}: {self.reason}"])


def choose_precision(
    build_model: Callable[[], keras.Model],
    inputs,
    targets=None,
    loss=None,
    *,
    optimizer: Callable[[], keras.optimizers.Optimizer] = keras.optimizers.Adam,
    accelerate: bool = True,
    policies: Sequence[str] = POLICIES,
    seconds: float = 60.0,
    memory_limit: int | None = None,
    cache: str | os.PathLike | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Choice:
    """Chooses the precision by a short trial of the real model, batch and input pipeline.

    Args:
        build_model: builds the model under the global dtype policy, one for each policy. A compiled model is taken as
            it is; another one gets tfhalf's kernels (`accelerate`) and is compiled by `tfhalf.compile_model`.
        inputs: one batch as the model takes it; or an iterable of batches (a tf.data.Dataset, a generator), each x, or
            (x, y), or (x, y, sample_weight), whose first ones are taken. A list, tuple or dict is one batch.
        targets: of one batch.
        loss: as in `keras.Model.compile`. Without it, and where the model isn't compiled or there are no targets,
            steps of inference are measured.
        optimizer: makes an optimizer for each model that isn't compiled.
        accelerate: whether models that aren't compiled get tfhalf's kernels.
        policies: those that may be chosen.
        seconds: bound on the time, about; six rounds are made anyway.
        memory_limit: bytes that a step may need. Default: as much as there is.
        cache: folder, made if missing, where choices are kept, by machine, model, batch and settings. It can't see code
            that changes while layers' names, settings and shapes stay. Default: none.
        report: is called with each line that a person should read.

    Returns:
        The `Choice`.

    Raises:
        ValueError: an argument is wrong, or the model can be used in none of the policies.

    The random states of Python and numpy are as before afterwards; batches of a generator are used up.
    """
    if not policies or set(policies) - set(POLICIES):
        raise ValueError(f"choose_precision: policies must be some of {', '.join(POLICIES)}, got {policies!r}")
    if not seconds > 0:
        raise ValueError(f"choose_precision: seconds must be above 0, got {seconds}")

    def build(policy: str) -> keras.Model:
        with PrecisionPlan(policy).scope():
            model = build_model()
        if model.compiled:
            return model
        if accelerate:
            acceleration.accelerate(model)
        if loss is not None:
            own = acceleration.accelerate_optimizer(optimizer()) if accelerate else optimizer()
            compilation.compile_model(model, own, loss=loss)
        return model

    with _same_random_states():
        batches, input_seconds = _batches(inputs, targets, loss, seconds)
        store = None
        if cache is not None:
            settings = [sorted(policies), accelerate, memory_limit]
            store = remembered.Store(Path(cache), remembered.key(build, batches[0], settings), report)
            if (kept := store.read()) is not None:
                return Choice(kept["policy"], kept["reason"], kept["measurements"], is_cached=True)
        order = sorted(policies, key=POLICIES.index)
        trials = trial.run(build, order, batches, seconds, _RULES, memory_limit, report)
        choice = _choose(trials, batches[0], input_seconds)
    if store is not None:
        store.write(dataclasses.asdict(choice))
    return choice


def _choose(trials: dict[str, trial.Trial], batch: trial.Batch, input_seconds: float | None) -> Choice:
    """Decides, and says why."""
    times = {policy: one.seconds for policy, one in trials.items() if not one.failed}
    if FLOAT32 in trials and trials[FLOAT32].failed == trial.CROWDED:
        decided = fastest.Fastest(FLOAT32, {}, ())
    elif times:
        decided = fastest.decide(times)
    else:
        reasons = "; ".join(f"{policy}: {one.failed}" for policy, one in trials.items())
        raise ValueError(f"choose_precision: no policy can be used with this model: {reasons}")
    own = times.get(decided.policy)
    step = statistics.median(own) if own else None
    share = input_seconds / (input_seconds + step) if input_seconds is not None and step else None
    rows = {}
    for policy, one in trials.items():
        ratio = decided.ratios.get(policy)
        rows[policy] = dataclasses.asdict(one) | {
            "odd_sizes": list(one.odd_sizes),
            "median_seconds": statistics.median(one.seconds) if one.seconds else None,
            "ratio": ratio and ratio.to_json(),
        }
    measurements = {
        "kind": "training" if any(one.steps for one in trials.values()) else "inference",
        "rounds": max(len(one.seconds) for one in trials.values()),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "batch": ", ".join(f"{value.dtype.name}{list(value.shape)}" for value in keras.tree.flatten(batch[0])),
        "input_seconds": input_seconds,
        "input_share": share,
        "within_noise": list(decided.within_noise),
        "policies": rows,
    }
    return Choice(decided.policy, "; ".join(_reasons(decided, trials, measurements)), measurements)


def _reasons(decided: fastest.Fastest, trials: dict[str, trial.Trial], measurements: dict[str, Any]) -> Iterator[str]:
    """Says why, the weightiest first."""
    policy, ratios = decided.policy, decided.ratios
    halves = [name for name in trials if name != FLOAT32]
    full, found = trials.get(FLOAT32), hardware.inspect_hardware(0)
    if full is not None and full.failed == trial.CROWDED:
        yield "the models of all policies don't fit into memory side by side, so that nothing could be compared"
    elif policy != FLOAT32 and full is not None and full.failed:
        yield f"float32 can't be used ({full.failed})"
    elif policy != FLOAT32 and full is not None:
        yield f"a step takes {ratios[policy]} of float32's time"
    elif ratios:
        told = [f"{name} takes {ratio} of its time" for name, ratio in ratios.items()]
        yield f"no half policy took less time than float32 beyond noise: {', '.join(told)}"
    if decided.within_noise:
        are = "is" if len(decided.within_noise) == 1 else "are"
        yield f"{' and '.join(decided.within_noise)} {are} within noise of {policy}"
    if policy == BFLOAT16 and FLOAT16 in decided.within_noise:
        yield "mixed_bfloat16 has no loss scale to watch"
    yield from (f"{name} failed ({trials[name].failed})" for name in halves if trials[name].failed)
    yield from _causes(policy, trials, found)
    share = measurements["input_share"]
    if share is not None and share > _INPUT_BOUND:
        yield (
            f"the input pipeline alone takes {1e3 * measurements['input_seconds']:.1f} ms a batch, {share:.0%} of the "
            "time of both: it holds up the step, and no dtype can help much"
        )


def _causes(policy: str, trials: dict[str, trial.Trial], found: hardware.Hardware) -> Iterator[str]:
    """What lies behind the times."""
    halves = [name for name in trials if name != FLOAT32]
    native = {name: found.native[dtype_of(name)] for name in halves}
    missing = [dtype_of(name) for name in halves if not native[name]]
    if policy in halves and native[policy]:
        yield f"{dtype_of(policy)} is native here ({native[policy]})"
    elif missing:
        yield f"nothing here is known to multiply {' or '.join(missing)} natively"
    casts = {name: trials[name].cast_share for name in halves if trials[name].cast_share is not None}
    most = max(casts, key=casts.get, default=None)
    if most is not None and casts[most] > _MANY_CASTS and policy != most:
        yield f"casts write {casts[most]:.0%} of all bytes in {most}"
    odd = next((trials[name].odd_sizes for name in halves if trials[name].odd_sizes), ())
    if found.accelerators and odd:
        yield f"{len(odd)} products have sizes that aren't multiples of 8, as {odd[0]}"
    needs, full = trials[policy].memory_bytes, trials[FLOAT32].memory_bytes if FLOAT32 in trials else None
    if policy in halves and needs and full:
        yield f"a step needs {needs / 1e6:,.0f} MB, in float32 {full / 1e6:,.0f}"


def _batches(inputs, targets, loss, seconds: float) -> tuple[list[trial.Batch], float | None]:
    """The first batches as (x, y, sample weight) of tensors, and the seconds that the pipeline takes for one."""
    one = isinstance(inputs, list | tuple | dict) or hasattr(inputs, "shape")
    if one:
        batches, each = [twins.tensors((inputs, targets, None))], None
    elif targets is not None:
        raise ValueError("choose_precision: targets belong to one batch; an iterable of batches has its own")
    else:
        unpacked = (twins.tensors(keras.utils.unpack_x_y_sample_weight(batch)) for batch in inputs)
        batches, each = trial.take_batches(unpacked, seconds)
    if not batches:
        raise ValueError("choose_precision: inputs gave no batch")
    if loss is not None and batches[0][1] is None:
        raise ValueError("choose_precision: loss needs targets, and there are none")
    return batches, each


@contextlib.contextmanager
def _same_random_states() -> Iterator[None]:
    states = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
