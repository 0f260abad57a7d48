"""Converts a bundle to LiteRT, ONNX and OpenVINO, and tells which runtime serves it fastest on this machine.

    python -m apps.convert --saved_model=saved_models/image_classification_mnist_5k/1
    python -m apps.convert --saved_model=saved_models/image_classification_mnist_5k/1 --formats=litert,onnx
    python -m apps.convert --import=theirs/saved_model --saved_model=saved_models/theirs/1

Each file is run in its runtime on the bundle's samples and compared before it is published as `<output>/<format>/`,
with a manifest of its own; a format that can't be is a line with the reason, and leaves nothing. What is there already
and sound is kept, so the same command goes on where it was stopped.

Then all of them, and the bundle's own signatures in TensorFlow, are timed in turn at batch 1 and 32; the table is
printed, and written to `<output>/runtimes.json`.

With --import a SavedModel's folder or a Keras file from elsewhere becomes the bundle --saved_model first: looked at
before it is loaded, its signatures kept, its weights in float16 where that is safe, compared with what the source
answers. Then only the formats that --formats names are converted.

Exit status 0: at least one format was published, and so was each that --formats names. 1: not so.
"""

import dataclasses
import datetime
import json
import math
import os
from pathlib import Path
from typing import Any

from absl import flags

from apps import runner
from tfhalf import bundle, checkpoint, convert, importing, latency, processor

_REPORT = "runtimes.json"
_TITLES = {
    "litert": "LiteRT, float16 weights",
    "onnx": "ONNX Runtime float32",
    "onnx_float16": "ONNX Runtime float16",
    "openvino": "OpenVINO float32, float16 weights",
}
_BFLOAT16 = "OpenVINO bfloat16, float16 weights"


def define_flags(values: flags.FlagValues) -> None:
    """Defines this program's flags."""
    here = {"flag_values": values}
    flags.DEFINE_string("saved_model", None, "Version folder of a bundle.", required=True, **here)
    import_help = (
        "A SavedModel's folder or a Keras file (.keras, .h5, .hdf5) to make --saved_model of, which must be free."
    )
    flags.DEFINE_string("import", None, import_help, **here)
    inputs_help = "With --import: an .npz file with sample inputs by name. Default: random ones."
    flags.DEFINE_string("inputs", None, inputs_help, **here)
    formats_help = (
        f"Formats, separated by commas: {', '.join(convert.FORMATS)}. Default: all; then one that is refused "
    )
    flags.DEFINE_list("formats", None, formats_help + "is no failure.", **here)
    output_help = "Folder that gets a folder for each format. Default: runs/convert/<name>/<version>."
    flags.DEFINE_string("output", None, output_help, **here)
    tolerance_help = (
        "Largest difference to the training model, as a share of the largest output (at least 1), 0 to below 1. "
        "Default: the bundle's own and 0.001; 0.01 for a file that computes in float16."
    )
    flags.DEFINE_float("tolerance", None, tolerance_help, 0, **here)
    flags.DEFINE_integer("rounds", 5, "Rounds of timing; 0: none.", 0, **here)


def main() -> None:
    """Runs the program."""
    runner.start(define_flags, run)


def run(values: flags.FlagValues) -> None:
    """Imports where that is asked for, converts, measures and prints.

    Raises:
        AppError: a flag is wrong; nothing was published, or not all that --formats names; the report can't be written.
        ExportError: the bundle isn't sound, or can't be made.
    """
    folder = Path(values.saved_model)
    output = Path(values.output or f"runs/convert/{folder.resolve().parent.name}/{folder.resolve().name}")
    formats = values.formats or list(convert.FORMATS)
    if unknown := sorted(set(formats) - convert.FORMATS.keys()):
        raise runner.AppError(f"--formats={','.join(unknown)}: the formats are {', '.join(convert.FORMATS)}")
    source = values["import"].value
    if values.inputs and not source:
        raise runner.AppError("--inputs has an effect with --import only: a bundle brings its own samples")
    if source:
        _import(Path(source), folder, values)
    if values.formats or not source:
        _convert(folder, formats, output, values)


def _convert(folder: Path, formats: list[str], output: Path, values: flags.FlagValues) -> None:
    """Converts to each format, and times what was published."""
    manifest = bundle.check(folder)
    runner.say(f"{folder}: {convert.signature_of(manifest, folder)} to {output}")
    published, refused = {}, {}
    for format in dict.fromkeys(formats):
        try:
            published[format] = _published(folder, format, output, values.tolerance)
        except bundle.ExportError as error:
            refused[format] = str(error)
            runner.say(f"{format}: refused: {error}")
    if published and values.rounds:
        rows = _measured(folder, manifest, output, published, values.rounds)
        runner.say("\n" + as_text(rows))
        try:
            _write_report(output / _REPORT, folder, rows, refused, values.rounds)
        except OSError as error:
            raise runner.AppError(f"--output={output}: {error.strerror}; choose another folder") from error
        runner.say(f"\nwritten to {output}: {', '.join([*published, _REPORT])}")
    if refused and (values.formats or not published):
        raise runner.AppError(f"refused, for the reasons above: {', '.join(refused)}")


