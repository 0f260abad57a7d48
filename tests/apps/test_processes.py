"""Processes that end with what started them; `apps.launch` and `apps.parity` are tested with theirs."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from apps import processes
from tests.apps.test_launch import wait_until_gone

SLEEPER = "import subprocess, sys; subprocess.run(['sleep', '600'])"


def test_all_are_asked_at_once_and_then_killed_with_what_they_started(tmp_path):
    stubborn = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
    )
    saving = (
        "import pathlib, signal, sys, time\n"
        "def save(*_): pathlib.Path(sys.argv[1]).write_text('saved'); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, save); print('up', flush=True); time.sleep(600)"
    )
    started = [
        processes.start([sys.executable, "-c", code, str(tmp_path / "state")], {}, subprocess.PIPE)
        for code in (stubborn, saving, SLEEPER)
    ]
    for process in started[:2]:
        assert process.stdout.readline() == "up\n"
    time.sleep(0.5)
    (child,) = map(int, Path(f"/proc/{started[2].pid}/task/{started[2].pid}/children").read_text().split())
    begun = time.monotonic()
    processes.stop(started, grace=2.0)
    assert 2.0 <= time.monotonic() - begun < 10.0
    assert [process.returncode for process in started] == [-signal.SIGKILL, 0, -signal.SIGTERM]
    assert (tmp_path / "state").read_text() == "saved"
    assert wait_until_gone([child], 5.0)


def test_they_die_with_what_started_them_however_it_dies():
    code = (
        "import subprocess, sys, time\nfrom apps import processes\n"
        "one = processes.start(['sleep', '600'], {}, subprocess.DEVNULL)\nprint(one.pid, flush=True)\ntime.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    assert wait_until_gone([child], 5.0)


def test_environment_is_added_to():
    code = "import os; print(os.environ['HOME'] == sys.argv[1], os.environ['OURS'])".replace(
        "import os", "import os, sys"
    )
    process = processes.start(
        [sys.executable, "-c", code, os.environ.get("HOME", "")], {"OURS": "yes"}, subprocess.PIPE
    )
    assert process.communicate(timeout=30)[0] == "True yes\n"
