"""Is half as good as float32, for this app? Trains both over the same seeds, or compares a bundle's dtypes.

    python -m apps.parity --app=image.classification --seeds=5
    python -m apps.parity --app=image.classification --dtype_policy=mixed_bfloat16 --seeds=10
    python -m apps.parity --app=image.classification --saved_model=saved_models/image_classification_mnist_5k/1

**Training**: pilot runs in float32 tell how far the test metric scatters over seeds; two standard deviations are the
margin, written down before any run that is judged. (`--margin` states another.) Then float32 and half (`--dtype_policy`
or `--precision_plan`) are trained on the same seeds and order of data, and two one-sided tests decide
(`tfhalf.parity`): equivalent, different, or undecided, and about how many more seeds would decide. Runs are short ones
of minutes, as the app sets them; `--noshort` makes the app's own length of them, and any flag of the app can be given.
They are processes of their own, `--processes` at a time; each prints a line when it is finished. The same command goes
on after Ctrl-C or a kill. The report lies in `--output`: `<policy>.md`, `.html` and `.json`, curves within.

**Inference** (`--saved_model`, with the app that made it): the bundle's signatures answer the whole test part, and
each is compared with the same weights computed in float32: by the task's metrics, and example by example.

Exit status 0: equivalent. 1: different. 2: it couldn't be found out. 3: undecided.
"""

import dataclasses
import datetime
import hashlib
import json
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from apps import any_app, inference_parity, paired_runs, parity_report, runner
from tfhalf import checkpoint, equivalence

STATUSES = {equivalence.EQUIVALENT: 0, equivalence.DIFFERENT: 1, equivalence.UNDECIDED: 3}
_FIRST_PILOT = 1000  # pilots' seeds aren't among those that are judged
_OURS = ("seed", "workdir", "export", "saved_model_dir", "saved_model_name", "saved_model_version")
_SCALING = {"initial_scale", "dynamic_growth_steps"}
_OF_HALF = {"dtype_policy", "precision_plan", *_SCALING}
_TRAINING_ONLY = ("seeds", "pilot_seeds", "margin", "processes", "short")


@dataclasses.dataclass(frozen=True)
class Study:
    """What is to be found out, and from which runs.

    Attributes:
        app: name of the app.
        metric: the one that decides.
        half: what the half side is called: "mixed_float16", with a digest where a plan or the loss scaling is given.
        pilots, float32, halves: runs; the latter two by the same seeds.
        folder: of all of it.
        settings: what all runs have in common, and what half has for itself; JSON values.
    """

    app: str
    metric: str
    half: str
    pilots: list[paired_runs.Run]
    float32: list[paired_runs.Run]
    halves: list[paired_runs.Run]
    folder: Path
    settings: dict[str, Any]

    @property
    def runs(self) -> list[paired_runs.Run]:
        """All of them in their order: the margin is known before the pairs, and twins run side by side."""
        return [*self.pilots, *(run for pair in zip(self.float32, self.halves, strict=True) for run in pair)]


def define_flags(values: flags.FlagValues) -> None:
    """Defines this program's own flags."""
    here = {"flag_values": values}
    flags.DEFINE_integer("seeds", 5, "Pairs of runs, 2 to 1000: float32 and half on seeds 0, 1, ...", 2, 1000, **here)
    pilot_help = "Runs in float32 on other seeds that the margin comes from, 2 to 1000; none beside --margin."
    flags.DEFINE_integer("pilot_seeds", 5, pilot_help, 2, 1000, **here)
    margin_help = "Largest difference of the metric that doesn't matter, above 0. Default: from the pilot runs."
    flags.DEFINE_float("margin", None, margin_help, 1e-12, **here)
    flags.DEFINE_integer("processes", 2, "Runs at a time, 1 to 64; they share the cores.", 1, 64, **here)
    flags.DEFINE_bool("short", True, "Runs of minutes, as the app sets them; --noshort: its own length.", **here)
    output_help = "Folder of runs and reports; the same command goes on in it. Default: under runs/parity/."
    flags.DEFINE_string("output", None, output_help, **here)
    saved_model_help = "Version folder of a bundle whose dtypes are compared; nothing is trained."
    flags.DEFINE_string("saved_model", None, saved_model_help, **here)


