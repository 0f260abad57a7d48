"""The command line of apps.parity, its runs, margins, verdicts and statuses; the runs' results are written by hand."""

import dataclasses
import json
import re

import numpy as np
import pytest
from absl import flags

from apps import any_app, parity, runner
from tests.apps import test_paired_runs
from tests.conftest import run_module

SCATTER = np.array([0.001, -0.002, 0.0, 0.002, -0.001])


def parsed(*arguments: str):
    values = flags.FlagValues()
    parity.define_flags(values)
    argv = ["apps.parity", *arguments]
    task, names = any_app.define_flags(argv, values)
    values(argv)
    return task, values, names


def planned(*arguments: str) -> parity.Study:
    task, values, names = parsed("--app=image.classification", *arguments)
    return parity.plan(task, runner.options_of(values, names), values)


def own_flags(run) -> set[str]:
    return set(run.command[3:])


def finish(runs, accuracies, seconds=2.0, skipped=0) -> None:
    """Writes what runs would have left."""
    for run, accuracy in zip(runs, accuracies, strict=True):
        run.folder.mkdir(parents=True, exist_ok=True)
        if np.isnan(accuracy):
            (run.folder / "diverged.txt").write_text("training stopped at step 7: loss is nan")
            continue
        epochs = [{"epoch": n, "seconds": seconds, "val_loss": 1 / n, "skipped_steps": skipped} for n in (1, 2)]
        scores = {"loss": 1 - accuracy, "accuracy": accuracy, "correct": round(1000 * accuracy), "total": 1000}
        results = {"scores": {"trained": scores}, "peak_memory_bytes": 2**30}
        (run.folder / "metrics.json").write_text(json.dumps({"epochs": epochs, "results": results}))


def judged(folder, half, *more: str) -> tuple[int, dict]:
    """Runs the program on five seeds whose scores are given; returns its status and its JSON."""
    arguments = ["--app=image.classification", f"--output={folder}", *more]
    study = planned(*arguments[1:])
    finish(study.pilots, 0.9 + SCATTER[: len(study.pilots)])
    finish(study.float32, 0.9 + SCATTER)
    finish(study.halves, half, seconds=1.0, skipped=2)
    status = parity.run(*parsed(*arguments))
    return status, json.loads((folder / f"{study.half}.json").read_text())


def test_runs_are_the_apps_own_command_lines_and_twins_differ_by_the_policy_only(tmp_path):
    study = planned(
        "--seeds=3", "--pilot_seeds=2", "--initial_scale=1024", f"--output={tmp_path}", "--weight_decay=0.01"
    )
    assert [run.seed for run in study.runs] == [1000, 1001, 0, 0, 1, 1, 2, 2]
    assert study.runs[2:4] == [study.float32[0], study.halves[0]]
    for true, half in zip(study.float32, study.halves, strict=True):
        assert true.command[1:3] == ["-m", "apps.image.classification"]
        assert own_flags(true) - own_flags(half) == {"--dtype_policy=float32", f"--workdir={true.folder}"}
        assert own_flags(half) - own_flags(true) == {"--initial_scale=1024.0", f"--workdir={half.folder}"}
        assert {"--noexport", "--epochs=6", "--weight_decay=0.01", f"--seed={true.seed}"} <= own_flags(true)
    assert len({run.folder for run in study.runs}) == 8
    for run in study.runs:  # what it is given is what the app takes
        values = flags.FlagValues()
        names = runner.define_flags(any_app.task_of("image.classification"), values)
        values(["app", *run.command[3:]])
        assert runner.options_of(values, names).plan.default == ("mixed_float16" if run in study.halves else "float32")


def test_runs_of_other_scaling_are_other_runs(tmp_path):
    plain, scaled, more = (
        planned(f"--output={tmp_path}", *flags) for flags in ([], ["--initial_scale=8"], ["--initial_scale=16"])
    )
    assert plain.half == "mixed_float16"
    assert len({study.halves[0].folder for study in (plain, scaled, more)}) == 3
    assert len({study.float32[0].folder for study in (plain, scaled, more)}) == 1


