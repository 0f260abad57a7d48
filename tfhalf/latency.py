"""How a runtime answers, and how long it takes: one process each, asked in turn.

Runtimes are timed round by round, each for a moment, so that what disturbs a round disturbs all of them; in the next
round another one begins. The medians over the rounds are what counts. Between its turns a process waits for its stdin.

What a fresh process answers is also what a converted file is judged by, before it is published: `tfhalf.convert`.
"""

import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from tfhalf import bundle

BATCHES = (1, 32)


@dataclasses.dataclass(frozen=True)
class Contender:
    """Something that answers.

    Attributes:
        name: for people.
        kind: as `tfhalf/runtimes.py` takes it.
        path: the file, or the bundle.
        size: bytes on disk.
        tolerance: largest difference to the training model with which it may serve.
    """

    name: str
    kind: str
    path: Path
    size: int
    tolerance: float


@dataclasses.dataclass(frozen=True)
class Row:
    """What was measured of a contender.

    Attributes:
        name, size, tolerance: the contender's.
        max_error: largest difference to the training model, as a share of the largest output (at least 1); None where
            it wasn't run.
        seconds: batch size to the median over the rounds.
        failed: why it can't be run, or "".
    """

    name: str
    size: int
    tolerance: float
    max_error: float | None = None
    seconds: dict[int, float] = dataclasses.field(default_factory=dict)
    failed: str = ""

    @property
    def serves(self) -> bool:
        """Whether it answers, and its answers are the training model's."""
        return not self.failed and self.max_error is not None and self.max_error <= self.tolerance


class Runtime:
    """A process that runs a converted file, or a signature of a SavedModel, and ends with this context.

    Args:
        kind: as `tfhalf/runtimes.py` takes it.
        path: the file, or the folder of a SavedModel.
        cases: name to inputs; the first are those that are timed.

    Raises:
        ExportError: it can't be run; the message says why.
    """

    def __init__(self, kind: str, path: Path, cases: Mapping[str, bundle.Arrays]):
        self._kind = kind
        with contextlib.ExitStack() as stack:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            given = {f"{case}/{name}": array for case, inputs in cases.items() for name, array in inputs.items()}
            np.savez(scratch / "inputs.npz", **given)
            self._log = stack.enter_context(open(scratch / "log", "w+", encoding="utf-8", errors="replace"))
            script, outputs = Path(__file__).with_name("runtimes.py"), scratch / "outputs.npz"
            self._process = stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-P", script, kind, path, scratch / "inputs.npz", outputs],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=self._log,
                    text=True,
                )
            )
            stack.callback(self._process.kill)
            self._answer()
            with np.load(outputs, allow_pickle=False) as file:
                arrays = dict(file)
            self.outputs: dict[str, dict[str, np.ndarray]] = {case: {} for case in cases}
            for key, array in arrays.items():
                case, _, name = key.partition("/")
                self.outputs[case][name] = array
            self._stack = stack.pop_all()

    def __enter__(self) -> "Runtime":
        return self

    def __exit__(self, *_) -> None:
        self._stack.close()

    def seconds(self, batch: int) -> list[float]:
        """Has it compute batches of a size for a moment; returns the time of each.

        Raises:
            ExportError: it can't.
        """
        try:
            os.write(self._process.stdin.fileno(), f"{batch}\n".encode())  # nothing is left to be flushed at the end
        except OSError as error:
            raise self._error() from error
        return self._answer()

    def _answer(self):
        line = self._process.stdout.readline()
        if not line:
            raise self._error()
        return json.loads(line)

    def _error(self) -> bundle.ExportError:
        status = self._process.wait()
        self._log.seek(0)
        reason = bundle.first_line(self._log.read())
        told = f"its process was ended by signal {-status}" if status < 0 else reason
        return bundle.ExportError(f"{self._kind} can't run it: {told}")


def errors(seen: bundle.Arrays, expected: bundle.Arrays) -> dict[str, float]:
    """Returns the largest difference of each expected output, as bundles measure it; infinite for a missing one."""
    return {
        name: bundle.difference(seen[name], array) if name in seen else float("inf") for name, array in expected.items()
    }


def measure(contenders: Sequence[Contender], inputs: bundle.Arrays, expected: bundle.Arrays, rounds: int) -> list[Row]:
    """Measures contenders in turn.

    Args:
        contenders: who takes part.
        inputs: examples, by name; repeated where a batch is larger.
        expected: what the training model made of them.
        rounds: how often each is asked, 1 or more.

    Returns:
        A row for each, in their order.
    """
    rows = [Row(one.name, one.size, one.tolerance) for one in contenders]
    with contextlib.ExitStack() as stack:
        running: dict[int, Runtime] = {}
        for index, one in enumerate(contenders):
            try:
                running[index] = stack.enter_context(Runtime(one.kind, one.path, {"samples": inputs}))
            except bundle.ExportError as error:
                rows[index] = dataclasses.replace(rows[index], failed=str(error))
                continue
            worst = max(errors(running[index].outputs["samples"], expected).values())
            rows[index] = dataclasses.replace(rows[index], max_error=worst)
        times: dict[int, dict[int, list[float]]] = {index: {batch: [] for batch in BATCHES} for index in running}
        for turn in range(rounds):
            for batch in BATCHES:
                order = sorted(running)
                for index in order[turn % len(order) :] + order[: turn % len(order)] if order else []:
                    try:
                        times[index][batch].append(statistics.median(running[index].seconds(batch)))
                    except bundle.ExportError as error:
                        rows[index] = dataclasses.replace(rows[index], failed=f"at batch {batch}: {error}")
                        del running[index]
    for index in running:
        medians = {batch: statistics.median(values) for batch, values in times[index].items()}
        rows[index] = dataclasses.replace(rows[index], seconds=medians)
    return rows


def fastest(rows: Sequence[Row], batch: int) -> Row | None:
    """Returns the fastest at a batch size whose answers are the training model's, or None."""
    return min((row for row in rows if row.serves and row.seconds), key=lambda row: row.seconds[batch], default=None)