def run(task: runner.Task | None, values: flags.FlagValues, names: list[str]) -> int:
    """Trains or compares, reports; returns the exit status."""
    if task is None:
        raise runner.AppError("name the app, as in --app=image.classification; --help says more")
    options = runner.options_of(values, names)
    given = {flag for flag in _OURS if flag in options.given}
    if given:
        raise runner.AppError(f"--{min(given)} has no effect here: the runs get their own")
    if values.saved_model is not None:
        return _inference(task, options, values)
    study = plan(task, options, values)
    report = judge(task, options, study, values, ["python -m apps.parity", *sys.argv[1:]])
    return STATUSES[report.verdicts[study.metric].kind]


def _inference(task: runner.Task, options: types.SimpleNamespace, values: flags.FlagValues) -> int:
    ignored = [name for name in _TRAINING_ONLY if values[name].present]
    if ignored:
        raise runner.AppError(f"--{ignored[0]} has no effect on --saved_model: nothing is trained")
    found = inference_parity.compare(task, options, Path(values.saved_model))
    runner.say(found.to_markdown())
    folder = Path(values.output or f"runs/parity/{values.app}-inference")
    _write(folder, "inference", found.to_markdown(), found.to_json(), {})
    return STATUSES[equivalence.EQUIVALENT if found.equivalent else equivalence.DIFFERENT]


def plan(task: runner.Task, options: types.SimpleNamespace, values: flags.FlagValues) -> Study:
    """Returns the runs that flags ask for.

    Args:
        task: the app's task.
        options: its parsed flags.
        values: all flags, this program's too.

    Raises:
        AppError: nothing is in half, or flags exclude each other.
    """
    if options.plan is None:
        raise runner.AppError("--dtype_policy=auto: name the half policy that is to be judged")
    if not options.plan.computes_in_half:
        raise runner.AppError("--dtype_policy=float32: that is what half is compared with; choose a half policy")
    if options.distribute != "none":
        raise runner.AppError(f"--distribute={options.distribute} has no effect here: each run is on one device")
    if values.margin is not None and values["pilot_seeds"].present:
        raise runner.AppError("--margin and --pilot_seeds exclude each other: pilot runs are what a margin comes from")
    chosen, _ = runner.chosen(task, options)
    short = chosen.short if values.short else {}
    own = {name: f"--{name}={value}" for name, value in short.items()}
    own |= {name: values[name].serialize() for name in options.given}
    common = [own[name] for name in sorted(set(own) - _OF_HALF)]
    of_half = [own[name] for name in sorted(set(own) & _OF_HALF)] or [f"--dtype_policy={options.plan.default}"]
    half = options.plan.default
    scaling = [own[name] for name in sorted(set(own) & _SCALING)]
    if options.plan.layers or scaling:  # or finished runs of other flags would be taken for these
        half += "-" + _digest([options.plan.to_json(), scaling])
    app = values.app
    folder = Path(values.output or f"runs/parity/{app}-{_digest(common)}")

    def runs(policy: str, own_flags: list[str], seeds: Sequence[int]) -> list[paired_runs.Run]:
        command = [sys.executable, "-m", f"apps.{app}", "--noexport", *common, *own_flags]
        places = {seed: folder / policy / f"seed{seed}" for seed in seeds}
        return [
            paired_runs.Run(policy, seed, place, [*command, f"--seed={seed}", f"--workdir={place}"])
            for seed, place in places.items()
        ]

    pilots = range(_FIRST_PILOT, _FIRST_PILOT + (0 if values.margin is not None else values.pilot_seeds))
    float32 = ["--dtype_policy=float32"]
    return Study(
        app,
        chosen.metric,
        half,
        runs("float32", float32, pilots),
        runs("float32", float32, range(values.seeds)),
        runs(half, of_half, range(values.seeds)),
        folder,
        {"app": app, "flags": common},
    )


