"""Finds out what half precision does to a model's gradients, or inside a bundle, or what this machine is good for.

    python -m apps.doctor --hardware
    python -m apps.doctor --app=image.classification --window
    python -m apps.doctor --app=image.classification --window --checkpoint=<a file in runs/demo/checkpoints>
    python -m apps.doctor --saved_model=saved_models/image_classification_mnist_5k/1

`--window` measures which loss scales an app's model bears, on the first batches of its training data: for each variable
the part of its gradient that float16 loses to zero, against the same weights in float32, and where it overflows. It
prints a table and what to give as --initial_scale and --dynamic_growth_steps, and writes window.json and
window.png. The weights are fresh, or a checkpoint's; nothing is trained. Where no loss scale fits, the layer is named
that has to stay in float32, and the line of a plan that does it.

`--saved_model` runs a bundle on its own samples, or on --inputs, and tells which operation inside it overflows, though
what it answers may look fine, and which have the least room left.

`--hardware` prints one page, to be pasted where somebody asks: the instructions of this machine for half precision,
what TensorFlow uses of them, what rates are reached in each dtype (measured, some seconds), and what follows.

Exit status 0: all is well. 1: no loss scale fits, or something overflows. 2: it couldn't be looked at.
"""

import json
import types
from pathlib import Path

import numpy as np
from absl import flags

from apps import any_app, runner
from tfhalf import bundle_watch, hardware, scale_window, training

WELL, TROUBLE = 0, 1
_MODES = ("window", "saved_model", "hardware")
_NEEDS = {"batches": "window", "checkpoint": "window", "output": "window", "inputs": "saved_model"}
_LEAST_ROOM = 10  # operations in the table


def define_flags(values: flags.FlagValues) -> None:
    """Defines this program's own flags."""
    here = {"flag_values": values}
    flags.DEFINE_bool("window", False, "Measure the loss scales that --app's model bears in float16.", **here)
    flags.DEFINE_integer("batches", 2, "Training batches that --window looks at, 1 or more.", 1, **here)
    checkpoint_help = "File in a run's checkpoints/, whose weights --window takes. Default: fresh weights."
    flags.DEFINE_string("checkpoint", None, checkpoint_help, **here)
    flags.DEFINE_string("output", "runs/doctor", "Folder for --window's window.json and window.png.", **here)
    flags.DEFINE_string("saved_model", None, "Version folder of a bundle to watch; instead of --app.", **here)
    flags.DEFINE_bool("hardware", False, "Print what this machine computes natively, and how fast; alone.", **here)
    flags.DEFINE_string("inputs", None, "An .npz file of inputs by name for --saved_model. Default: its own.", **here)


def run(task: runner.Task | None, values: flags.FlagValues, names: list[str]) -> int:
    """Measures or watches, and prints; returns the exit status."""
    require_one_mode(task, values)
    if values.hardware:
        runner.say(str(hardware.inspect_hardware()))
        return WELL
    if task is None:
        return watch(values.saved_model, values.inputs)
    options = runner.options_of(values, names)
    return measure(task, options, values.batches, values.checkpoint, Path(values.output))


def require_one_mode(task: runner.Task | None, values: flags.FlagValues) -> None:
    """Refuses flags that ask for nothing, for several things, or for what has no effect.

    Raises:
        AppError: the flags don't make one of the three commands.
    """
    modes = [name for name in _MODES if values[name].value not in (None, False)]
    if len(modes) != 1:
        raise runner.AppError(
            "give exactly one of --window (with --app), --saved_model=<folder> and --hardware; --help says more"
        )
    (mode,) = modes
    if values.window != (task is not None):
        raise runner.AppError(f"--{mode} {'needs --app=<name>' if values.window else 'and --app exclude each other'}")
    for name, needed in _NEEDS.items():
        if values[name].present and needed != mode:
            raise runner.AppError(f"--{name} has no effect on --{mode}")


def measure(
    task: runner.Task, options: types.SimpleNamespace, batches: int, checkpoint: str | None, output: Path
) -> int:
    """Measures the window of an app's model, prints it and writes it.

    Args:
        task: the app's task.
        options: its parsed flags.
        batches: how many to look at.
        checkpoint: a file in a run's `checkpoints/`, or None.
        output: folder, made if missing.

    Returns:
        The exit status.

    Raises:
        AppError: the model can't be measured, or the folder can't be written.
    """
    _, options, data, model = any_app.load(task, options)
    if checkpoint is not None:
        training.load_weights(model, checkpoint)
    some = list(data.train(0).take(min(batches, data.steps_per_epoch)))
    if len(some) < batches:
        raise runner.AppError(f"--batches={batches} is more than the {len(some)} that {options.dataset} has")
    try:
        window = scale_window.loss_scale_window(model, some)
    except ValueError as error:
        raise runner.AppError(f"{error}; choose another --dtype_policy") from error
    runner.say(str(window))
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / "window.json").write_text(json.dumps(window.to_json(), indent=2, allow_nan=False) + "\n")
        (output / "window.png").write_bytes(window.picture())
    except OSError as error:
        raise runner.AppError(f"--output={output}: {error.strerror}; choose another folder") from error
    runner.say(f"\nwritten to {output}: window.json, window.png")
    return TROUBLE if window.trouble else WELL


def watch(directory: str, inputs: str | None) -> int:
    """Watches a bundle's operations, and prints what overflows, and what has the least room.

    Args:
        directory: the version folder.
        inputs: an .npz file of arrays by name, or None for the bundle's samples.

    Returns:
        The exit status.

    Raises:
        AppError: the inputs can't be read.
        ExportError: the bundle isn't sound, or can't be watched.
    """
    arrays = None
    if inputs is not None:
        try:
            with np.load(inputs, allow_pickle=False) as file:
                arrays = dict(file)
        except (OSError, ValueError, TypeError) as error:  # TypeError: one array, as in an .npy file
            raise runner.AppError(f"--inputs={inputs} is no .npz file of arrays by name: {error}") from error
    operations = bundle_watch.measure_saved_model(directory, arrays)
    runner.say(as_text(operations))
    return TROUBLE if any(one.overflows for one in operations) else WELL


def as_text(operations: list[bundle_watch.Operation]) -> str:
    """Returns what the watch on a bundle found, the overflows first."""
    bad = [one for one in operations if one.overflows]
    lines = [
        f"overflow: {one.layer or '(outside of layers)'}: {one.name} ({one.kind}, {one.dtype}), {one.non_finite} values"
        for one in bad
    ]
    if not bad:
        lines.append(f"none of {len(operations)} operations in half overflows")
    rows = sorted((one for one in operations if one.largest), key=lambda one: one.bits_left)[:_LEAST_ROOM]
    if rows:
        width = max(len(one.layer) for one in rows)
        lines += ["", "least room:", f"{'layer':{width}}  {'largest':>9} {'bits left':>9}  operation"]
        lines += [f"{one.layer:{width}}  {one.largest:9.4g} {one.bits_left:9.1f}  {one.name}" for one in rows]
    return "\n".join(lines)


if __name__ == "__main__":
    any_app.main(define_flags, run)
