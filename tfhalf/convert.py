"""Converts a verified bundle to LiteRT, ONNX or OpenVINO; publishes a file that was run and compared, or nothing.

How. The bundle's hashes and operations are checked. Its float32 signature - the `_raw` form where a decision is served,
which is the client's to take then - is frozen (`tfhalf.freezing`) and converted in a process of its own. The file is
run in its real runtime, in another fresh process without TensorFlow: on the bundle's samples, against what the training
model made of them, and on a batch of another size, against what TensorFlow makes of it with the same weights.

Order: write beside, run, compare, hash, sync, rename. `<output>/<format>/` appears in one step, with a manifest of its
own, or not at all.

Where a file that takes any batch and any size can't be made or run, one for a batch of 1 is, of the samples' sizes if
need be, and its manifest says so. Recurrent layers are loops, which LiteRT has for shapes that are known only.

Source of the formats: https://ai.google.dev/edge/litert, https://onnx.ai, https://docs.openvino.ai
"""

import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from tfhalf import bundle, export, freezing, latency, publishing

MANIFEST = "manifest.json"
# What a conversion may add to the bundle's own difference to the training model. In float32 only the order of sums and
# approximations of functions differ; the others are those of `tfhalf.export`.
ADDED = export.TOLERANCES | {"float32": 1e-3}
# The first that a bundle has is converted.
_SIGNATURES = ("serving_float32_raw", "serving_float32", "serving_default_raw", "serving_default")


@dataclasses.dataclass(frozen=True)
class Format:
    """A kind of file.

    Attributes:
        file: the one that the runtime is given.
        kind: as `tfhalf/runtimes.py` takes it.
        weights: dtype that they are stored in.
        computes: dtype that numbers are computed in.
        packages: what writes and runs it.
        settings: what a program that runs it has to set, to get the same numbers.
        fixes_batch: whether a batch of 1 is tried where any batch doesn't do.
        shares_names: whether an input and an output may have one name.
    """

    file: str
    kind: str
    weights: str
    computes: str
    packages: tuple[str, ...]
    settings: dict[str, str] = dataclasses.field(default_factory=dict)
    fixes_batch: bool = False
    shares_names: bool = False


_ONNX = ("tf2onnx", "onnx", "onnxruntime")
FORMATS = {
    "litert": Format(
        "model.tflite", "litert", "float16", "float32", ("ai-edge-litert",), fixes_batch=True, shares_names=True
    ),
    "onnx": Format("model.onnx", "onnx", "float32", "float32", _ONNX),
    "onnx_float16": Format("model.onnx", "onnx", "float16", "float16", _ONNX),
    "openvino": Format(
        "model.xml", "openvino:f32", "float16", "float32", ("openvino",), {"INFERENCE_PRECISION_HINT": "f32"}
    ),
}


@dataclasses.dataclass(frozen=True)
class Converted:
    """What a converted file is, as written in `manifest.json` beside it.

    Attributes:
        created: time in UTC, ISO 8601.
        versions: package to version, of what wrote and ran it.
        source: of the bundle "fingerprint", "manifest_sha256" and the "signature" that was converted.
        format: key of `FORMATS`.
        precision: "weights" and "computes", dtypes; "settings", what a program that runs it has to set.
        inputs, outputs: name to {"dtype", "shape"}.
        batch: the only size of a batch that it takes, or None: any.
        tolerance: largest difference to the training model that was allowed, as a share of the largest output (at
            least 1).
        max_error: output to the largest difference that was seen.
        sizes: bytes of "files", all of them, and of "bundle_variables", the bundle's.
        files: path to {"bytes", "sha256"}, of every file but the manifest.
        metadata: the bundle's: class names and the like.
    """

    created: str
    versions: dict[str, str]
    source: dict[str, str]
    format: str
    precision: dict[str, Any]
    inputs: dict[str, dict[str, Any]]
    outputs: dict[str, dict[str, Any]]
    batch: int | None
    tolerance: float
    max_error: dict[str, float]
    sizes: dict[str, int]
    files: dict[str, dict[str, Any]]
    metadata: dict[str, Any]


