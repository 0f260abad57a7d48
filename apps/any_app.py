"""What programs share that work on whichever app `--app` names: its flags, its data, its model as the runner builds it.

An app is named as its module is, without "apps.": `--app=image.classification`. Its flags can be defined only once its
name is known, so the name is read from the command line before the flags are parsed.
"""

import ast
import importlib
import sys
import traceback
import types
from collections.abc import Callable
from pathlib import Path

import keras
from absl import app, flags, logging

from apps import runner

FAILED = 2  # the exit status of a program that couldn't do what it is for
_FOLDER = Path(__file__).parent


def names() -> list[str]:
    """Returns the apps' names: every module in a folder of `apps` that sets TASK. None is imported."""
    found = []
    for path in sorted(_FOLDER.glob("*/*.py")):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        targets = [target for node in body if isinstance(node, ast.Assign) for target in node.targets]
        if any(isinstance(target, ast.Name) and target.id == "TASK" for target in targets):
            found.append(f"{path.parent.name}.{path.stem}")
    return found


def task_of(name: str) -> runner.Task:
    """Returns an app's task.

    Raises:
        AppError: there is no such app; the message lists those that there are.
    """
    if name not in (known := names()):
        raise runner.AppError(f"--app={name} is none of the apps: {', '.join(known)}")
    return importlib.import_module(f"apps.{name}").TASK


def define_flags(argv: list[str], values: flags.FlagValues) -> tuple[runner.Task | None, list[str]]:
    """Defines --app, and the flags of the app that the command line names.

    Args:
        argv: the command line, the program's name first.
        values: where the flags are defined; the program's own are there already.

    Returns:
        The app's task, None where --app isn't given; and the names of its flags.

    Raises:
        AppError: there is no such app.
    """
    about = f"An app, whose flags follow: {', '.join(names())}. Add --help to see its flags."
    flags.DEFINE_string("app", None, about, flag_values=values)
    values.register_key_flag_for_module(argv[0], values["app"])
    name = _named(argv)
    if name is None:
        return None, []
    task = task_of(name)
    return task, runner.define_flags(task, values)


def _named(argv: list[str]) -> str | None:
    """The last --app on the command line, as absl reads it."""
    name = None
    for index, argument in enumerate(argv[1:], 1):
        if argument == "--":
            break
        flag, given, value = argument.partition("=")
        if flag in ("--app", "-app"):
            name = value if given else next(iter(argv[index + 1 :]), "")
    return name


def load(
    task: runner.Task, options: types.SimpleNamespace
) -> tuple[runner.Task, types.SimpleNamespace, runner.Data, keras.Model]:
    """Loads an app's data and builds its compiled model, on one device.

    Args:
        task: the app's task.
        options: its parsed flags, as `runner.options_of` gives them.

    Returns:
        The task and the flags as the task chose them, with a plan, its data, its model.

    Raises:
        AppError: a flag has no effect here, or something that the runner refuses.
    """
    if options.distribute != "none":
        raise runner.AppError(f"--distribute={options.distribute} has no effect here: it is done on one device")
    task, options = runner.chosen(task, options)
    data = runner.load(task, options)
    options = runner.resolve(task, options, data)
    return task, options, data, runner.build(task, options, data)


def main(
    define_own: Callable[[flags.FlagValues], None],
    run: Callable[[runner.Task | None, flags.FlagValues, list[str]], int],
    argv: list[str] | None = None,
) -> None:
    """Runs a program that works on whichever app is named, and ends the process.

    Args:
        define_own: defines the program's own flags.
        run: the app's task (None where --app isn't given), the parsed flags and the names of the app's -> exit status.
        argv: the command line, the program's name first. Default: the process's.

    The exit status is what `run` returns, or FAILED where it can't: after an error, whatever it is, and bad flags.
    """
    argv, values = argv or sys.argv, flags.FLAGS
    logging.set_verbosity(logging.WARNING)
    define_own(values)
    task, own, status = None, [], FAILED

    def parse(arguments: list[str]) -> list[str]:
        nonlocal task, own
        try:
            task, own = define_flags(arguments, values)
            asks_for_help = any(one.lstrip("-").startswith("help") for one in arguments[1:] if one.startswith("-"))
            return app.parse_flags_with_usage(arguments) if asks_for_help else values(arguments)
        except (flags.Error, runner.AppError) as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            sys.exit(FAILED)

    def run_once(arguments: list[str]) -> None:
        nonlocal status
        if len(arguments) > 1:
            raise runner.AppError(f"unexpected argument {arguments[1]!r}: every setting is a --flag=value")
        status = run(task, values, own)

    def body(arguments: list[str]) -> None:
        try:
            code = runner.exit_code(run_once, arguments)
        except Exception:  # a mistake of ours, or of the model's: 1 would say that something was found
            traceback.print_exc()
            sys.exit(FAILED)
        sys.exit(FAILED if code == 1 else code or status)

    app.run(body, argv=argv, flags_parser=parse)