def _import(source: Path, folder: Path, values: flags.FlagValues) -> None:
    """Makes a bundle of what others trained; says what became of it."""
    inputs = bundle.read_arrays(Path(values.inputs)) if values.inputs else None
    manifest = importing.import_model(source, folder, inputs=inputs, tolerance=values.tolerance)
    error = max(max(about["max_error"].values()) for about in manifest.signatures.values())
    kept = f"; {len(manifest.kept)} weights stay in their own dtype" if manifest.kept else ""
    runner.say(
        f"{source} became {folder}: {', '.join(manifest.signatures)}; weights {manifest.sizes['variables']:,} bytes, "
        f"largest difference {error:.2g}{kept}"
    )


def _published(folder: Path, format: str, output: Path, tolerance: float | None) -> convert.Converted:
    """Converts to a format, or checks what is there; says which."""
    there = os.path.lexists(output / format)
    if there:
        converted = convert.check(folder, output / format)
    else:
        converted = convert.convert(folder, format, output, tolerance=tolerance)
    worst = max(converted.max_error.values())
    if tolerance is not None and worst > tolerance:
        raise bundle.ExportError(
            f"{output / format} was published before, with a difference of {worst:.3g}: remove it to convert again"
        )
    shapes = ", ".join(f"{name} {about['shape']}" for name, about in converted.inputs.items())
    only = f", for {shapes} only" if converted.batch else ""
    runner.say(
        f"{format}: {'was there' if there else 'published'}; {converted.sizes['files']:,} bytes, largest difference "
        f"{worst:.2g} (at most {converted.tolerance:.2g}){only}"
    )
    return converted


def _measured(folder, manifest, output, published, rounds) -> list[latency.Row]:
    """Times the bundle's signatures and the files in turn."""
    signature = convert.signature_of(manifest, folder)
    inputs, expected = convert.samples(folder, signature)
    raw = bundle.RAW if signature.endswith(bundle.RAW) else ""
    contenders = []
    for name in ("serving_default", "serving_float32", "serving_bfloat16"):
        about = manifest.signatures.get(name + raw)
        if about is not None and about["tolerance"] is not None:
            size = manifest.sizes["variables"] + manifest.sizes["graph"]
            kind = f"tensorflow:{name}{raw}"
            contenders.append(latency.Contender(f"TensorFlow {name}{raw}", kind, folder, size, about["tolerance"]))
    for format, converted in published.items():
        about, size = convert.FORMATS[format], converted.sizes["files"]
        path = output / format / about.file
        contenders.append(latency.Contender(_TITLES[format], about.kind, path, size, converted.tolerance))
        if format == "openvino":
            allowed = max(converted.tolerance, convert.ADDED["bfloat16"])
            contenders.append(latency.Contender(_BFLOAT16, "openvino:bf16", path, size, allowed))
    return latency.measure(contenders, inputs, expected, rounds)


def as_text(rows: list[latency.Row]) -> str:
    """Returns the table, and which runtime to serve with on this machine."""
    width = max(len(row.name) for row in rows)
    heads = "".join(f"  {f'batch {batch}, ms':>12}" for batch in latency.BATCHES)
    lines = [f"{'runtime':{width}}  {'MB':>7}  {'difference':>10}  {'at most':>8}{heads}"]
    for row in rows:
        if row.failed:
            lines.append(f"{row.name:{width}}  {row.size / 1e6:7.2f}  {row.failed}")
            continue
        times = "".join(f"  {row.seconds[batch] * 1e3:12.3f}" for batch in latency.BATCHES)
        lines.append(f"{row.name:{width}}  {row.size / 1e6:7.2f}  {row.max_error:10.2g}  {row.tolerance:8.2g}{times}")
    one, many = (latency.fastest(rows, batch) for batch in latency.BATCHES)
    if one is None:
        return "\n".join([*lines, "nothing serves on this machine: none answers as the training model does"])
    other = f"; batches of {latency.BATCHES[1]} with {many.name}" if many is not one else ""
    return "\n".join([*lines, "", f"on this machine serve it with {one.name}{other}"])


def _write_report(path: Path, folder: Path, rows: list[latency.Row], refused: dict[str, str], rounds: int) -> None:
    """Writes the table as JSON, whole or not at all."""
    best = {str(batch): row and row.name for batch in latency.BATCHES for row in [latency.fastest(rows, batch)]}
    report = {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "bundle": str(folder),
        "machine": {"cpu": processor.this().name, "cores": processor.this().cores},
        "rounds": rounds,
        "rows": [_as_json(row) for row in rows],
        "refused": refused,
        "serve_with": best,
    }
    text = json.dumps(report, indent=2, allow_nan=False) + "\n"
    checkpoint.replace(path, lambda file: file.write(text.encode()))


def _as_json(row: latency.Row) -> dict[str, Any]:
    finite = row.max_error if row.max_error is not None and math.isfinite(row.max_error) else None
    return dataclasses.asdict(row) | {"max_error": finite, "serves": row.serves}


if __name__ == "__main__":
    main()