def test_given_flags_come_before_the_short_ones_and_noshort_leaves_them_out():
    assert "--epochs=9" in own_flags(planned("--epochs=9").runs[0])
    assert not [flag for flag in own_flags(planned("--noshort").runs[0]) if flag.startswith("--epochs")]
    assert planned().folder != planned("--noshort").folder


@pytest.mark.parametrize("app", any_app.names())
def test_every_app_has_a_short_run_of_flags_that_it_knows(app):
    task, values, names = parsed(f"--app={app}")
    study = parity.plan(task, runner.options_of(values, names), values)
    assert task.short, app
    own = flags.FlagValues()
    runner.define_flags(task, own)
    own(["app", *study.halves[0].command[3:]])


def test_a_plan_is_the_half_side(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text('{"default": "mixed_bfloat16", "layers": {"head": "float32"}}')
    study = planned(f"--precision_plan={path}")
    assert re.fullmatch("mixed_bfloat16-[0-9a-f]{8}", study.half)
    assert f"--precision_plan={path}" in own_flags(study.halves[0])
    assert not [flag for flag in own_flags(study.float32[0]) if "plan" in flag]


@pytest.mark.parametrize(
    ("half", "status", "kind"),
    [
        (0.9 + SCATTER[::-1], 0, "equivalent"),
        (0.89 + SCATTER, 1, "different"),
        (0.9 + 4 * SCATTER, 3, "undecided"),
        ([0.9, 0.9, np.nan, 0.9, 0.9], 1, "different"),
    ],
)
def test_verdict_report_and_status(tmp_path, capsys, half, status, kind):
    found, value = judged(tmp_path, np.asarray(half))
    assert found == status
    assert value["verdicts"]["accuracy"]["kind"] == kind
    # 2 * sqrt(sum of squares / 4)
    assert value["margins"]["metrics"]["accuracy"] == pytest.approx(2 * np.sqrt(10 / 4) / 1000)
    printed = capsys.readouterr().out
    assert f"{kind}: half - float32" in printed
    assert "an epoch takes 0.500 times as long" in printed
    assert ("more seeds would decide" in printed) == (kind == "undecided")
    text = (tmp_path / "mixed_float16.md").read_text()
    assert f"**{kind}**" in text
    assert "before the runs that are judged: two standard deviations of 5 float32 runs on other seeds" in text


def test_a_stated_margin_needs_no_pilots_and_does_not_change(tmp_path):
    status, value = judged(tmp_path, 0.9 + 4 * SCATTER, "--margin=0.02")
    assert (status, value["margins"]["source"]) == (0, "as --margin states")
    with pytest.raises(runner.AppError, match=r"states the margin 0.02, from 0 pilot runs: it doesn't change"):
        judged(tmp_path, 0.9 + 4 * SCATTER, "--margin=0.03")
    with pytest.raises(runner.AppError, match="doesn't change"):
        judged(tmp_path, 0.9 + 4 * SCATTER)


def test_margins_are_written_before_a_judged_run_is_made(data_dir, tmp_path):
    task, values, names = parsed("--app=image.classification", f"--data_dir={data_dir}", "--seeds=2", "--pilot_seeds=2")
    options = runner.options_of(values, names)
    study = parity.plan(task, options, values)

    def replaced(runs):
        return [test_paired_runs.run(tmp_path, run.seed, policy=run.policy) for run in runs]

    study = dataclasses.replace(
        study,
        folder=tmp_path,
        pilots=replaced(study.pilots),
        float32=replaced(study.float32),
        halves=replaced(study.halves),
    )
    seen = []
    report = parity.judge(task, options, study, values, ["python"], seen.append)
    assert report.verdicts["accuracy"].kind == "equivalent"
    assert len(seen) == 6
    stated = (tmp_path / "margins.json").stat().st_mtime
    ended = [float((run.folder / "ended").read_text()) for run in study.pilots]
    began = [float((run.folder / "began").read_text().split()[0]) for run in study.float32 + study.halves]
    assert max(ended) <= stated <= min(began)


def test_runs_of_other_flags_are_not_mixed(tmp_path):
    judged(tmp_path, 0.9 + SCATTER)
    with pytest.raises(runner.AppError, match=r"holds runs of other flags .*--epochs=6.*choose another folder"):
        judged(tmp_path, 0.9 + SCATTER, "--epochs=9")


def test_folders_that_cannot_be_used_are_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(runner.AppError, match=r"file/x/settings.json can't be read .*; choose another --output"):
        parity.run(*parsed("--app=image.classification", f"--output={tmp_path}/file/x"))
    with pytest.raises(runner.AppError, match=r"--output=/proc/x: .*; choose another folder"):
        parity.run(*parsed("--app=image.classification", "--output=/proc/x"))
    for name in ("settings.json", "margins.json"):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_text("{")
        with pytest.raises(runner.AppError, match=rf"{name} can't be read .*; choose another --output"):
            judged(folder, 0.9 + SCATTER)


def test_pilots_that_are_all_the_same_or_fail_are_told(tmp_path):
    study = planned(f"--output={tmp_path}", "--pilot_seeds=2")
    finish(study.pilots, [0.9, np.nan])
    finish(study.runs[2:], [0.9] * 10)
    with pytest.raises(runner.AppError, match=r"float32 seed 1001: training stopped .* float32 itself fails"):
        parity.run(*parsed("--app=image.classification", f"--output={tmp_path}", "--pilot_seeds=2"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "name the app"),
        (["--app=image.classification", "--dtype_policy=float32"], "that is what half is compared with"),
        (["--app=image.classification", "--dtype_policy=auto"], "name the half policy"),
        (["--app=image.classification", "--seed=3"], "--seed has no effect"),
        (["--app=image.classification", "--workdir=x"], "--workdir has no effect"),
        (["--app=image.classification", "--distribute=mirrored"], "each run is on one device"),
        (["--app=image.classification", "--margin=1", "--pilot_seeds=3"], "exclude each other"),
        (["--app=image.classification", "--saved_model=x", "--seeds=3"], "--seeds has no effect on --saved_model"),
    ],
)
def test_what_it_refuses(arguments, words):
    with pytest.raises(runner.AppError, match=words):
        parity.run(*parsed(*arguments))


