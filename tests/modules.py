"""Runs `python -m ...` for tests, in a process of its own that begins with TensorFlow imported.

Importing it takes seven seconds of CPU, and `make test` runs dozens of commands. So one process imports what isn't
ours, and each run is forked from it. What differs from a shell's: variables that TensorFlow reads when it is
imported have no effect, what it prints then is lost, and no `atexit` runs. Where that matters, and where tests kill or
interrupt from outside, a process is started plainly.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["tensorflow", "keras", "tensorflow_datasets"])


def run(arguments: list[str], cwd: Path, environment: dict[str, str], timeout: float) -> subprocess.CompletedProcess:
    """Runs a module with its arguments; returns its exit status and what it printed, as text."""
    with tempfile.TemporaryDirectory() as folder:
        printed = [Path(folder, name) for name in ("stdout", "stderr")]
        for path in printed:
            path.touch()
        process = _PROCESSES.Process(target=_run, args=(arguments, cwd, environment, printed))
        process.start()
        try:
            process.join(timeout)
            if process.exitcode is None:
                raise subprocess.TimeoutExpired(arguments, timeout, *(path.read_text() for path in printed))
        finally:
            process.kill()
            process.join()
        return subprocess.CompletedProcess(arguments, process.exitcode, *(path.read_text() for path in printed))


def _run(arguments: list[str], cwd: Path, environment: dict[str, str], printed: list[Path]) -> None:
    for descriptor, path in enumerate((Path(os.devnull), *printed)):
        opened = os.open(path, os.O_WRONLY if descriptor else os.O_RDONLY)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    np.random.seed()  # NumPy's own numbers would be the same in all that are forked
    sys.argv = list(arguments)
    sys.path.insert(0, str(cwd))
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
