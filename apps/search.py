"""Finds which layers of an app's model need float32, and writes the plan that trains with them.

    python -m apps.search --app=image.classification
    python -m apps.search --app=text.sentiment --checkpoint=runs/<run>/checkpoints/<file> --tolerance=0.001
    python -m apps.search --app=image.classification --checkpoint=<file> --clearance

The model is an app's, built as the app builds it from the same flags, with fresh weights or a checkpoint's. With half
everywhere, and then with float32 islands, its metric and gradients on batches of the validation part are compared with
those in float32 (`tfhalf.search`): the metric that tells the app's best epoch, where it is compiled, else the loss. The
test part isn't looked at, so that what the app reports at the end stays honest. Nothing is trained.

`--clearance` asks another question: which layers hold numbers beyond float16's range, as weights that were trained in
bfloat16 may (`tfhalf.clearance`).

Into `--output` come plan.json, which any run of the app takes as `--precision_plan`, all that was measured as
search.json, and search.png.

Exit status 0: there is a plan, with islands or without. 1: no plan keeps within the tolerance. 2: it couldn't be
searched.
"""

import json
import shlex
import types
from pathlib import Path

import keras
from absl import flags

from apps import any_app, runner
from tfhalf import checkpoint, clearance, metrics, search, training

FOUND, NO_PLAN = 0, 1
# Of the metric in float32. Measured with fresh weights, rounding alone moves the loss of the convnet on digits by
# 0.0002% and that of a ResNet-20 by 0.3%.
_RELATIVE_TOLERANCE = 0.01
_ONLY_SEARCH = ("tolerance", "gradient_tolerance", "most_evaluations")


def define_flags(values: flags.FlagValues) -> None:
    """Defines this program's own flags."""
    here = {"flag_values": values}
    checkpoint_help = "File in a run's checkpoints/, whose weights are taken. Default: fresh weights."
    flags.DEFINE_string("checkpoint", None, checkpoint_help, **here)
    tolerance_help = "Largest difference of the metric from float32's, 0 or more. Default: 1% of float32's."
    flags.DEFINE_float("tolerance", None, tolerance_help, 0.0, **here)
    gradient_help = "Largest relative error of a layer's weight gradients, above 0."
    flags.DEFINE_float("gradient_tolerance", search.GRADIENT_TOLERANCE, gradient_help, 1e-9, **here)
    flags.DEFINE_integer("batches", 8, "Validation batches that are looked at, 1 or more.", 1, **here)
    most_help = "Sets of islands that are run, 3 or more."
    flags.DEFINE_integer("most_evaluations", search.MOST_EVALUATIONS, most_help, 3, **here)
    flags.DEFINE_bool("clearance", False, "Look at float16's range only, not at the metric.", **here)
    headroom_help = "Bits to float16's end that --clearance wants left, 0 to 16."
    flags.DEFINE_float("headroom_bits", clearance.HEADROOM_BITS, headroom_help, 0.0, 16.0, **here)
    flags.DEFINE_string("output", "runs/search", "Folder for plan.json, search.json and search.png.", **here)


def run(task: runner.Task | None, values: flags.FlagValues, names: list[str]) -> int:
    """Searches, prints and writes; returns the exit status."""
    if task is None:
        raise runner.AppError("give --app=<name>; --help says more")
    for name in _ONLY_SEARCH if values.clearance else ("headroom_bits",):
        if values[name].present:
            raise runner.AppError(f"--{name} has no effect {'on' if values.clearance else 'without'} --clearance")
    options = runner.options_of(values, names)
    if options.precision_plan is not None:
        raise runner.AppError("--precision_plan has no effect here: a search starts from half everywhere; leave it out")
    if options.plan is not None and not options.plan.computes_in_half:
        raise runner.AppError("--dtype_policy=float32 has nothing in half; choose mixed_float16 or mixed_bfloat16")
    task, options, batches, model = load(task, options, values.batches, values.checkpoint)
    try:
        if values.clearance:
            found = clearance.range_clearance(model, batches, headroom_bits=values.headroom_bits)
        else:
            found = searched(task, options, model, batches, values)
    except search.NoPlanError as error:
        runner.say(f"no plan: {error}")
        return NO_PLAN
    except ValueError as error:
        raise runner.AppError(str(error)) from error
    runner.say(str(found))
    write(found, Path(values.output))
    runner.say(f"\nwritten to {values.output}: plan.json, search.json, search.png; to train with it:")
    runner.say(f"  {command(values, names, options)}")
    return FOUND


def load(
    task: runner.Task, options: types.SimpleNamespace, number: int, weights: str | None
) -> tuple[runner.Task, types.SimpleNamespace, list, keras.Model]:
    """Loads the first validation batches and the model.

    Args:
        task: the app's task.
        options: its parsed flags.
        number: of batches.
        weights: a file in a run's `checkpoints/`, or None.

    Returns:
        The task and the flags as the task chose them, the batches, the model.

    Raises:
        AppError: there are fewer batches.
        TrainingError: the file is of another model, or damaged.
    """
    task, options, data, model = any_app.load(task, options)
    if weights is not None:
        training.load_weights(model, weights)
    batches = list(data.validation.take(number))
    if not batches:
        raise runner.AppError(f"{options.dataset} has no validation examples")
    return task, options, batches, model


def searched(task, options, model: keras.Model, batches: list, values: flags.FlagValues) -> search.Search:
    """Searches with the metric that the app chooses its best epoch by, and reports each evaluation."""
    metric = metric_of(task, options)
    name = metric if isinstance(metric, str) else metric.name
    tolerance = values.tolerance
    if tolerance is None:
        tolerance = _RELATIVE_TOLERANCE * abs(metrics.in_float32(model, batches, metric))
        if not tolerance < float("inf"):
            raise ValueError(f"{name} isn't finite in float32 either: there is nothing to keep")
    runner.say(
        f"{task.name} on {options.dataset}: {name} of {len(batches)} validation batches may move by {tolerance:.3g}"
    )
    limits = {"gradient_tolerance": values.gradient_tolerance, "most_evaluations": values.most_evaluations}
    return search.find_islands(model, batches, metric, tolerance, report=runner.say, **limits)


def metric_of(task: runner.Task, options: types.SimpleNamespace) -> metrics.Metric:
    """Returns the metric that tells the app's best epoch, if it is one of those it trains with; else the loss."""
    wanted = (task.monitor or "val_loss").removeprefix("val_")
    return next((one for one in task.build_metrics(options) if one.name == wanted), "loss")


def write(found: search.Search | clearance.Clearance, output: Path) -> None:
    """Writes plan, numbers and picture, each whole or not at all.

    Raises:
        AppError: the folder can't be written.
    """
    files = {
        "plan.json": json.dumps(found.plan.to_json(), indent=2).encode() + b"\n",
        "search.json": json.dumps(found.to_json(), indent=2, allow_nan=False).encode() + b"\n",
        "search.png": found.picture(),
    }
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            checkpoint.replace(output / name, lambda file, content=content: file.write(content))
    except OSError as error:
        raise runner.AppError(f"--output={output}: {error.strerror}; choose another folder") from error


def command(values: flags.FlagValues, names: list[str], options: types.SimpleNamespace) -> str:
    """Returns the command line that trains with the plan, with the app's flags as they were given."""
    given = [name for name in names if name in options.given and name != "dtype_policy"]
    told = [values[name].serialize() for name in given]
    plan = f"--precision_plan={Path(values.output) / 'plan.json'}"
    return shlex.join([".venv/bin/python", "-m", f"apps.{values.app}", plan, *told])


if __name__ == "__main__":
    any_app.main(define_flags, run)