def _digest(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def judge(
    task: runner.Task,
    options: types.SimpleNamespace,
    study: Study,
    values: flags.FlagValues,
    command: Sequence[str],
    finished: Callable[[paired_runs.Result], None] = lambda one: None,
) -> parity_report.Report:
    """Makes the runs that are missing, and reports.

    Args:
        task, options, values: as `plan` got them.
        study: as it returned.
        command: that makes the report again.
        finished: is called with each run's result, when it is finished.

    Raises:
        AppError: the folder holds another study, or a run failed, but not by becoming non-finite.
    """
    _require_same(study)
    missing = [run for run in study.runs if paired_runs.result(run) is None]
    if missing:
        chosen, chosen_options = runner.chosen(task, options)
        runner.say(f"{len(study.runs)} runs, {len(missing)} to be made, in {study.folder}")
        runner.load(chosen, chosen_options)  # prepares the data set once, and not in each process
    made = len(study.runs) - len(missing)

    def tell(one: paired_runs.Result) -> None:
        nonlocal made
        made += 1
        runner.say(f"{one.line(study.metric)} ({made} of {len(study.runs)})")
        finished(one)

    paired_runs.execute(study.pilots, values.processes, tell)
    margins = _margins(study, values.margin)
    if missing:
        runner.say(f"margin: {study.metric} {margins['metrics'][study.metric]:.4g} ({margins['source']})")
    paired_runs.execute(study.runs, values.processes, tell)
    pairs = [(paired_runs.result(a), paired_runs.result(b)) for a, b in zip(study.float32, study.halves, strict=True)]
    report = parity_report.Report.of(study.app, study.metric, study.half, pairs, margins, " ".join(command))
    _write(study.folder, study.half, report.to_markdown(f"{study.half}.png"), report.to_json(), report.pictures())
    runner.say("\n" + report.summary())
    runner.say(f"\nwritten to {study.folder}: {study.half}.html, .md, .json")
    return report


def _require_same(study: Study) -> None:
    path = study.folder / "settings.json"
    if before := _read(path):
        if before != study.settings:
            others = " ".join(before["flags"])
            raise runner.AppError(
                f"--output={study.folder} holds runs of other flags ({others}); choose another folder"
            )
        return
    _replace(path, study.settings)


def _margins(study: Study, stated: float | None) -> dict[str, Any]:
    """The margins, as they were first written down."""
    path = study.folder / "margins.json"
    if margins := _read(path):
        before = margins["metrics"][study.metric]
        if before != (before if stated is None else stated) or margins["pilots"] != len(study.pilots):
            raise runner.AppError(
                f"{path} states the margin {before:g}, from {margins['pilots']} pilot runs: it doesn't change once it "
                "is stated; choose another --output"
            )
        return margins
    if stated is not None:
        metrics, source = {study.metric: stated}, "as --margin states"
    else:
        results = [paired_runs.result(run) for run in study.pilots]
        failed = [one for one in results if one.reason]
        if failed:
            raise runner.AppError(f"{failed[0].line(study.metric)}: float32 itself fails; mend that first")
        metrics = parity_report.margins([one.scores for one in results])
        if not metrics[study.metric]:
            raise runner.AppError(f"all pilot runs have the same {study.metric}: state a --margin")
        source = f"two standard deviations of {len(results)} float32 runs on other seeds"
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    margins = {"metrics": metrics, "source": source, "pilots": len(study.pilots), "stated": now}
    _replace(path, margins)
    return margins


def _write(folder: Path, name: str, text: str, value: dict[str, Any], pictures: dict[str, bytes]) -> None:
    page = parity_report.to_html(text, {f"{name}{suffix}": picture for suffix, picture in pictures.items()})
    files = {".md": text.encode(), **pictures, ".html": page.encode()}
    for suffix, content in files.items():
        _put(folder / f"{name}{suffix}", content)
    _replace(folder / f"{name}.json", value)


def _replace(path: Path, value: dict[str, Any]) -> None:
    _put(path, (json.dumps(value, indent=2) + "\n").encode())


def _put(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.replace(path, lambda file: file.write(content))
    except OSError as error:
        raise runner.AppError(f"--output={path.parent}: {error.strerror}; choose another folder") from error


def _read(path: Path) -> dict[str, Any] | None:
    """What `_replace` wrote; None where there is nothing."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise runner.AppError(f"{path} can't be read ({error}); choose another --output") from error


if __name__ == "__main__":
    any_app.main(define_flags, run)
