"""Many runs of one app, each a process of its own, some at a time; those that are finished stay so.

A run is the app's own command line with `--noexport`, in a folder of its own: it resumes there as every run does. It
is finished when its `metrics.json` has the test's scores, or when it became non-finite, which is a result too.
"""

import dataclasses
import json
import math
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from apps import processes, runner
from tfhalf import checkpoint, processor

# A stopped run saves its state first.
_GRACE_SECONDS = 60.0
_LOG, _METRICS, _DIVERGED = "log.txt", "metrics.json", "diverged.txt"


@dataclasses.dataclass(frozen=True)
class Run:
    """One training to be made.

    Attributes:
        policy: what its folder and its line are called, as "float32".
        seed: of weights, order and augmentation.
        folder: of its own.
        command: program and arguments.
    """

    policy: str
    seed: int
    folder: Path
    command: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Result:
    """What a finished run came to.

    Attributes:
        run: which.
        scores: of the test part; empty where the run became non-finite.
        reason: why it did; else "".
        epochs: metrics of each epoch.
        peak_memory_bytes: largest resident set of its process; 0 where the run became non-finite.
        ended: when its scores were written, seconds since 1970; 0 where the run became non-finite.
    """

    run: Run
    scores: dict[str, float]
    reason: str
    epochs: list[dict[str, float]]
    peak_memory_bytes: int
    ended: float = 0.0

    def is_beside(self, other: "Result") -> bool:
        """Whether the two trained at the same time, most of it: only then their times can be compared."""
        lengths = [sum(epoch["seconds"] for epoch in one.epochs) for one in (self, other)]
        starts = [one.ended - length for one, length in zip((self, other), lengths, strict=True)]
        return min(self.ended, other.ended) - max(starts) > min(lengths) / 2

    @property
    def epoch_seconds(self) -> float:
        """Median time of an epoch and its validation, without the first, which traces; NaN where it is the only one."""
        return float(np.median([epoch["seconds"] for epoch in self.epochs[1:]])) if len(self.epochs) > 1 else math.nan

    @property
    def skipped_steps(self) -> int:
        """Steps that the LossScaleOptimizer skipped."""
        return int(self.epochs[-1].get("skipped_steps", 0)) if self.epochs else 0

    def line(self, metric: str) -> str:
        """Returns what a person reads of it."""
        if self.reason:
            return f"{self.run.policy} seed {self.run.seed}: {self.reason}"
        return (
            f"{self.run.policy} seed {self.run.seed}: {metric} {self.scores[metric]:.4f}, "
            f"{self.epoch_seconds:.1f} s an epoch, {self.peak_memory_bytes / 2**30:.2f} GiB, "
            f"{self.skipped_steps} steps skipped"
        )


def result(run: Run) -> Result | None:
    """Returns what a run came to, None where it isn't finished.

    Raises:
        AppError: its metrics.json can't be read.
    """
    diverged, metrics = run.folder / _DIVERGED, run.folder / _METRICS
    if diverged.exists():
        return Result(run, {}, diverged.read_text(encoding="utf-8"), [], 0)
    if not metrics.exists():
        return None
    try:
        value = json.loads(metrics.read_text(encoding="utf-8"))
        results = value["results"]
        if not results:
            return None
        ended = metrics.stat().st_mtime
        return Result(run, results["scores"]["trained"], "", value["epochs"], results["peak_memory_bytes"], ended)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise runner.AppError(f"{metrics} can't be read ({error!r}); remove {run.folder}") from error


def execute(runs: Sequence[Run], num_processes: int, finished: Callable[[Result], None]) -> None:
    """Makes the runs that aren't finished yet, in their order, some at a time.

    Args:
        runs: all of them.
        num_processes: how many at a time, each with its share of the cores.
        finished: is called with each that finishes.

    Raises:
        AppError: a run failed, but not by becoming non-finite; the others are stopped, and have saved their state.
    """
    share = str(max(1, processor.this().cores // num_processes))
    env = {"TF_NUM_INTRAOP_THREADS": share, "OMP_NUM_THREADS": share, "TF_CPP_MIN_LOG_LEVEL": "2"}
    waiting = [run for run in reversed(runs) if result(run) is None]
    active: dict[subprocess.Popen, Run] = {}
    try:
        while waiting or active:
            while waiting and len(active) < num_processes:
                run = waiting.pop()
                run.folder.mkdir(parents=True, exist_ok=True)
                with open(run.folder / _LOG, "a", encoding="utf-8") as log:
                    active[processes.start(run.command, env, log)] = run
            for run in _ended(active):
                finished(result(run))
            time.sleep(0.1)
    finally:
        processes.stop(list(active), _GRACE_SECONDS)


def _ended(active: dict[subprocess.Popen, Run]) -> Iterator[Run]:
    for process in [process for process in active if process.poll() is not None]:
        run = active.pop(process)
        if process.returncode == runner.DIVERGED:
            reason = _last_line(run.folder / _LOG).removeprefix("error: ")
            checkpoint.replace(run.folder / _DIVERGED, lambda file, reason=reason: file.write(reason.encode()))
        elif process.returncode or result(run) is None:
            log = run.folder / _LOG
            raise runner.AppError(
                f"{run.policy} seed {run.seed} ended with exit status {process.returncode}: {_last_line(log)} ({log}); "
                "the same command goes on with it"
            )
        yield run


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "(it wrote nothing)"
