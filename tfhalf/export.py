"""A SavedModel that stores its weights in half, serves with float32 inputs and outputs, and was verified.

How. The weights become float16 `tf.Variable`s of a plain `tf.Module` (Keras' own exporters store every variable
twice). Each signature is traced with those variables, cast back to the layer's dtype, in place of the model's own
(`keras.StatelessScope`). Several signatures share one set of variables: `serving_default` computes as the model's
layers say, `serving_float32` and `serving_bfloat16` as named, islands staying float32 in all of them.

A variable stays float32 where the cast would make a number infinite or more than 1% of its numbers zero.

Order: write beside, run every signature in a fresh process on held-out inputs, compare with the training model,
hash, sync, rename. The version folder appears in one step, whole and verified, or not at all.

`manifest.json` guards against damage and mix-ups, not against an attacker: whoever can write the folder can write
the manifest too.

Source of the layout: TensorFlow Serving, https://www.tensorflow.org/tfx/serving/serving_config
"""

import contextlib
import dataclasses
import datetime
import fcntl
import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2
from tensorflow_serving.apis import predict_pb2, prediction_log_pb2

from tfhalf import precision

# Largest difference to the training model, as a share of the largest output (at least 1). Weights are rounded to
# float16 (2^-11 of each); the dtype's own roundoff comes on top: 2^-24, 2^-11, 2^-8. About 20 roundings deep.
TOLERANCES = {"float32": 1e-2, "float16": 1e-2, "bfloat16": 8e-2}
# With float32 storage and float32 compute only the order of summation differs.
EXACT_TOLERANCE = 1e-4
_MAX_FLUSHED_SHARE = 0.01
_WARMUP_RECORDS = 4

_EXTRA = "assets.extra"
_MANIFEST = f"{_EXTRA}/manifest.json"
_INPUTS = f"{_EXTRA}/sample_inputs.npz"
_OUTPUTS = f"{_EXTRA}/sample_outputs.npz"
_PACKAGES = ("tensorflow", "keras", "numpy", "protobuf")

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
            names to {"dtype", "shape"}; max_error maps outputs to the largest difference seen.
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


def export_saved_model(
    model: keras.Model,
    directory: str | os.PathLike,
    *,
    inputs: np.ndarray | Arrays,
    serve: Callable[..., Mapping[str, tf.Tensor]] | None = None,
    input_signature: Mapping[str, tf.TensorSpec] | None = None,
    storage_dtype: str = "float16",
    tolerance: float | None = None,
    metadata: dict | Callable[[Path], dict] | None = None,
) -> Manifest:
    """Writes a verified SavedModel; publishes it in one rename, or not at all.

    Args:
        model: a built model with float32 outputs.
        directory: the version folder, as `saved_models/name/1`; it must not exist.
        inputs: held-out sample inputs, by name, or one array where there is one input. They are stored in the bundle.
        serve: what clients call: takes the named inputs as keyword arguments and returns named float32 (or integer or
            string) tensors. It may hold pre- and post-processing. Default: the model itself.
        input_signature: name to `tf.TensorSpec`, for `serve`. Default: the model's own inputs.
        storage_dtype: "float16", "bfloat16" or "float32".
        tolerance: largest difference to the training model, as a share of the largest output (at least 1), in every
            signature. Default: `TOLERANCES`.
        metadata: JSON values for the manifest, or a function that gets the finished, not yet published folder and
            returns them; what it raises stops the publication.

    Returns:
        The bundle's `Manifest`.

    Raises:
        ExportError: the folder exists or can't be written; a weight isn't finite; an output is half; an operation can't
            be served; a signature differs from the training model by more than the tolerance.

    Example:

    >>> import tempfile
    >>> model = keras.Sequential([keras.Input([4], name="x"), keras.layers.Dense(2, name="y")])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     manifest = export_saved_model(model, f"{folder}/1", inputs=np.ones([3, 4], "float32"))
    ...     outputs = load_saved_model(f"{folder}/1")(np.ones([3, 4], "float32"))
    >>> outputs["y"].shape, manifest.storage_dtype
    ((3, 2), 'float16')
    """
    directory = Path(directory)
    if storage_dtype not in TOLERANCES:
        raise ExportError(f"storage_dtype must be one of {', '.join(TOLERANCES)}, got {storage_dtype!r}")
    if serve is None:
        serve, default_signature = _serve_model(model)
        input_signature = input_signature or default_signature
    if input_signature is None:
        raise ExportError("input_signature is missing: say the dtypes and shapes of serve's inputs")
    samples = _named(inputs, input_signature)
    if not callable(metadata):
        metadata = _plain_json(metadata or {})
    if os.path.lexists(directory):
        raise ExportError(f"{directory} exists; choose another version")
    try:
        with _staging(directory) as stage:
            manifest = _write(model, stage, samples, serve, input_signature, storage_dtype, tolerance, metadata)
            _publish(stage, directory)
    except (OSError, tf.errors.OpError) as error:
        raise ExportError(f"can't write {directory}: {_first_line(error)}; nothing was published") from error
    return manifest


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
    _check_operations(directory)
    errors = _replay(directory)
    for name, signature in manifest.signatures.items():
        _check_errors(name, errors.get(name, {}), signature["max_error"].keys(), signature["tolerance"])
    return manifest


