"""Processes that a program starts, and that never outlive it."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

# From <linux/prctl.h>.
_PR_SET_PDEATHSIG = 1


def start(command: Sequence[str], env: dict[str, str], stdout) -> subprocess.Popen:
    """Starts a process that Linux kills when this one dies, however it dies.

    Args:
        command: program and arguments.
        env: variables that are added to this process's.
        stdout: as in `subprocess.Popen`; gets the errors too.
    """
    return subprocess.Popen(
        command,
        env=os.environ | env,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # Ctrl-C reaches this program only, which passes it on to all
        preexec_fn=_die_with_parent,
    )


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def stop(processes: Sequence[subprocess.Popen], grace: float) -> None:
    """Asks all to stop at the same time, so that they can save; then kills what is left, and what they started.

    Args:
        processes: which may have ended.
        grace: seconds that they have.
    """
    for process in processes:
        if process.poll() is None:
            _signal(process, signal.SIGTERM)
    end = time.monotonic() + grace
    while time.monotonic() < end and any(process.poll() is None for process in processes):
        time.sleep(0.1)
    for process in processes:  # all before any is waited for, or the others complain of the first one's end
        _signal(process, signal.SIGKILL)
    for process in processes:
        process.wait()


def _signal(process: subprocess.Popen, number: signal.Signals) -> None:
    """Signals a process and what it started, which may outlive it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
