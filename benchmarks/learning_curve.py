"""The test metrics of a run after each of its epochs, from its checkpoints.

    python -m apps.image.detection --dataset=deepforest --workdir=runs/trees --keep=1000
    python -m benchmarks.learning_curve --app=apps.image.detection --workdir=runs/trees

Nothing is chosen by these numbers; the epoch that the app took is marked.
"""

import json
import sys
from pathlib import Path

from absl import app, flags

from apps import runner
from benchmarks import measuring
from tfhalf import PrecisionPlan, training


def main() -> None:
    """Runs the program."""
    flags.DEFINE_string("app", None, "Module of the app, as apps.image.detection.", required=True)
    flags.DEFINE_string("workdir", None, "Folder of a run that kept its checkpoints (--keep).", required=True)
    flags.DEFINE_string("data_dir", None, "Folder of data sets. Default: TFDS's, ~/tensorflow_datasets.")
    flags.DEFINE_integer("every", 1, "Epochs between two rows, 1 or more.", 1)
    app.run(lambda argv: sys.exit(runner.exit_code(lambda argv: _run(flags.FLAGS), argv)))


def _run(values: flags.FlagValues) -> None:
    workdir, task = Path(values.workdir), measuring.task_of(values.app)
    try:
        about = json.loads((workdir / "metrics.json").read_text())
        name = about["config"]["task"]
    except (OSError, ValueError, KeyError) as error:
        raise runner.AppError(f"--workdir={workdir} holds no run of an app: {error!r}") from error
    if name != task.name:
        raise runner.AppError(f"--app={values.app}: {workdir} holds a run of {name}")
    paths = sorted((workdir / "checkpoints").glob("epoch-*-step-000000000.npz"))
    if not paths:
        raise runner.AppError(f"--workdir={workdir} holds no checkpoint of a whole epoch; train with --keep=1000")
    options = _options(task, about["config"], values.data_dir)
    data = runner.load(task, options)
    model = runner.build(task, options, data)
    answer = runner.answering(task, model, data)
    rows = {row["epoch"]: row for row in about["epochs"]}
    print("| epoch | loss | validation loss | test " + task.metric + " | other test metrics |\n|---|---|---|---|---|")
    for path in paths:
        epoch = int(path.name.split("-")[1])
        if epoch % values.every and epoch not in (about["best_epoch"], len(rows)):
            continue
        training.load_weights(model, path)
        scores = task.score(answer, data)
        others = ", ".join(
            f"{name} {value:.4f}" for name, value in scores.items() if name not in (task.metric, "total")
        )
        taken = " (taken)" if epoch == about["best_epoch"] else ""
        losses = f"{rows[epoch]['loss']:.3f} | {rows[epoch]['val_loss']:.3f}"
        print(f"| {epoch}{taken} | {losses} | {scores[task.metric]:.4f} | {others} |", flush=True)


def _options(task: runner.Task, config: dict, data_dir: str | None):
    """The flags that made a run, as its metrics.json tells them."""
    values = flags.FlagValues()
    names = runner.define_flags(task, values)
    # A flag that says its default may still be refused, beside one that makes it useless.
    own = {name: value for name, value in config.items() if name in names and value != values[name].default}
    given = [f"--{name}={value}" for name, value in own.items()]
    values(["learning_curve", *given, *([f"--data_dir={data_dir}"] if data_dir else [])])
    options = runner.options_of(values, names)
    options.plan = PrecisionPlan.from_json(config["plan"])
    return options


if __name__ == "__main__":
    main()
