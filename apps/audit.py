"""Audits a model for what half precision breaks, before the first step.

    python -m apps.audit --app=image.classification --model=resnet --dtype_policy=mixed_float16
    python -m apps.audit --keras_file=model.keras --format=json
    python -m apps.audit --app=image.classification --compare

The model is an app's, built as the app builds it from the same flags, and audited on its first training batch; or a
.keras file's, audited without numbers. `tfhalf.hazards` lists the rules. Nothing is trained or changed.

`--compare` makes the step's pass over that batch in half and in float32 instead, prints where the two part by more than
`--tolerance`, forward and backward, as a table, and draws it into `--plot`.

Exit status 0: no finding at `--fail_on` or above, or no place where they part. 1: at least one. 2: it couldn't be
audited.
"""

import contextlib
import dataclasses
import importlib
import json
import sys
import types
import zipfile
from pathlib import Path

import keras
from absl import flags

from apps import any_app, runner
from tfhalf import bundle, comparison, hazards, twins

_NUM_PLACES = 3  # layers named in a line of text; JSON has all
CLEAN, FOUND = 0, 1


def define_flags(values: flags.FlagValues) -> None:
    """Defines this program's own flags."""
    here = {"flag_values": values}
    flags.DEFINE_string("keras_file", None, "A model that model.save() wrote as .keras; instead of --app.", **here)
    flags.DEFINE_list("imports", [], "Python modules that register the file's custom classes, by commas.", **here)
    flags.DEFINE_enum("format", "text", ["text", "json"], "What is printed.", **here)
    flags.DEFINE_bool("compare", False, "Compare --app's pass in half with the one in float32, place by place.", **here)
    tolerance_help = "Relative error from which the two part, above 0 to 1; backward its square root."
    flags.DEFINE_float("tolerance", twins.TOLERANCE, tolerance_help, 1e-9, 1.0, **here)
    flags.DEFINE_string("plot", "runs/audit/comparison.png", "Picture that --compare draws.", **here)
    flags.DEFINE_enum("fail_on", "error", ["error", "warning"], "Least severity that makes exit status 1.", **here)


def run(task: runner.Task | None, values: flags.FlagValues, names: list[str]) -> int:
    """Audits or compares, and prints; returns the exit status."""
    options = options_of(task, values, names)
    if values.compare:
        compared = compared_with_float32(task, options)
        print(json.dumps(compared.to_json(), indent=2) if values.format == "json" else compared)
        return FOUND if compared.forward or compared.backward else CLEAN
    found = audited(task, options)
    print(as_json(found) if values.format == "json" else as_text(found))
    return exit_status(found, values.fail_on)


def options_of(task: runner.Task | None, values: flags.FlagValues, names: list[str]) -> types.SimpleNamespace:
    """Returns the parsed flags: the app's, and this program's.

    Raises:
        AppError: not exactly one of --app and --keras_file is given, or --imports without the latter.
    """
    if (task is None) == (values.keras_file is None):
        raise runner.AppError("give exactly one of --app=<name> and --keras_file=<model.keras>; --help says more")
    if values.imports and task is not None:
        raise runner.AppError("--imports has no effect on --app: it is for --keras_file")
    if values.compare and task is None:
        raise runner.AppError("--compare needs a loss and a batch: give --app, or call tfhalf.compare on your model")
    for name in ("tolerance", "plot"):
        if values[name].present and not values.compare:
            raise runner.AppError(f"--{name} has no effect without --compare")
    options = runner.options_of(values, names) if task else types.SimpleNamespace()
    for name in ("keras_file", "imports", "tolerance", "plot"):
        setattr(options, name, values[name].value)
    return options


def audited(task: runner.Task | None, options: types.SimpleNamespace) -> list[hazards.Finding]:
    """Audits what the flags name. Reports of the preparation go to stderr.

    Raises:
        AppError: the model or its data can't be had.
    """
    with contextlib.redirect_stdout(sys.stderr):
        if task is None:
            model, inputs = load_model(options.keras_file, options.imports), None
        else:
            *_, data, model = any_app.load(task, options)
            inputs, _ = next(iter(data.train(0)))
        try:
            return hazards.audit(model, inputs)
        except ValueError as error:  # it isn't built, or fails in float32 too
            raise runner.AppError(bundle.first_line(error)) from error


