"""Half against float32 for every app: the runs and verdicts of RESULTS.md.

    python -m benchmarks.parity

For each app the pilot runs, then float32, mixed_float16 and mixed_bfloat16 on the same seeds, as `apps.parity` makes
them. Each run adds its line to the last table of `--results` when it is finished, and each study its verdict to the
table between the marks. Then the run of mixed_float16 on seed 0 is exported, and its bundle's dtypes are compared on
the whole test part. The same command goes on where it stopped. Synthesis needs the bundle that
`python -m apps.audio.recognition` publishes. Times stand in the runs' lines only: the two half policies share float32's
runs, so most weren't made side by side. `benchmarks.training` compares times.
"""

import dataclasses
import datetime
import subprocess
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from apps import any_app, inference_parity, paired_runs, parity, parity_report, runner
from benchmarks import measuring
from tfhalf import checkpoint

# Command line and number of seeds: ten where a short run takes two minutes at most on one core. Recognition learns
# commands: a short run of whole sentences learns too little (RESULTS.md).
_STUDIES = [
    (["--app=image.classification"], 10),
    (["--app=text.sentiment"], 10),
    (["--app=text.classification"], 5),
    (["--app=audio.recognition", "--task=keywords"], 10),
    (["--app=image.segmentation"], 5),
    (["--app=audio.enhancement"], 5),
    (["--app=image.detection"], 5),
    (["--app=text.translation"], 5),
    (["--app=audio.synthesis"], 5),
]
_POLICIES = ("mixed_float16", "mixed_bfloat16")
# Heads of the tables between the marks.
_HEADS = {
    "training": [
        "app",
        "half",
        "metric",
        "float32",
        "half's",
        "difference (90%)",
        "margin",
        "verdict",
        "memory",
        "steps skipped",
    ],
    "inference": [
        "app",
        "metric",
        "margin",
        "float32 weights",
        "serving_float32",
        "serving_default",
        "serving_bfloat16",
        "same decisions",
        "verdict",
    ],
}


@dataclasses.dataclass(frozen=True)
class Record:
    """The file that the numbers go to."""

    path: Path

    def add_run(self, app: str, metric: str, one: paired_runs.Result) -> None:
        """Adds a line for a finished run, at the end, unless the file has it."""
        score = one.reason or f"{one.scores[metric]:.5f}"
        key = f"| {app} | {one.run.policy} | {one.run.seed} | {metric} | {score} |"
        if key in self.path.read_text(encoding="utf-8"):
            return
        cost = f"{one.epoch_seconds:.2f} | {one.peak_memory_bytes / 2**30:.2f} | {one.skipped_steps}"
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(f"{key} {cost} | {datetime.date.today()} |\n")

    def set_line(self, table: str, cells: Sequence[str], num_keys: int) -> None:
        """Writes a line between a table's marks, in place of one whose first cells are the same.

        Args:
            table: one of `_HEADS`.
            cells: of the line.
            num_keys: how many of them tell it from others.

        Raises:
            AppError: the file has no marks.
        """
        text = self.path.read_text(encoding="utf-8")
        begin, end = f"<!-- parity {table}: begin -->", f"<!-- parity {table}: end -->"
        if begin not in text or end not in text:
            raise runner.AppError(f"--results={self.path} lacks the lines {begin} and {end}")
        before, _, rest = text.partition(begin)
        inside, _, after = rest.partition(end)
        key = f"| {' | '.join(cells[:num_keys])} |"
        lines = [line for line in inside.strip().splitlines()[2:] if not line.startswith(key)]
        head, ruler = _HEADS[table], ["---"] * len(_HEADS[table])
        rows = [*(f"| {' | '.join(row)} |" for row in (head, ruler)), *sorted([*lines, f"| {' | '.join(cells)} |"])]
        new = "\n".join([f"{before}{begin}", *rows, f"{end}{after}"])
        checkpoint.replace(self.path, lambda file: file.write(new.encode()))


def _verdict(app: str, report: parity_report.Report) -> list[str]:
    verdict = report.verdicts[report.metric]
    told = verdict.kind
    if verdict.more_seeds != 0:
        told += f", {verdict.more_seeds or 'over 1,000'} more seeds"
    return [
        app,
        report.half,
        report.metric,
        *report.means(report.metric),
        f"{verdict.difference:+.4f} ({verdict.low:+.4f} to {verdict.high:+.4f})",
        f"{verdict.margin:.4f}",
        told,
        f"{report.memory:.2f}",
        str(report.skipped_steps),
    ]


def _inference(app: str, found: inference_parity.Inference) -> list[str]:
    scores = [found.trained, found.reference, *(one.scores for one in found.signatures)]
    agreements = [one.agreement for one in found.signatures]
    return [
        app,
        found.metric,
        f"{found.margin:.4g}",
        *(f"{each[found.metric]:.4f}" for each in scores),
        "" if None in agreements else ", ".join(f"{agreement:.2%}" for agreement in agreements),
        ", ".join("equivalent" if one.equivalent else "different" for one in found.signatures),
    ]


def define_flags(values: flags.FlagValues) -> None:
    """Defines this program's flags."""
    here = {"flag_values": values}
    flags.DEFINE_string("results", "RESULTS.md", "File that the lines are added to.", **here)
    flags.DEFINE_string("recogniser", None, "Bundle that synthesis learns from. Default: as the app says.", **here)
    flags.DEFINE_list("apps", [], "Apps to be done, by commas, as image.detection. Default: all.", **here)


def run(values: flags.FlagValues) -> None:
    """Makes all that is missing."""
    measuring.warn_if_busy(measuring.load())
    record = Record(Path(values.results))
    for arguments, seeds in _STUDIES:
        name = " ".join(argument.removeprefix("--app=") for argument in arguments)
        if values.apps and name.split()[0] not in values.apps:
            continue
        for policy in _POLICIES:
            own = [*arguments, f"--dtype_policy={policy}", f"--seeds={seeds}"]
            if "synthesis" in name and values.recogniser:
                own.append(f"--recogniser={values.recogniser}")
            _study(name, own, record)


def _study(name: str, arguments: list[str], record: Record) -> None:
    values = flags.FlagValues()
    parity.define_flags(values)
    argv = ["apps.parity", *arguments]
    task, own = any_app.define_flags(argv, values)
    values(argv)
    options = runner.options_of(values, own)
    study = parity.plan(task, options, values)
    runner.say(f"\n{name}, {study.half}")
    for one in filter(None, map(paired_runs.result, study.runs)):  # a kill may have come before its line
        record.add_run(name, study.metric, one)
    command = ["python -m apps.parity", *arguments]
    report = parity.judge(task, options, study, values, command, lambda one: record.add_run(name, study.metric, one))
    record.set_line("training", _verdict(name, report), num_keys=2)
    if study.half == "mixed_float16":
        bundle = _exported(study)
        record.set_line("inference", _inference(name, inference_parity.compare(task, options, bundle)), num_keys=1)


def _exported(study: parity.Study) -> Path:
    """The bundle of the half run on the first seed; where there is none yet, that run goes on with its export."""
    folder = study.folder / "saved_models"
    if not list(folder.glob("*/1")):
        command = [argument for argument in study.halves[0].command if argument != "--noexport"]
        subprocess.run([*command, f"--saved_model_dir={folder}"], check=True, stdout=subprocess.DEVNULL)
    (bundle,) = folder.glob("*/1")
    return bundle


if __name__ == "__main__":
    runner.start(define_flags, run)