def convert(
    directory: str | os.PathLike, format: str, output: str | os.PathLike, *, tolerance: float | None = None
) -> Converted:
    """Converts a bundle, runs the file, compares, and publishes `<output>/<format>/`; or nothing.

    Args:
        directory: the bundle's version folder.
        format: key of `FORMATS`: "litert", "onnx", "onnx_float16" or "openvino".
        output: folder, made if missing; `<output>/<format>` must not exist.
        tolerance: largest difference to the training model, as a share of the largest output (at least 1); 0 to
            below 1. Default: the bundle's own difference, and `ADDED` to it.

    Returns:
        Its manifest.

    Raises:
        ExportError: the bundle isn't sound; a package is missing; strings, a lookup table or an operation can't be
            converted; the file can't be run, or differs by more than the tolerance; the folder exists or can't be
            written. Nothing was published.
    """
    directory, folder = Path(directory), Path(output) / format
    if format not in FORMATS:
        raise bundle.ExportError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if tolerance is not None and not 0 <= tolerance < 1:
        raise bundle.ExportError(f"tolerance is a share of the largest output, 0 to below 1; got {tolerance}")
    versions = _versions(format)
    manifest = bundle.check(directory)
    signature = signature_of(manifest, directory)
    about = manifest.signatures[signature]
    if not FORMATS[format].shares_names and (both := sorted(about["inputs"].keys() & about["outputs"].keys())):
        raise bundle.ExportError(f"{format} can't have an input and an output of one name, {both[0]}: give one another")
    if tolerance is None:
        own = max(about["max_error"].values(), default=0.0)
        tolerance = own + ADDED[FORMATS[format].computes]
    if os.path.lexists(folder):
        raise bundle.ExportError(f"{folder} exists; choose another output, or remove it")
    with publishing.whole(folder) as stage:
        batch, max_error, frozen = _write(directory, signature, format, stage, tolerance)
        converted = Converted(
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            versions=versions,
            source=_source(directory, manifest) | {"signature": signature},
            format=format,
            precision=_precision(format),
            inputs={name: _about(spec) for name, spec in frozen.inputs.items()},
            outputs=about["outputs"],
            batch=batch,
            tolerance=tolerance,
            max_error=max_error,
            sizes={
                "files": sum(path.stat().st_size for path in stage.iterdir()),
                "bundle_variables": manifest.sizes["variables"],
            },
            files=bundle.hashes(stage),
            metadata=manifest.metadata,
        )
        text = json.dumps(dataclasses.asdict(converted), indent=2)
        (stage / MANIFEST).write_text(text + "\n", encoding="utf-8")
    return converted