def test_help_says_what_statuses_mean_and_errors_are_status_2(tmp_path):
    result = run_module("apps.parity", "--app=image.nothing")
    assert result.returncode == any_app.FAILED
    assert result.stderr.splitlines()[-1].startswith("error: --app=image.nothing is none of the apps: ")
    assert "Exit status 0: equivalent. 1: different. 2: it couldn't be found out. 3: undecided." in parity.__doc__


@pytest.mark.soak
def test_real_runs_go_on_after_a_kill(data_dir, tmp_path):
    """The real command line, killed twice; what is finished then stays, and the report is that of an unharmed study."""
    import signal
    import subprocess
    import sys
    import time

    from tests.conftest import ROOT

    arguments = ["apps.parity", "--app=image.classification", f"--data_dir={data_dir}", "--seeds=2", "--pilot_seeds=2"]
    arguments += ["--epochs=2", "--steps_per_epoch=12", "--deterministic"]
    whole = run_module(*arguments, f"--output={tmp_path}/whole", timeout=1800)
    assert whole.returncode in parity.STATUSES.values(), whole.stderr
    for seconds in (40, 55):
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments, f"--output={tmp_path}/killed"], cwd=ROOT, stdout=subprocess.DEVNULL
        )
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        process.wait()
    last = run_module(*arguments, f"--output={tmp_path}/killed", timeout=1800)
    assert last.returncode == whole.returncode
    values = [json.loads((tmp_path / name / "mixed_float16.json").read_text()) for name in ("whole", "killed")]
    scores = [[run["scores"] for run in value["runs"]] for value in values]
    assert scores[0] == scores[1]