def load_saved_model(
    directory: str | os.PathLike, signature: str = "serving_default"
) -> Callable[[np.ndarray | Arrays], dict[str, np.ndarray]]:
    """Loads a bundle's signature after checking every file's hash.

    Args:
        directory: the version folder.
        signature: "serving_default", "serving_float32" or "serving_bfloat16".

    Returns:
        A function from inputs (arrays by name, or one array) to float32 arrays by name.

    Raises:
        ExportError: a file was changed, is missing or is new; there is no such signature.
    """
    directory = Path(directory)
    manifest = _check_files(directory)
    _check_operations(directory)
    if signature not in manifest.signatures:
        raise ExportError(f"{directory} has no signature {signature!r}; it has {', '.join(manifest.signatures)}")
    loaded = tf.saved_model.load(str(directory))
    specs = loaded.signatures[signature].structured_input_signature[1]

    def call(inputs: np.ndarray | Arrays) -> dict[str, np.ndarray]:
        arrays = _named(inputs, specs)
        # `loaded` must live as long as the function: it owns the variables.
        outputs = loaded.signatures[signature](**{name: tf.constant(array) for name, array in arrays.items()})
        return {name: tensor.numpy() for name, tensor in outputs.items()}

    return call


def _write(model, stage: Path, samples, serve, input_signature, storage_dtype, tolerance, metadata) -> Manifest:
    """Fills the staging folder and verifies what it wrote."""
    variables, kept = _half_variables(model, storage_dtype)
    module = tf.Module()
    module.stored = [stored for _, stored in variables]
    functions, expected, computes = {}, {}, {}
    for name, scope in _signature_scopes(model).items():
        with scope:
            computes[name] = sorted(precision.compute_dtypes(model))
            functions[name] = _trace(serve, input_signature, variables)
            # The same trace over the model's own float32 variables is what the artefact is compared with.
            outputs = _trace(serve, input_signature, [])(**{key: tf.constant(value) for key, value in samples.items()})
            expected |= {f"{name}/{key}": _bytes_not_objects(tensor.numpy()) for key, tensor in outputs.items()}
    try:
        tf.saved_model.save(module, str(stage), signatures=functions)
    except AssertionError as error:  # TensorFlow's way to say that a table or a variable isn't the module's
        raise ExportError(f"serve uses a resource that isn't a weight of the model: {_first_line(error)}") from error
    _check_operations(stage)
    (stage / _EXTRA).mkdir()
    (stage / "assets").mkdir(exist_ok=True)
    np.savez(stage / _INPUTS, **{f"inputs/{name}": array for name, array in samples.items()})
    np.savez(stage / _OUTPUTS, **expected)
    _write_warmup(stage, samples)
    errors = _replay(stage)
    signatures = {}
    for name, function in functions.items():
        allowed = _tolerance(computes[name], storage_dtype) if tolerance is None else tolerance
        outputs = dict(function.structured_outputs)
        _check_errors(name, errors.get(name, {}), outputs.keys(), allowed)
        signatures[name] = {
            "inputs": {key: _about(spec) for key, spec in input_signature.items()},
            "outputs": {key: _about(tensor) for key, tensor in outputs.items()},
            "compute_dtypes": computes[name],
            "tolerance": allowed,
            "max_error": errors[name],
        }
    manifest = Manifest(
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        versions={"tfhalf": sys.modules[__package__].__version__}
        | {name: importlib.metadata.version(name) for name in _PACKAGES},
        storage_dtype=storage_dtype,
        kept=kept,
        signatures=signatures,
        sizes=_sizes(stage),
        fingerprint=str(tf.saved_model.experimental.read_fingerprint(str(stage)).signature_def_hash),
        files=_hashes(stage),
        metadata={},
    )
    manifest.write(stage)
    about = metadata(stage) if callable(metadata) else metadata
    manifest = dataclasses.replace(manifest, metadata=_plain_json(about))
    manifest.write(stage)
    return manifest


