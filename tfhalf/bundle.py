"""A bundle on disk: what its manifest says, whether that is true, and the way to load it.

Nothing is loaded unless every file's sha256 agrees with the manifest and the graph holds only operations that any plain
TensorFlow server runs. `verify` also runs every signature in a fresh process, on the sample inputs that the bundle
brings, and compares with the outputs of the training model beside them.

`manifest.json` guards against damage and mix-ups, not against an attacker: whoever can write the folder can write
the manifest too. `tfhalf.export` writes bundles.
"""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

EXTRA = "assets.extra"
_MANIFEST = f"{EXTRA}/manifest.json"
INPUTS = f"{EXTRA}/sample_inputs.npz"
OUTPUTS = f"{EXTRA}/sample_outputs.npz"

# Ends the name of a signature that gives what a decision (the largest class, the boxes that stay) was made from.
RAW = "_raw"

_SAVER_OPS = {"SaveV2", "RestoreV2", "MergeV2Checkpoints", "ShardedFilename"}
_FORBIDDEN_OPS = {
    "PyFunc": "needs this Python process",
    "PyFuncStateless": "needs this Python process",
    "EagerPyFunc": "needs this Python process",
    "ReadFile": "reads the server's files",
    "WriteFile": "writes the server's files",
    "Save": "writes the server's files",
    "SaveSlices": "writes the server's files",
    "Restore": "reads the server's files",
    "RestoreSlice": "reads the server's files",
    "TextLineDataset": "reads the server's files",
    "TFRecordDataset": "reads the server's files",
    "FixedLengthRecordDataset": "reads the server's files",
    "MatchingFiles": "lists the server's files",
    "PrintV2": "prints on the server",
    "CudnnRNN": "runs on one kind of device only",
    "CudnnRNNV2": "runs on one kind of device only",
    "CudnnRNNV3": "runs on one kind of device only",
} | dict.fromkeys(_SAVER_OPS, "reads or writes the server's files")

Arrays = Mapping[str, np.ndarray]