def check(directory: str | os.PathLike, folder: str | os.PathLike) -> Converted:
    """Checks what was published before: its files against their hashes, and that it was made of this bundle.

    Args:
        directory: the bundle's version folder.
        folder: `<output>/<format>`.

    Returns:
        Its manifest.

    Raises:
        ExportError: it is damaged, or another bundle's.
    """
    directory, folder = Path(directory), Path(folder)
    try:
        converted = Converted(**json.loads((folder / MANIFEST).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise bundle.ExportError(f"{folder} holds no converted file: can't read {MANIFEST} ({error})") from error
    found = bundle.hashes(folder)
    found.pop(MANIFEST)
    if found != converted.files:
        raise bundle.ExportError(f"{folder}: files aren't those that were published; remove it and convert again")
    source = _source(directory, bundle.Manifest.read(directory))
    if {name: converted.source.get(name) for name in source} != source:
        raise bundle.ExportError(f"{folder} was made of another bundle than {directory}; choose another output")
    return converted


def signature_of(manifest: bundle.Manifest, directory: Path) -> str:
    """Returns the signature of a bundle that is converted.

    Raises:
        ExportError: it has none that could be.
    """
    for name in _SIGNATURES:
        if name in manifest.signatures:
            return name
    raise bundle.ExportError(
        f"{directory} has no signature {' or '.join(_SIGNATURES)}; it has {', '.join(manifest.signatures)}"
    )


def samples(directory: Path, signature: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Returns the bundle's sample inputs, and what the training model made of them."""
    with np.load(directory / bundle.INPUTS, allow_pickle=False) as file:
        inputs = {name.partition("/")[2]: array for name, array in file.items()}
    with np.load(directory / bundle.OUTPUTS, allow_pickle=False) as file:
        expected = {key.partition("/")[2]: array for key, array in file.items() if key.startswith(f"{signature}/")}
    return inputs, expected


def _versions(format: str) -> dict[str, str]:
    packages = FORMATS[format].packages
    try:
        found = {name: importlib.metadata.version(name) for name in packages}
    except importlib.metadata.PackageNotFoundError as error:
        raise bundle.ExportError(f"{format} needs the package {error.name}: pip install 'tfhalf[convert]'") from error
    return {"tfhalf": sys.modules[__package__].__version__, "tensorflow": tf.__version__} | found


def _write(directory: Path, signature: str, format: str, stage: Path, tolerance: float):
    """Fills the staging folder; returns the fixed batch, the errors, and what was converted."""
    frozen = freezing.freeze(directory, signature)
    inputs, expected = samples(directory, signature)
    size = len(next(iter(inputs.values())))
    others = {name: array[:1] if size > 1 else np.repeat(array, 2, axis=0) for name, array in inputs.items()}
    cases = {"samples": (inputs, expected)}
    if frozen.takes_any_batch:
        cases["others"] = (others, _tensorflow(directory, signature, others))
    attempts = _shapes(format, frozen, inputs)
    for shapes in attempts:
        work = stage / "work"
        try:
            tried = frozen if shapes is None else frozen.fix(shapes)
            tried.save(work)
            _converted(format, work, stage)
            return shapes and 1, _compared(format, stage, cases, tolerance), tried
        except bundle.ExportError:
            if shapes == attempts[-1]:
                raise
        finally:
            shutil.rmtree(work, ignore_errors=True)
    raise AssertionError("it is always tried")


def _shapes(format: str, frozen: freezing.Frozen, inputs: bundle.Arrays) -> list[dict[str, list[int | None]] | None]:
    """What inputs are tried in turn: any, which is None; a batch of 1; a batch of 1 of the samples' sizes."""
    if not frozen.takes_any_batch:
        return [None]
    one = {name: [1, *spec.shape[1:]] for name, spec in frozen.inputs.items()}
    sizes = {name: [1, *inputs[name].shape[1:]] for name in frozen.inputs}
    if not FORMATS[format].fixes_batch:
        return [None, sizes] if sizes != one else [None]
    tried = [one, sizes] if sizes != one else [one]
    return tried if frozen.has_loops else [None, *tried]


def _tensorflow(directory: Path, signature: str, inputs: bundle.Arrays) -> dict[str, np.ndarray]:
    loaded = tf.saved_model.load(str(directory))
    outputs = loaded.signatures[signature](**{name: tf.constant(array) for name, array in inputs.items()})
    return {name: tensor.numpy() for name, tensor in outputs.items()}


def _converted(format: str, saved_model: Path, stage: Path) -> None:
    script = Path(__file__).with_name("converters.py")
    result = subprocess.run(
        [sys.executable, "-P", script, format, saved_model, stage],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if result.returncode != 0:
        killed = f"the converter was ended by signal {-result.returncode}"
        reason = killed if result.returncode < 0 else bundle.first_line(result.stderr)
        raise bundle.ExportError(f"it can't be converted to {format}: {reason}")


def _compared(format: str, stage: Path, cases, tolerance: float) -> dict[str, float]:
    """Runs the file in a fresh process; returns the largest difference of each output."""
    about = FORMATS[format]
    with latency.Runtime(about.kind, stage / about.file, {case: inputs for case, (inputs, _) in cases.items()}) as run:
        seen = {case: latency.errors(run.outputs[case], expected) for case, (_, expected) in cases.items()}
    worst = {name: max(errors[name] for errors in seen.values()) for name in seen["samples"]}
    for name, error in worst.items():
        if not error <= tolerance:
            raise bundle.ExportError(
                f"{format}: {name} differs by {error:.3g}, more than the tolerance {tolerance:.3g} (inf: another shape "
                f"or dtype, or a non-finite value; 1: other whole numbers). It stores all constants in {about.weights}"
            )
    return worst


def _source(directory: Path, manifest: bundle.Manifest) -> dict[str, str]:
    content = (directory / bundle.MANIFEST).read_bytes()
    return {"fingerprint": manifest.fingerprint, "manifest_sha256": hashlib.sha256(content).hexdigest()}


def _precision(format: str) -> dict[str, Any]:
    about = FORMATS[format]
    return {"weights": about.weights, "computes": about.computes, "settings": about.settings}


def _about(spec: tf.TensorSpec) -> dict[str, Any]:
    return {"dtype": spec.dtype.name, "shape": spec.shape.as_list() if spec.shape.rank is not None else None}
