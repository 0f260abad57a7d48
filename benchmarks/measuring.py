"""What every comparison here needs: ratios with their uncertainty, and the facts of the machine.

Two things are timed in turn, round by round, and compared by the ratios within rounds: what disturbs a round disturbs
both. The interval is of the median ratio, by bootstrap over the rounds (Efron 1979) with percentiles: the corrections
of BCa rest on a jackknife, which is inconsistent for a median (Efron & Tibshirani 1993, section 11.6).
"""

import dataclasses
import importlib
import importlib.metadata
import os
import platform

import numpy as np
from scipy import stats

# A load above it before the start: others compute too.
BUSY_LOAD = 0.5
_PACKAGES = ("tensorflow", "keras", "numpy", "torch")


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A median with its 95% confidence interval."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f})"


def median(values) -> Estimate:
    """Estimates the median of what the rounds, two or more, measured."""
    values = np.asarray(values, "float64")
    result = stats.bootstrap((values,), np.median, method="percentile", random_state=0)
    return Estimate(float(np.median(values)), *map(float, result.confidence_interval))


def paired_ratio(numerators, denominators) -> Estimate:
    """Estimates the median of the ratios within rounds."""
    return median(np.asarray(numerators) / np.asarray(denominators))


def task_of(module: str):
    """Returns an app's task, of its module's name.

    Raises:
        AppError: there is no such app.
    """
    from apps import runner  # here: a contender's process needs neither it nor TensorFlow

    try:
        return importlib.import_module(module).TASK
    except (ImportError, AttributeError) as error:
        raise runner.AppError(f"--app={module} is no app ({error}); write --app=apps.image.detection") from error


def load() -> float:
    """The number of processes that compute or wait to, on the average of the last minute."""
    return os.getloadavg()[0]


def warn_if_busy(before: float) -> None:
    """Says so when others computed here just before the start.

    It isn't the same for all: PyTorch's threads (OpenMP) wait for each other by spinning, and were seen to take seven
    times as long beside one other process that computes.
    """
    if before > BUSY_LOAD:
        print(f"warning: load {before:.2f} before the start: numbers on a busy machine don't count", flush=True)


def machine() -> dict[str, object]:
    """The CPU, its cores that this process may use, and its instructions that matter to half precision."""
    from tfhalf import processor  # here: importing tfhalf brings TensorFlow, which PyTorch's process doesn't need

    cpu = processor.this()
    return {"cpu": cpu.name, "cores": cpu.cores, "instructions": list(cpu.instructions)}


def versions() -> dict[str, str]:
    """Versions of Python and of what is compared; a package that isn't installed is left out."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