class ExportError(Exception):
    """An artefact can't be made, or isn't what its manifest says; nothing was published."""


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a bundle is, as written in `assets.extra/manifest.json`.

    Attributes:
        created: time in UTC, ISO 8601.
        versions: package to version, of what wrote it.
        storage_dtype: dtype of the stored weights.
        kept: variable to the reason why it stayed in its own dtype.
        signatures: name to {"inputs", "outputs", "compute_dtypes", "tolerance", "max_error"}; inputs and outputs map
            names to {"dtype", "shape"}; max_error maps outputs to the largest difference seen; tolerance is None
            where a decision is served, whose numbers are compared in `<name>_raw`.
        sizes: bytes of "variables", "graph" and "total".
        fingerprint: hash of the signatures as TensorFlow computes it: equal for every storage dtype.
        files: path to {"bytes", "sha256"}, of every file but the manifest.
        metadata: what the caller gave: task, flags, plan, metrics, class names.
    """

    created: str
    versions: dict[str, str]
    storage_dtype: str
    kept: dict[str, str]
    signatures: dict[str, dict[str, Any]]
    sizes: dict[str, int]
    fingerprint: str
    files: dict[str, dict[str, Any]]
    metadata: dict[str, Any]

    def write(self, directory: Path) -> None:
        """Writes the manifest into its bundle."""
        text = json.dumps(dataclasses.asdict(self), indent=2)
        (directory / _MANIFEST).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, directory: Path) -> "Manifest":
        """Reads a bundle's manifest; it checks nothing else.

        Raises:
            ExportError: there is none, or it isn't one of ours.
        """
        try:
            return cls(**json.loads((directory / _MANIFEST).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise ExportError(f"{directory} is no tfhalf bundle: can't read {_MANIFEST} ({error})") from error


def verify(directory: str | os.PathLike) -> Manifest:
    """Checks a bundle: its files against the hashes, its operations, and every signature in a fresh process.

    Args:
        directory: the version folder.

    Returns:
        Its `Manifest`.

    Raises:
        ExportError: anything differs; the message says what.
    """
    directory = Path(directory)
    manifest = _check_files(directory)
    check_operations(directory)
    errors = replay(directory)
    for name, signature in manifest.signatures.items():
        check_errors(name, errors.get(name, {}), signature["outputs"].keys(), signature["tolerance"])
    return manifest


def load_saved_model(
    directory: str | os.PathLike, signature: str = "serving_default"
) -> Callable[[np.ndarray | Arrays], dict[str, np.ndarray]]:
    """Loads a bundle's signature after checking every file's hash.

    Args:
        directory: the version folder.
        signature: "serving_default", "serving_float32" or "serving_bfloat16", or one of them with what a decision
            added, as `_raw`.

    Returns:
        A function from inputs (arrays by name, or one array) to arrays by name: float32, or what was decided.

    Raises:
        ExportError: a file was changed, is missing or is new; there is no such signature.
    """
    directory = Path(directory)
    manifest = _check_files(directory)
    check_operations(directory)
    if signature not in manifest.signatures:
        raise ExportError(f"{directory} has no signature {signature!r}; it has {', '.join(manifest.signatures)}")
    loaded = tf.saved_model.load(str(directory))
    specs = loaded.signatures[signature].structured_input_signature[1]

    def call(inputs: np.ndarray | Arrays) -> dict[str, np.ndarray]:
        arrays = named_arrays(inputs, specs)
        # `loaded` must live as long as the function: it owns the variables.
        outputs = loaded.signatures[signature](**{name: tf.constant(array) for name, array in arrays.items()})
        return {name: tensor.numpy() for name, tensor in outputs.items()}

    return call


def named_arrays(inputs, signature: Mapping[str, tf.TensorSpec]) -> dict[str, np.ndarray]:
    """Checks inputs against a signature; one bare array stands for the only input."""
    wanted = ", ".join(f"{name} {spec.dtype.name}{spec.shape}" for name, spec in signature.items())
    if not isinstance(inputs, Mapping):
        if len(signature) != 1:
            raise ExportError(f"inputs must be a dict of {wanted}; got {type(inputs).__name__}")
        inputs = {next(iter(signature)): inputs}
    if inputs.keys() != signature.keys():
        raise ExportError(f"inputs must be {wanted}; got {', '.join(map(str, inputs)) or 'none'}")
    arrays = {name: bytes_not_objects(np.asarray(inputs[name])) for name in signature}
    for name, array in arrays.items():
        spec = signature[name]
        if spec.dtype.is_floating and array.dtype.kind in "iufb":
            arrays[name] = array = array.astype(spec.dtype.as_numpy_dtype)
        same_kind = array.dtype.kind in "SU" if spec.dtype == tf.string else array.dtype == spec.dtype.as_numpy_dtype
        if not same_kind or not spec.shape.is_compatible_with(array.shape):
            raise ExportError(
                f"input {name} must be {spec.dtype.name}{spec.shape}; got {array.dtype}{list(array.shape)}"
            )
    return arrays


def bytes_not_objects(array: np.ndarray) -> np.ndarray:
    """Strings as TensorFlow gives them, in an array that can be stored without pickle."""
    return array.astype("S") if array.dtype.kind == "O" else array


def replay(directory: Path) -> dict[str, dict[str, float]]:
    """Runs every signature in a fresh process; returns signature -> output -> largest difference to the expected."""
    with tempfile.TemporaryDirectory() as scratch:
        outputs = Path(scratch) / "outputs.npz"
        script = Path(__file__).with_name("replay.py")
        result = subprocess.run(
            [sys.executable, "-P", str(script), str(directory), str(directory / INPUTS), str(outputs)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode != 0:
            raise ExportError(f"{directory} can't be run in a fresh process: {first_line(result.stderr)}")
        with np.load(outputs, allow_pickle=False) as file:
            seen = dict(file)
    with np.load(directory / OUTPUTS, allow_pickle=False) as file:
        expected = dict(file)
    if seen.keys() != expected.keys():
        raise ExportError(f"{directory}: expected the outputs {sorted(expected)}, got {sorted(seen)}")
    errors: dict[str, dict[str, float]] = {}
    decides = any(key.split("/", 1)[0].endswith(RAW) for key in seen)
    for key, array in seen.items():
        signature, name = key.split("/", 1)
        is_decided = decides and not signature.endswith(RAW)
        errors.setdefault(signature, {})[name] = _difference(array, expected[key], is_decided)
    return errors


def _difference(seen: np.ndarray, expected: np.ndarray, is_decided: bool) -> float:
    """Largest difference as a share of the largest expected value (at least 1).

    Infinite for a wrong shape or dtype, or a NaN; 1 where whole numbers or strings differ, and where rows that are
    decided, `[batch, length]`, have another length, as sounds may have.
    """
    both_strings = seen.dtype.kind == expected.dtype.kind == "S"  # of the width of the longest one
    if seen.dtype != expected.dtype and not both_strings:
        return float("inf")
    if seen.dtype.kind == "f" and not (np.all(np.isfinite(seen)) and np.all(np.isfinite(expected))):
        return float("inf")
    if seen.shape != expected.shape:
        are_rows = is_decided and seen.ndim == expected.ndim == 2 and len(seen) == len(expected)
        return 1.0 if are_rows else float("inf")
    if seen.dtype.kind != "f":
        return 0.0 if np.array_equal(seen, expected) else 1.0
    return float(np.max(np.abs(seen - expected), initial=0.0) / max(1.0, np.max(np.abs(expected), initial=0.0)))


def check_errors(signature: str, errors: dict[str, float], outputs, tolerance: float | None) -> None:
    """Raises unless every output differs from the training model's by no more than the tolerance; None: any number."""
    for name in outputs:
        error = errors.get(name, float("inf"))
        if tolerance is None and not error < float("inf"):
            raise ExportError(
                f"{signature}: {name} has a non-finite value, or another shape or dtype than from the training model"
            )
        if tolerance is not None and not error <= tolerance:
            raise ExportError(
                f"{signature}: {name} differs from the training model by {error:.3g}, more than the tolerance "
                f"{tolerance:g} (inf: another shape or dtype, or a non-finite value; 1: other whole numbers or strings)"
                ". Keep the layers that overflow in float32 with a PrecisionPlan, or store in float32"
            )


