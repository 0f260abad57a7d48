"""A bundle on disk: whether it is what its manifest says, and the way to load it.

Nothing is loaded unless every file's sha256 agrees with the manifest, the graph holds only operations that are let
through (`tfhalf.operations`), it has the signatures that the manifest tells of, and, where that is asked for, somebody
signed it. `verify` also runs every signature in a fresh process, on the sample inputs that the bundle brings, and
compares with the outputs of the training model beside them.

Whoever can write the folder between the check and the load can still change what is loaded: serve from a folder that
only you can write. `tfhalf.export` writes bundles, `tfhalf.manifest` says what is in them.
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from google.protobuf.message import DecodeError
from tensorflow.core.protobuf import fingerprint_pb2, meta_graph_pb2, saved_model_pb2

from tfhalf import operations, signing
from tfhalf.manifest import EXTRA as EXTRA
from tfhalf.manifest import GRAPH, ExportError, Manifest, check_files
from tfhalf.manifest import MANIFEST as MANIFEST
from tfhalf.manifest import first_line as first_line
from tfhalf.manifest import hashes as hashes

INPUTS = f"{EXTRA}/sample_inputs.npz"
OUTPUTS = f"{EXTRA}/sample_outputs.npz"

# Ends the name of a signature that gives what a decision (the largest class, the boxes that stay) was made from.
RAW = "_raw"

Arrays = Mapping[str, np.ndarray]


def verify(directory: str | os.PathLike, require_signature: str | os.PathLike | None = None) -> Manifest:
    """Checks a bundle: all that `check` does, then every signature in a fresh process.

    Args:
        directory: the version folder.
        require_signature: file with the public key of who must have signed it, in PEM. Default: it needs no signature.

    Returns:
        Its `Manifest`.

    Raises:
        ExportError: anything differs; the message says what.
    """
    directory = Path(directory)
    manifest = check(directory, require_signature)
    errors = replay(directory)
    for name, signature in manifest.signatures.items():
        check_errors(name, errors.get(name, {}), signature["outputs"].keys(), signature["tolerance"])
    return manifest


def check(directory: str | os.PathLike, require_signature: str | os.PathLike | None = None) -> Manifest:
    """Checks a bundle without loading or running anything of it.

    Args:
        directory: the version folder.
        require_signature: file with the public key of who must have signed it, in PEM. Default: it needs no signature.

    Returns:
        Its `Manifest`.

    Raises:
        ExportError: it isn't signed by that key; a file differs from the manifest; the graph has other signatures than
            the manifest says, or an operation that may not stand there.
    """
    directory = Path(directory)
    if require_signature is not None:
        signing.check_signature(directory, require_signature)
    try:
        manifest = check_files(directory)
        graph = check_operations(directory)
        _check_interface(directory, manifest, graph)
    except OSError as error:
        raise ExportError(f"{directory} can't be read: {error}") from error
    return manifest


def load_saved_model(
    directory: str | os.PathLike,
    signature: str = "serving_default",
    require_signature: str | os.PathLike | None = None,
) -> Callable[[np.ndarray | Arrays], dict[str, np.ndarray]]:
    """Loads a bundle's signature after checking its files, its graph, and who signed it where that is asked for.

    Args:
        directory: the version folder.
        signature: "serving_default", "serving_float32" or "serving_bfloat16", or one of them with what a decision
            added, as `_raw`.
        require_signature: file with the public key of who must have signed it, in PEM. Default: it needs no signature.

    Returns:
        A function from inputs (arrays by name, or one array) to arrays by name: float32, or what was decided.

    Raises:
        ExportError: as in `check`, before anything is loaded; there is no such signature; it can't be loaded.
    """
    directory = Path(directory)
    manifest = check(directory, require_signature)
    if signature not in manifest.signatures:
        raise ExportError(f"{directory} has no signature {signature!r}; it has {', '.join(manifest.signatures)}")
    try:
        loaded = tf.saved_model.load(str(directory))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, tf.errors.OpError) as error:
        raise ExportError(f"{directory} can't be loaded: {first_line(error)}") from error
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


def run(directory: Path, inputs: Path) -> dict[str, np.ndarray]:
    """Runs every signature in a fresh process on the arrays of a file; returns arrays by "<signature>/<output>"."""
    with tempfile.TemporaryDirectory() as scratch:
        outputs = Path(scratch) / "outputs.npz"
        script = Path(__file__).with_name("replay.py")
        result = subprocess.run(
            [sys.executable, "-P", str(script), str(directory), str(inputs), str(outputs)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode != 0:
            raise ExportError(f"{directory} can't be run in a fresh process: {first_line(result.stderr)}")
        return read_arrays(outputs)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Reads arrays by name from an .npz file.

    Raises:
        ExportError: it can't be read as one.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ExportError(f"{path} can't be read as arrays by name, in numpy's .npz: {error}") from error


def replay(directory: Path) -> dict[str, dict[str, float]]:
    """Runs every signature in a fresh process; returns signature -> output -> largest difference to the expected."""
    seen, expected = run(directory, directory / INPUTS), read_arrays(directory / OUTPUTS)
    if seen.keys() != expected.keys():
        raise ExportError(f"{directory}: expected the outputs {sorted(expected)}, got {sorted(seen)}")
    errors: dict[str, dict[str, float]] = {}
    decides = any(key.split("/", 1)[0].endswith(RAW) for key in seen)
    for key, array in seen.items():
        signature, name = key.split("/", 1)
        is_decided = decides and not signature.endswith(RAW)
        errors.setdefault(signature, {})[name] = difference(array, expected[key], is_decided)
    return errors


def difference(seen: np.ndarray, expected: np.ndarray, is_decided: bool = False) -> float:
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


def read_graph(directory: Path) -> saved_model_pb2.SavedModel:
    """Reads a SavedModel's graph without loading it.

    Raises:
        ExportError: there is none.
    """
    try:
        return saved_model_pb2.SavedModel.FromString((directory / GRAPH).read_bytes())
    except (OSError, DecodeError) as error:
        raise ExportError(f"{directory} is no SavedModel: can't read {GRAPH} ({error})") from error


def check_operations(directory: Path) -> meta_graph_pb2.MetaGraphDef:
    """Refuses a graph that reaches out of itself, or that any plain TensorFlow server couldn't run; returns it."""
    proto = read_graph(directory)
    if refused := operations.find_refused(proto):
        raise ExportError(f"{directory}: {refused}; it can't be served")
    if len(proto.meta_graphs) != 1:
        raise ExportError(f"{directory}: it has {len(proto.meta_graphs)} graphs; a bundle has one")
    return proto.meta_graphs[0]