def _plain_json(metadata: dict) -> dict:
    try:
        return json.loads(json.dumps(metadata))
    except (TypeError, ValueError) as error:
        raise ExportError(f"metadata must hold JSON values: {error}") from error


def _serve_model(model: keras.Model):
    """The model itself as the served function, with the names of its inputs and outputs."""
    if not getattr(model, "inputs", None):
        raise ExportError(f"model {model.name!r} doesn't know its input shapes; give serve and input_signature")
    names = [tensor.name for tensor in model.inputs]
    signature = {t.name: tf.TensorSpec([None, *t.shape[1:]], t.dtype, name=t.name) for t in model.inputs}

    def serve(**inputs):
        outputs = model([inputs[name] for name in names] if len(names) > 1 else inputs[names[0]], training=False)
        return dict(zip(precision.output_names(model, outputs), tf.nest.flatten(outputs), strict=True))

    return serve, signature


def _named(inputs, signature: Mapping[str, tf.TensorSpec]) -> dict[str, np.ndarray]:
    """Checks inputs against a signature; one bare array stands for the only input."""
    wanted = ", ".join(f"{name} {spec.dtype.name}{spec.shape}" for name, spec in signature.items())
    if not isinstance(inputs, Mapping):
        if len(signature) != 1:
            raise ExportError(f"inputs must be a dict of {wanted}; got {type(inputs).__name__}")
        inputs = {next(iter(signature)): inputs}
    if inputs.keys() != signature.keys():
        raise ExportError(f"inputs must be {wanted}; got {', '.join(map(str, inputs)) or 'none'}")
    arrays = {name: _bytes_not_objects(np.asarray(inputs[name])) for name in signature}
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


def _bytes_not_objects(array: np.ndarray) -> np.ndarray:
    """Strings as TensorFlow gives them, in an array that can be stored without pickle."""
    return array.astype("S") if array.dtype.kind == "O" else array


def _half_variables(model: keras.Model, storage_dtype: str):
    """Returns [(Keras variable, stored tf.Variable)] and {name: why it kept its dtype}."""
    pairs, kept = [], {}
    for index, variable in enumerate(model.weights):
        value = keras.ops.convert_to_numpy(variable)
        dtype = variable.dtype
        if dtype == "float32":
            if not np.all(np.isfinite(value)):
                raise ExportError(f"weight {variable.path} holds non-finite values; the model can't be served")
            reason = _why_keep(value, storage_dtype)
            if reason:
                kept[variable.path if variable.path not in kept else f"{variable.path} (weight {index})"] = reason
            else:
                dtype = storage_dtype
        pairs.append((variable, tf.Variable(tf.cast(value, dtype), trainable=False, name="stored")))
    return pairs, kept