def _check_files(directory: Path) -> Manifest:
    """Compares every file with the manifest."""
    manifest = Manifest.read(directory)
    present = {str(path.relative_to(directory)) for path in directory.rglob("*") if not path.is_dir()} - {_MANIFEST}
    if missing := sorted(manifest.files.keys() - present):
        raise ExportError(f"{directory}: {', '.join(missing)} is missing; export the model again")
    if strange := sorted(present - manifest.files.keys()):
        raise ExportError(f"{directory}: {', '.join(strange)} isn't in its manifest; export the model again")
    for name, expected in manifest.files.items():
        if _sha256(directory / name) != expected["sha256"]:
            raise ExportError(
                f"{directory}: {name} isn't the file that was exported (sha256 differs); export the model again"
            )
    return manifest


def check_operations(directory: Path) -> None:
    """Refuses a graph that any plain TensorFlow server couldn't run, or shouldn't."""
    proto = saved_model_pb2.SavedModel()
    proto.ParseFromString((directory / "saved_model.pb").read_bytes())
    for meta_graph in proto.meta_graphs:
        graph = meta_graph.graph_def
        saver = meta_graph.saver_def
        top_level = [(node.op, "the graph") for node in graph.node]
        inner = [
            (node.op, function.signature.name) for function in graph.library.function for node in function.node_def
        ]
        functions = {function.signature.name for function in graph.library.function}
        for operation, where in top_level + inner:
            in_saver = (
                "_traced_save" in where
                or "_traced_restore" in where
                or (where == "the graph" and bool(saver.save_tensor_name))
            )
            if operation in functions or (operation in _SAVER_OPS and in_saver):
                continue
            why = _FORBIDDEN_OPS.get(operation) or (
                None if hasattr(tf.raw_ops, operation) else "isn't part of TensorFlow"
            )
            if why:
                raise ExportError(f"{directory}: operation {operation} in {where} {why}; it can't be served")


def hashes(directory: Path) -> dict[str, dict[str, Any]]:
    """Returns bytes and sha256 of every file but the manifest, by its path in the bundle."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {
        str(path.relative_to(directory)): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in files
        if str(path.relative_to(directory)) != _MANIFEST
    }


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def first_line(error) -> str:
    """The line of an error or of a process' output that says what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1] if isinstance(error, str) else lines[0]