def signatures_of(graph: meta_graph_pb2.MetaGraphDef) -> dict[str, dict[str, dict[str, Any]]]:
    """Returns a graph's signatures as a manifest tells of them: name to {"inputs", "outputs"}, these to dtype and
    shape."""

    def about(infos) -> dict[str, Any]:
        return {name: _about(infos[name]) for name in sorted(infos)}

    return {
        name: {"inputs": about(signature.inputs), "outputs": about(signature.outputs)}
        for name, signature in graph.signature_def.items()
        if name != operations.INIT_SIGNATURE
    }


def _about(info: meta_graph_pb2.TensorInfo) -> dict[str, Any]:
    shape = tf.TensorShape(info.tensor_shape)
    return {"dtype": tf.as_dtype(info.dtype).name, "shape": shape.as_list() if shape.rank is not None else None}


def _check_interface(directory: Path, manifest: Manifest, graph: meta_graph_pb2.MetaGraphDef) -> None:
    """Compares what the graph takes and gives with what the manifest says of it."""
    try:
        real = signatures_of(graph)
    except (TypeError, ValueError) as error:
        raise ExportError(f"{directory}: its graph's signatures can't be read ({error})") from error
    told = {name: {key: one[key] for key in ("inputs", "outputs")} for name, one in manifest.signatures.items()}
    for name in real.keys() | told.keys():
        if real.get(name) != told.get(name):
            raise ExportError(f"{directory}: the signature {name} isn't in both its graph and its manifest, or differs")
    try:
        fingerprint = fingerprint_pb2.FingerprintDef.FromString((directory / "fingerprint.pb").read_bytes())
    except DecodeError as error:
        raise ExportError(f"{directory}: fingerprint.pb can't be read ({error})") from error
    if str(fingerprint.signature_def_hash) != manifest.fingerprint:
        raise ExportError(f"{directory}: fingerprint.pb is of another model than the manifest; export the model again")
    for name in operations.assets(graph).values():
        if f"assets/{name}" not in manifest.files:
            raise ExportError(f"{directory}: its graph names the asset {name!r}, which isn't in its manifest")