def compared_with_float32(task: runner.Task, options: types.SimpleNamespace) -> comparison.Comparison:
    """Compares an app's pass in half with the one in float32, and draws it.

    Raises:
        AppError: nothing of the model computes in half, its data can't be had, or the picture can't be written.
    """
    with contextlib.redirect_stdout(sys.stderr):
        *_, data, model = any_app.load(task, options)
        batch = next(iter(data.train(0)))
    try:
        compared = comparison.compare(model, batch, tolerance=options.tolerance)
    except ValueError as error:
        raise runner.AppError(f"{error}; choose another --dtype_policy") from error
    plot = Path(options.plot)
    try:
        plot.parent.mkdir(parents=True, exist_ok=True)
        plot.write_bytes(compared.picture())
    except OSError as error:
        raise runner.AppError(f"--plot={plot}: {error.strerror}; choose another file") from error
    return compared


def load_model(path: str, imports: list[str]) -> keras.Model:
    """Loads a .keras file.

    Args:
        path: of the file.
        imports: modules that register its custom classes.

    Raises:
        AppError: it can't be read, isn't a .keras file, or needs classes that nobody registered.
    """
    if not Path(path).is_file():
        raise runner.AppError(f"--keras_file={path}: there is no such file")
    for module in imports:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise runner.AppError(f"--imports={module}: {error}; run it where Python finds that module") from error
    try:
        with zipfile.ZipFile(path) as archive:
            config = json.loads(archive.read("config.json"))
    except (zipfile.BadZipFile, KeyError, ValueError, OSError) as error:
        raise runner.AppError(f"--keras_file={path} is no .keras file: {bundle.first_line(error)}") from error
    if "keras_hub" in json.dumps(config):
        import keras_hub  # noqa: F401  # it registers its classes; here, because it takes seconds
    if unknown := unknown_classes(config):
        raise runner.AppError(
            f"--keras_file={path} needs classes that aren't known: {', '.join(unknown)}; decorate each with "
            "@keras.saving.register_keras_serializable, and name its module by --imports"
        )
    try:
        return keras.saving.load_model(path)
    except Exception as error:  # whatever a class that the file names does with what the file holds
        raise runner.AppError(f"--keras_file={path} can't be loaded: {bundle.first_line(error)}") from error


def unknown_classes(config) -> list[str]:
    """Returns the registered names in a .keras file's config that are neither Keras' nor registered here."""
    found: dict[str, None] = {}

    def visit(node) -> None:
        if isinstance(node, dict):
            name, module = node.get("registered_name"), node.get("module")
            own = "class_name" in node and not (module or "").startswith(("keras.", "builtins"))
            if own and name and keras.saving.get_registered_object(name) is None:
                found[name] = None
        for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
            visit(child)

    visit(config)
    return list(found)


def exit_status(found: list[hazards.Finding], fail_on: str) -> int:
    """Returns 1 where a finding is as severe as `fail_on`, or more."""
    levels = hazards.SEVERITIES[: hazards.SEVERITIES.index(fail_on) + 1]
    return FOUND if any(finding.severity in levels for finding in found) else CLEAN


def counts(found: list[hazards.Finding]) -> dict[str, int]:
    """Returns how many findings there are of each severity."""
    return {severity: sum(each.severity == severity for each in found) for severity in hazards.SEVERITIES}


def as_json(found: list[hazards.Finding]) -> str:
    """Returns the findings and their counts as one JSON object."""
    return json.dumps({"findings": [dataclasses.asdict(each) for each in found], "counts": counts(found)}, indent=2)


def as_text(found: list[hazards.Finding]) -> str:
    """Returns the findings by severity, the same one in several layers once, and their counts in the last line."""
    places: dict[tuple[str, str, str, str], list[str]] = {}
    for each in found:
        fix = each.fix.replace(f'"{each.layer}"', '"<layer>"') if each.layer else each.fix
        places.setdefault((each.severity, each.rule, each.message, fix), []).append(each.layer)
    width = max((len(rule) for _, rule, _, _ in places), default=0)
    lines = []
    for severity in hazards.SEVERITIES:
        rows = [(key, layers) for key, layers in places.items() if key[0] == severity]
        lines += [f"{severity}:"] if rows else []
        for (_, rule, message, fix), layers in rows:
            told = ", ".join(layer or "the model" for layer in layers[:_NUM_PLACES])
            more = f" and {len(layers) - _NUM_PLACES} more" if len(layers) > _NUM_PLACES else ""
            fix = fix.replace('"<layer>"', f'"{layers[0]}"') if len(layers) == 1 else fix
            indent = f"\n  {'':{width}}  "
            lines.append(f"  {rule:{width}}  {told}{more}{indent}{message}{indent}fix: {fix}")
        lines += [""] if rows else []
    total = counts(found)
    plural = {"error": "errors", "warning": "warnings", "info": "infos"}
    told = [f"{number} {severity if number == 1 else plural[severity]}" for severity, number in total.items()]
    return "\n".join([*lines, ", ".join(told)])


if __name__ == "__main__":
    any_app.main(define_flags, run)
