"""Workers that fail, are killed or interrupted, and a launcher that dies."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT, run_module

PROBING = ["apps.launch", "--grace_seconds=1", "tests.replicas", "--case=probing", "--every"]


def start(*arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def workers_of(launcher: subprocess.Popen, count: int = 2) -> list[int]:
    """Process numbers of a launcher's workers, by index, once they have begun to compute."""
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        busy = [pid for pid in children if int(Path(f"/proc/{pid}/stat").read_text().rsplit(")")[1].split()[11]) > 500]
        if len(busy) == count:
            return sorted(int(pid) for pid in busy)
        time.sleep(0.2)
    raise AssertionError("the workers didn't begin")


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_until_gone(pids: list[int], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not all(map(gone, pids)):
        time.sleep(0.1)
    return all(map(gone, pids))


def test_program_that_fails_is_the_reason():
    result = run_module("apps.launch", "--num_workers=3", "json.tool", "--none")
    assert result.returncode == 2
    assert re.search(r"^\[[012]\] usage: .*json\.tool", result.stdout, re.MULTILINE)
    assert re.fullmatch(
        r"error: worker [012] ended with exit status 2; all workers are stopped\n",
        result.stderr,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: name the program after the flags, as in: python -m apps.launch"),
        (["--num_workers=2", "--", "--dataset=x"], "error: name the program after the flags"),
        (["json.tool", "--distribute", "none"], "error: --distribute: the workers get --distribute=multi_worker"),
        (["json.tool", "--distribute=none"], "error: --distribute=none: the workers get --distribute=multi_worker"),
        (["--num_workers=1", "json.tool"], "num_workers"),
    ],
)
def test_bad_calls_are_explained(arguments, message):
    result = run_module("apps.launch", *arguments)
    assert result.returncode == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_killed_worker_ends_all_with_its_reason():
    # KERAS.md row 2: without that, the other worker waits for it in a collective operation.
    launcher = start(*PROBING)
    workers = workers_of(launcher)
    os.kill(workers[1], signal.SIGKILL)
    begin = time.monotonic()
    printed, _ = launcher.communicate(timeout=60)
    assert time.monotonic() - begin < 60
    assert launcher.returncode == 128 + signal.SIGKILL
    assert re.search(r"error: worker 1 was killed by SIGKILL; the same command goes on; all workers", printed)
    assert wait_until_gone(workers, 1)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.soak)])
def test_interrupted_launcher_stops_all(number):
    launcher = start(*PROBING)
    workers = workers_of(launcher)
    launcher.send_signal(number)
    printed, _ = launcher.communicate(timeout=60)
    assert launcher.returncode == 130
    assert "interrupted; the same command goes on; all workers are stopped" in printed
    assert "Traceback" not in printed
    assert wait_until_gone(workers, 1)


@pytest.mark.slow
def test_killed_launcher_leaves_no_orphan():
    launcher = start(*PROBING)
    workers = workers_of(launcher)
    launcher.kill()
    launcher.communicate(timeout=60)
    assert wait_until_gone(workers, 10)


@pytest.mark.slow
@pytest.mark.soak  # three trainings of two processes each; test_optimizer.py compares two workers with one device
def test_two_workers_train_stop_together_and_go_on_to_the_same_result(data_dir, tmp_path):
    flags = [f"--data_dir={data_dir}", "--epochs=2", "--steps_per_epoch=20", "--batch_size=48", "--deterministic"]

    def command(name: str) -> list[str]:
        folders = [f"--workdir={tmp_path}/{name}", f"--saved_model_dir={tmp_path}/{name}_models"]
        return ["apps.launch", "--grace_seconds=60", "apps.image.classification", *flags, *folders]

    whole = run_module(*command("whole"))
    assert whole.returncode == 0, whole.stdout + whole.stderr
    assert "[0] 2 replicas, 24 of a batch's 48 examples each" in whole.stdout
    assert not [line for line in whole.stdout.splitlines() if line.startswith("[1] ") and "Epoch" in line]

    assert len(list((tmp_path / "whole" / "tensorboard").rglob("events*"))) == 3, "not only the chief wrote"

    launcher = start(*command("stopped"))
    for line in launcher.stdout:
        if line.startswith("[0] Epoch 1/2"):
            launcher.send_signal(signal.SIGTERM)
            break
    printed, _ = launcher.communicate(timeout=90)
    assert launcher.returncode == 130, printed
    assert printed.count("interrupted; the state is saved") == 2, "a worker didn't save with the other"
    assert not list(tmp_path.glob("stopped_models/*/*"))

    resumed = run_module(*command("stopped"))
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert re.search(r"\[0\] resuming .* after epoch 1, step \d", resumed.stdout)
    tests = [re.search(r"Test loss: .*", result.stdout)[0] for result in (whole, resumed)]
    assert tests[0] == tests[1]
    best = [(tmp_path / name / "best.npz").read_bytes() for name in ("whole", "stopped")]
    assert best[0] == best[1], "not bit-identical"
    assert len(list(tmp_path.glob("stopped_models/*/1/saved_model.pb"))) == 1
