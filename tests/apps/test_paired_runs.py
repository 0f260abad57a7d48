"""Runs that finish, fail, diverge and are taken up again, with a small program in the apps' place."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from apps import paired_runs, runner
from tests.apps.test_launch import wait_until_gone
from tests.conftest import ROOT

# As an app: it writes metrics.json at the end, and notes when it ran.
PROGRAM = """
import json, os, pathlib, signal, sys, time
folder, score, kind = pathlib.Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
(folder / "began").write_text(f"{time.time()} {os.environ['TF_NUM_INTRAOP_THREADS']}")
def save(*_):
    (folder / "saved").write_text("saved")
    sys.exit(130)
signal.signal(signal.SIGTERM, save)
if kind == "fails":
    print("error: the disk is full"); sys.exit(1)
if kind == "diverges":
    print("error: training stopped at step 7: loss is nan"); sys.exit(3)
time.sleep(600 if kind == "hangs" else 0.5)
epochs = [{"epoch": n, "seconds": s, "loss": 1.0 / n, "skipped_steps": n} for n, s in ((1, 9.0), (2, 2.0), (3, 4.0))]
results = {} if kind == "leaves" else {"scores": {"trained": {"accuracy": score}}, "peak_memory_bytes": 2**30}
(folder / "metrics.json").write_text(json.dumps({"epochs": epochs, "results": results}))
(folder / "ended").write_text(str(time.time()))
"""


def run(folder, seed: int, kind: str = "works", policy: str = "float32") -> paired_runs.Run:
    place = folder / policy / f"seed{seed}"
    command = [sys.executable, "-c", PROGRAM, str(place), str(0.9 + seed / 100), kind]
    return paired_runs.Run(policy, seed, place, command)


def test_runs_finish_some_at_a_time_and_finished_ones_stay_so(tmp_path):
    runs, seen = [run(tmp_path, seed) for seed in range(5)], []
    paired_runs.execute(runs, 2, seen.append)
    assert sorted(one.run.seed for one in seen) == [0, 1, 2, 3, 4]
    times = [[float((one.folder / name).read_text().split()[0]) for name in ("began", "ended")] for one in runs]
    at_once = [sum(began <= moment < ended for began, ended in times) for moment, _ in times]
    assert max(at_once) == 2
    # In their order, but that two which are started together may come to their first line in either.
    assert all(one[0] < other[0] for one, other in zip(times, times[2:], strict=False))
    threads = (runs[0].folder / "began").read_text().split()[1]
    assert int(threads) == max(1, len(os.sched_getaffinity(0)) // 2)
    paired_runs.execute([*runs, run(tmp_path, 5)], 2, seen.append)
    assert [one.run.seed for one in seen[5:]] == [5]


def test_result_has_what_the_files_say(tmp_path):
    one = run(tmp_path, 3)
    assert paired_runs.result(one) is None
    paired_runs.execute([one], 1, lambda _: None)
    result = paired_runs.result(one)
    assert result.scores == {"accuracy": 0.93}
    assert result.epoch_seconds == 3.0  # of 2 and 4: the first epoch traces
    assert result.skipped_steps == 3
    os.utime(one.folder / "metrics.json", (0, 5000.0))
    assert paired_runs.result(one).ended == 5000.0
    assert result.line("accuracy") == "float32 seed 3: accuracy 0.9300, 3.0 s an epoch, 1.00 GiB, 3 steps skipped"


def test_run_that_diverges_is_a_result_and_not_made_again(tmp_path):
    runs, seen = [run(tmp_path, 0, "diverges", "mixed_float16"), run(tmp_path, 1)], []
    paired_runs.execute(runs, 1, seen.append)
    assert [one.reason for one in seen] == ["training stopped at step 7: loss is nan", ""]
    assert seen[0].line("accuracy") == "mixed_float16 seed 0: training stopped at step 7: loss is nan"
    paired_runs.execute(runs, 1, seen.append)
    assert len(seen) == 2


@pytest.mark.parametrize(("kind", "status"), [("fails", 1), ("leaves", 0)])
def test_run_that_fails_stops_the_others_which_save(tmp_path, kind, status):
    hanging = run(tmp_path, 0, "hangs")
    with pytest.raises(runner.AppError, match=rf"float32 seed 1 ended with exit status {status}: .*log.txt"):
        paired_runs.execute([hanging, run(tmp_path, 1, kind)], 2, lambda _: None)
    assert (hanging.folder / "saved").exists()
    assert paired_runs.result(hanging) is None


def test_interrupted_runs_save_and_go_on(tmp_path):
    """Ctrl-C reaches the program only; what it started is asked to save."""
    code = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from apps import paired_runs
from tests.apps.test_paired_runs import run
paired_runs.execute([run(Path({str(tmp_path)!r}), seed, "hangs") for seed in (0, 1)], 2, print)
"""
    # Where tests run in a shell's background, Ctrl-C is ignored, and what they start would ignore it too.
    listen = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, preexec_fn=listen)
    folders = [run(tmp_path, seed).folder for seed in (0, 1)]
    deadline = time.monotonic() + 90
    while not all((folder / "began").exists() for folder in folders):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(0.5)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(signal.SIGINT)
    process.wait(60)
    assert wait_until_gone([int(child) for child in children], 10.0)
    assert all((folder / "saved").exists() for folder in folders)
    seen = []
    paired_runs.execute([run(tmp_path, seed) for seed in (0, 1)], 2, seen.append)
    assert len(seen) == 2


def test_damaged_metrics_are_named(tmp_path):
    one = run(tmp_path, 0)
    one.folder.mkdir(parents=True)
    for text in ("{", json.dumps({"epochs": []}), json.dumps({"epochs": [], "results": {"scores": {}}})):
        (one.folder / "metrics.json").write_text(text)
        with pytest.raises(runner.AppError, match=r"metrics.json can't be read .* remove"):
            paired_runs.result(one)