def _why_keep(value: np.ndarray, storage_dtype: str) -> str:
    if not value.size:
        return ""
    stored = tf.cast(tf.cast(value, storage_dtype), tf.float32).numpy()
    overflown = int(np.sum(~np.isfinite(stored)))
    if overflown:
        largest = np.abs(value).max()
        return f"{overflown} of its {value.size} values are too large for {storage_dtype} (largest {largest:g})"
    flushed = np.sum((value != 0) & (stored == 0)) / max(1, np.sum(value != 0))
    if flushed > _MAX_FLUSHED_SHARE:
        return f"{flushed:.1%} of its values would become 0 in {storage_dtype}"
    return ""


def _signature_scopes(model: keras.Model) -> dict[str, contextlib.AbstractContextManager]:
    """Signature name to the scope it is traced in; a model without half layers has no bfloat16 variant."""
    scopes: dict[str, contextlib.AbstractContextManager] = {
        "serving_default": contextlib.nullcontext(),
        "serving_float32": precision.computing_in(model, "float32"),
    }
    if precision.compute_dtypes(model) & set(precision.HALF_DTYPES):
        scopes["serving_bfloat16"] = precision.computing_in(model, "bfloat16")
    return scopes


def _trace(serve, input_signature, variables):
    """Traces `serve` with stored variables in place of the model's own."""

    def function(**inputs):
        mapping = [(variable, tf.cast(stored, variable.dtype)) for variable, stored in variables]
        with keras.StatelessScope(state_mapping=mapping):
            outputs = serve(**inputs)
        for name, tensor in outputs.items():
            if tensor.dtype.is_floating and tensor.dtype != tf.float32:
                raise ExportError(
                    f"output {name} is {tensor.dtype.name}, but a served output must be float32: give the layer "
                    'that makes it dtype="float32", or cast it in serve'
                )
        return {name: tf.identity(tensor, name=name) for name, tensor in outputs.items()}

    specs = {name: tf.TensorSpec(spec.shape, spec.dtype, name=name) for name, spec in input_signature.items()}
    return tf.function(function, autograph=False).get_concrete_function(**specs)


def _tolerance(compute_dtypes: list[str], storage_dtype: str) -> float:
    if storage_dtype == "float32" and set(compute_dtypes) == {"float32"}:
        return EXACT_TOLERANCE
    return max(TOLERANCES[dtype] for dtype in [*compute_dtypes, storage_dtype] if dtype in TOLERANCES)


def _about(spec) -> dict[str, Any]:
    return {"dtype": spec.dtype.name, "shape": list(spec.shape)}


def _write_warmup(stage: Path, samples: Arrays) -> None:
    """Writes single-example requests that TF Serving replays before it takes traffic."""
    count = min(_WARMUP_RECORDS, min(len(array) for array in samples.values()))
    with tf.io.TFRecordWriter(str(stage / _EXTRA / "tf_serving_warmup_requests")) as writer:
        for index in range(count):
            request = predict_pb2.PredictRequest()
            request.model_spec.signature_name = "serving_default"
            for name, array in samples.items():
                request.inputs[name].CopyFrom(tf.make_tensor_proto(array[index : index + 1]))
            log = prediction_log_pb2.PredictLog(request=request)
            writer.write(prediction_log_pb2.PredictionLog(predict_log=log).SerializeToString())


