"""The comparison of all contenders on one reference network, shared by `benchmarks/training.py` and `inference.py`.

Contenders step in turn, one step each in a round, on the round's fresh random batch; all start from the same weights.
A ratio is of two contenders' seconds within a round. The losses of the first steps must agree with stock Keras' in
float32: who computes something else isn't compared. Exit status 1: losses differ, or a contender other than a compiled
one failed (compiling needs a C++ compiler).
"""

import contextlib
import dataclasses
import importlib.util
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from absl import flags

from benchmarks import batches, chart, contenders, measuring

_REFERENCE = "Keras float32"
_NAMES = [contender.name for contender in contenders.CONTENDERS]
_CHECKED_STEPS = 3
# Of the loss, relative to the reference's, on the first step: float32 sums in other orders; half has 11 and 8
# significand bits. Adam then divides each gradient by its own size, so that where one is rounding noise the sign of its
# update is too: the next steps may differ by as much again, each.
_TOLERANCES = {"float32": 1e-3, "mixed_float16": 5e-3, "mixed_bfloat16": 2e-2}
# Of a core; a contender that waits should use none.
_MOST_IDLE_SHARE = 0.05


@dataclasses.dataclass
class Result:
    """What one contender did.

    Attributes:
        contender: who.
        seconds: of each measured step.
        losses: of each step, warm-up too.
        resident_before_mib: memory with the libraries imported and no network built.
        peak_resident_mib: the most memory that it had.
        idle_share: the most of a core that it used while it waited for a turn.
        failed: one line, or nothing.
        losses_differ: whether its first losses are not the reference's.
    """

    contender: contenders.Contender
    seconds: list[float] = dataclasses.field(default_factory=list)
    losses: list[float] = dataclasses.field(default_factory=list)
    resident_before_mib: float = 0.0
    peak_resident_mib: float = 0.0
    idle_share: float = 0.0
    failed: str = ""
    losses_differ: bool = False


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of both programs."""
    here = {"flag_values": values}
    flags.DEFINE_enum("network", "resnet", batches.NETWORKS, "Reference network.", **here)
    flags.DEFINE_integer("rounds", 30, "Measured rounds, 30 or more for a claim.", 2, **here)
    flags.DEFINE_integer("warmup", 3, "Rounds before them, 1 or more.", 1, **here)
    names_help = f"Some of: {', '.join(_NAMES)}. {_REFERENCE} always runs. Default: all."
    flags.DEFINE_list("contenders", None, names_help, **here)
    flags.DEFINE_string("output", "runs/benchmarks", "Folder of the JSON file, the chart and the log.", **here)


def main(kind: str) -> int:
    """Runs the comparison of a kind of step, "training" or "inference"; returns the exit status."""
    network, rounds, warmup = flags.FLAGS.network, flags.FLAGS.rounds, flags.FLAGS.warmup
    unknown = sorted(set(flags.FLAGS.contenders or []) - set(_NAMES))
    if unknown:
        print(f"error: --contenders: {unknown[0]!r} is none of {', '.join(_NAMES)}", file=sys.stderr)
        return 1
    base = Path(flags.FLAGS.output) / f"{kind}_{network}"
    base.parent.mkdir(parents=True, exist_ok=True)
    load_before = measuring.load()
    measuring.warn_if_busy(load_before)
    chosen = _choose(flags.FLAGS.contenders or _NAMES)
    try:
        with open(f"{base}.log", "w") as log:
            results = _run(kind, network, chosen, warmup, rounds, log)
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    except contenders.ContenderError as error:
        print(f"error: {error}; {base}.log has more", file=sys.stderr)
        return 1
    load = {"before": load_before, "after": measuring.load()}
    about = {"kind": kind, "network": network, "rounds": rounds, "warmup": warmup, "load": load}
    _report(base, about | {"machine": measuring.machine(), "versions": measuring.versions()}, results)
    bad = [one for one in results if one.losses_differ or (one.failed and "compiled" not in one.contender.library)]
    return 1 if bad else 0


def _choose(names: list[str]) -> list[contenders.Contender]:
    chosen = [one for one in contenders.CONTENDERS if one.name in {_REFERENCE, *names}]
    if importlib.util.find_spec("torch") is None and any(one.needs_torch for one in chosen):
        print("PyTorch isn't installed, its contenders are skipped: pip install 'tfhalf[bench]'")
        chosen = [one for one in chosen if not one.needs_torch]
    return chosen


def _run(kind: str, network: str, chosen, warmup: int, rounds: int, log) -> list[Result]:
    """Starts the contenders, lets them step in turn, and ends them whatever happens."""
    results, workers = [Result(contender) for contender in chosen], []
    with tempfile.TemporaryDirectory() as folder:
        weights = f"{folder}/weights.npz"
        _save_weights(network, weights, log)
        try:
            for result in results:
                print(f"starting {result.contender.name}", flush=True)
                workers.append(contenders.Worker(result.contender, kind, network, weights, log))
                with _failure_noted(result):
                    result.resident_before_mib = workers[-1].answer()["resident_before_mib"]
            for index in range(warmup + rounds):
                for result, worker in zip(results, workers, strict=True):
                    if not result.failed:
                        with _failure_noted(result):
                            _note(result, worker.step(index), index >= warmup)
                if index == 0:
                    print("all have taken their first step", flush=True)
        finally:
            for worker in workers:
                worker.stop()
    reference = _reference(results)
    if reference.failed:
        raise contenders.ContenderError(f"{_REFERENCE}: {reference.failed}")
    for result in results:
        result.losses_differ = not result.failed and not _losses_agree(result, reference)
    return results


def _save_weights(network: str, path: str, log) -> None:
    process = contenders.start({"network": network, "save_weights": path}, log)
    try:
        if process.wait():
            raise contenders.ContenderError(f"the first weights: their process ended with status {process.returncode}")
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()


@contextlib.contextmanager
def _failure_noted(result: Result):
    try:
        yield
    except contenders.ContenderError as error:
        result.failed = str(error)
        print(f"{result.contender.name} failed: {error}", flush=True)


def _note(result: Result, answer: dict[str, float], measured: bool) -> None:
    result.losses.append(answer["loss"])
    result.peak_resident_mib = answer["peak_resident_mib"]
    if measured:
        result.seconds.append(answer["seconds"])
        result.idle_share = max(result.idle_share, answer["idle_share"])


def _reference(results: list[Result]) -> Result:
    return next(result for result in results if result.contender.name == _REFERENCE)


def _losses_agree(result: Result, reference: Result) -> bool:
    tolerance = _TOLERANCES[result.contender.policy]
    # Stock loss scaling starts too high for some networks (lstm): a step that it skips is no other work.
    num_steps = 1 if result.contender == contenders.Contender("Keras", "mixed_float16") else _CHECKED_STEPS
    pairs = zip(result.losses[:num_steps], reference.losses, strict=False)
    # Written so that NaN doesn't agree.
    return all(abs(own - other) <= tolerance * step * abs(other) for step, (own, other) in enumerate(pairs, 1))


def _report(base: Path, about: dict, results: list[Result]) -> None:
    """Prints the tables; writes all that was measured, and the chart."""
    machine, load, ratios = about["machine"], about["load"], _ratios_that_matter(results)
    what = f"{about['kind']} of {about['network']}"
    place = f"{machine['cpu']}, {machine['cores']} cores"
    print(f"\n{what}, {about['rounds']} rounds after {about['warmup']} of warm-up; ", end="")
    print(f"load {load['before']:.2f} before, {load['after']:.2f} after")
    print(f"{place}, {' '.join(machine['instructions'])}")
    print(", ".join(f"{name} {version}" for name, version in about["versions"].items()))
    _print_table(results)
    for name, ratio in ratios.items():
        print(f"{name}: {ratio}")
    about |= {
        "ratios": {name: dataclasses.asdict(ratio) for name, ratio in ratios.items()},
        "contenders": {result.contender.name: dataclasses.asdict(result) for result in results},
    }
    Path(f"{base}.json").write_text(json.dumps(about, indent=1) + "\n")
    medians = {name: measuring.median(1000 * np.array(seconds)) for name, seconds in _comparable(results).items()}
    chart.write(f"{base}.png", f"{what}: one step on {place}", medians)
    print(f"wrote {base}.json and {base}.png")


def _print_table(results: list[Result]) -> None:
    print(f"\n| contender | median ms | ratio to {_REFERENCE} (95%) | first loss | last loss | peak resident MiB |")
    print("|---|---|---|---|---|---|")
    reference = _reference(results)
    for result in results:
        name = result.contender.name
        if result.failed:
            print(f"| {name} | failed: {result.failed} | | | | |")
            continue
        milliseconds = 1000 * measuring.median(result.seconds).median
        ratio = "1" if result is reference else measuring.paired_ratio(result.seconds, reference.seconds)
        losses = f"{result.losses[0]:.5f} | {result.losses[-1]:.5f}{' LOSSES DIFFER' if result.losses_differ else ''}"
        print(f"| {name} | {milliseconds:.1f} | {ratio} | {losses} | {result.peak_resident_mib:.0f} |")
    print()
    for result in results:
        if result.idle_share > _MOST_IDLE_SHARE:
            print(f"warning: {result.contender.name} used {result.idle_share:.0%} of a core while it waited")


def _comparable(results: list[Result]) -> dict[str, list[float]]:
    """Seconds of those who did the same work."""
    return {one.contender.name: one.seconds for one in results if not one.failed and not one.losses_differ}


def _ratios_that_matter(results: list[Result]) -> dict[str, measuring.Estimate]:
    """Above 1: the second of the pair is faster."""
    policies = ("float32", "mixed_bfloat16", "mixed_float16")
    pairs = [(f"Keras {policy}", f"tfhalf {policy}") for policy in policies]
    pairs += [(_REFERENCE, f"tfhalf {policy}") for policy in policies[1:]]
    pairs += [("PyTorch float32", "tfhalf float32"), ("PyTorch bfloat16", "tfhalf mixed_bfloat16")]
    seconds = _comparable(results)
    return {
        f"{slow} / {fast}": measuring.paired_ratio(seconds[slow], seconds[fast])
        for slow, fast in pairs
        if slow in seconds and fast in seconds
    }