def _replay(directory: Path) -> dict[str, dict[str, float]]:
    """Runs every signature in a fresh process; returns signature -> output -> largest difference to the expected."""
    with tempfile.TemporaryDirectory() as scratch:
        outputs = Path(scratch) / "outputs.npz"
        script = Path(__file__).with_name("replay.py")
        result = subprocess.run(
            [sys.executable, "-P", str(script), str(directory), str(directory / _INPUTS), str(outputs)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode != 0:
            raise ExportError(f"{directory} can't be run in a fresh process: {_first_line(result.stderr)}")
        with np.load(outputs, allow_pickle=False) as file:
            seen = dict(file)
    with np.load(directory / _OUTPUTS, allow_pickle=False) as file:
        expected = dict(file)
    if seen.keys() != expected.keys():
        raise ExportError(f"{directory}: expected the outputs {sorted(expected)}, got {sorted(seen)}")
    errors: dict[str, dict[str, float]] = {}
    for key, array in seen.items():
        signature, name = key.split("/", 1)
        errors.setdefault(signature, {})[name] = _difference(array, expected[key])
    return errors


def _difference(seen: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference as a share of the largest expected value (at least 1); infinite for a wrong shape or a NaN."""
    if seen.shape != expected.shape or seen.dtype != expected.dtype:
        return float("inf")
    if seen.dtype.kind != "f":
        return 0.0 if np.array_equal(seen, expected) else float("inf")
    if not np.all(np.isfinite(seen)) or not np.all(np.isfinite(expected)):
        return float("inf")
    return float(np.max(np.abs(seen - expected), initial=0.0) / max(1.0, np.max(np.abs(expected), initial=0.0)))


def _check_errors(signature: str, errors: dict[str, float], outputs, tolerance: float) -> None:
    for name in outputs:
        error = errors.get(name, float("inf"))
        if not error <= tolerance:
            raise ExportError(
                f"{signature}: {name} differs from the training model by {error:.3g}, more than the tolerance "
                f"{tolerance:g} (inf: another shape, dtype, or a non-finite value). Keep the layers "
                "that overflow in float32 with a PrecisionPlan, or store in float32"
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


def _check_operations(directory: Path) -> None:
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


def _hashes(directory: Path) -> dict[str, dict[str, Any]]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {
        str(path.relative_to(directory)): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in files
        if str(path.relative_to(directory)) != _MANIFEST
    }


def _sizes(directory: Path) -> dict[str, int]:
    def total(paths):
        return sum(path.stat().st_size for path in paths if path.is_file())

    return {
        "variables": total((directory / "variables").iterdir()),
        "graph": (directory / "saved_model.pb").stat().st_size,
        "total": total(directory.rglob("*")),
    }


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _staging(directory: Path) -> Iterator[Path]:
    """Gives a folder beside the target, removes it on failure, and sweeps up those of exports that were killed."""
    parent = directory.parent
    parent.mkdir(parents=True, exist_ok=True)
    with _locked(parent):
        for leftover in parent.glob(".staging-*"):
            with contextlib.suppress(OSError), _locked(leftover, wait=False):  # in use, just published, or not ours
                shutil.rmtree(leftover)
        stage = parent / f".staging-{directory.name}-{uuid.uuid4().hex[:8]}"
        stage.mkdir()
        lock = contextlib.ExitStack()
        lock.enter_context(_locked(stage))
    with lock:
        try:
            yield stage
        finally:
            shutil.rmtree(stage, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path, wait: bool = True) -> Iterator[None]:
    """Holds a lock on a folder that ends with the process, however it ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _publish(stage: Path, directory: Path) -> None:
    """Brings everything to disk, then renames; a version that appeared meanwhile isn't replaced."""
    for path in [*stage.rglob("*"), stage]:
        _sync(path)
    if os.path.lexists(directory):
        raise ExportError(f"{directory} exists; choose another version")
    stage.rename(directory)  # fails where the target is a folder with something in it
    _sync(directory.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _first_line(error) -> str:
    """The line of an error or of a process' output that says what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    return lines[-1] if isinstance(error, str) else lines[0]
