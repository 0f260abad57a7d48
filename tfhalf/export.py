"""A SavedModel that stores its weights in half, serves with float32 inputs and outputs, and was verified.

How. The weights become float16 `tf.Variable`s of a plain `tf.Module` (Keras' own exporters store every variable
twice: https://github.com/keras-team/keras/issues/23553). Each signature is traced with those variables, cast back to
the layer's dtype, in place of the model's own (`keras.StatelessScope`). Several signatures share one set of variables:
`serving_default` computes as the model's layers say, `serving_float32` and `serving_bfloat16` as named, islands
staying float32 in all of them.

A variable stays float32 where the cast would make a number infinite or more than 1% of its numbers zero.

Order: write beside, run every signature in a fresh process on held-out inputs, compare with the training model,
hash, sync, rename. The version folder appears in one step, whole and verified, or not at all.

What a bundle is, its checks and loading it: `tfhalf.bundle`.

Source of the layout: TensorFlow Serving, https://www.tensorflow.org/tfx/serving/serving_config
"""

import contextlib
import dataclasses
import datetime
import functools
import importlib.metadata
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tensorflow_serving.apis import predict_pb2, prediction_log_pb2

from tfhalf import bundle, precision, publishing

# Largest difference to the training model, as a share of the largest output (at least 1). Weights are rounded to
# float16 (2^-11 of each); the dtype's own roundoff comes on top: 2^-24, 2^-11, 2^-8. About 20 roundings deep.
TOLERANCES = {"float32": 1e-2, "float16": 1e-2, "bfloat16": 8e-2}
# With float32 storage and float32 compute only the order of summation differs.
EXACT_TOLERANCE = 1e-4
_MAX_FLUSHED_SHARE = 0.01
_WARMUP_RECORDS = 4

# From what `serve` returns to what clients get.
Decide = Callable[[dict[str, tf.Tensor]], Mapping[str, tf.Tensor]]

_PACKAGES = ("tensorflow", "keras", "numpy", "protobuf")


def export_saved_model(
    model: keras.Model,
    directory: str | os.PathLike,
    *,
    inputs: np.ndarray | bundle.Arrays,
    serve: Callable[..., Mapping[str, tf.Tensor]] | None = None,
    input_signature: Mapping[str, tf.TensorSpec] | None = None,
    storage_dtype: str = "float16",
    tolerance: float | None = None,
    metadata: dict | Callable[[Path], dict] | None = None,
    decide: Decide | Mapping[str, Decide] | None = None,
    resources: Sequence[Any] = (),
) -> bundle.Manifest:
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
            signature; 0 to below 1. Default: `TOLERANCES`.
        metadata: JSON values for the manifest, or a function that gets the finished, not yet published folder and
            returns them; what it raises stops the publication.
        decide: the step after the last number, from `serve`'s outputs to what clients get: a choice that a rounding may
            turn, as the largest class or the boxes that stay (in a fixed number of rows). Each signature gets it, and a
            twin without it, `<name>_raw`. The twin is compared with the training model; of what is decided only names,
            shapes (but for the length of rows, `[batch, length]`), dtypes and that it is finite can be held to that, so
            judge it by its metric, in `metadata`.
            Several, by what is added to the signatures' names: `{"": beam_search, "_greedy": greedy_search}`.
        resources: what `serve` uses beside the model's weights: lookup tables, or `tf.Module`s that hold them.

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
    ...     outputs = bundle.load_saved_model(f"{folder}/1")(np.ones([3, 4], "float32"))
    >>> outputs["y"].shape, manifest.storage_dtype
    ((3, 2), 'float16')
    """
    directory = Path(directory)
    if storage_dtype not in TOLERANCES:
        raise bundle.ExportError(f"storage_dtype must be one of {', '.join(TOLERANCES)}, got {storage_dtype!r}")
    if tolerance is not None and not 0 <= tolerance < 1:
        raise bundle.ExportError(f"tolerance is a share of the largest output, 0 to below 1; got {tolerance}")
    if serve is None:
        serve, default_signature = _serve_model(model)
        input_signature = input_signature or default_signature
    if input_signature is None:
        raise bundle.ExportError("input_signature is missing: say the dtypes and shapes of serve's inputs")
    samples = bundle.named_arrays(inputs, input_signature)
    if not callable(metadata):
        metadata = plain_json(metadata or {})
    if os.path.lexists(directory):
        raise bundle.ExportError(f"{directory} exists; choose another version")
    with publishing.whole(directory) as stage:
        served = functools.partial(_served, serve=serve, decide=decide)
        return _write(model, stage, samples, served, input_signature, storage_dtype, tolerance, metadata, resources)


@dataclasses.dataclass(frozen=True)
class Signature:
    """A signature to be written.

    Attributes:
        function: traced, over variables that the module holds; returns a dict.
        expected: what the source model answers to the samples, by name.
        compute_dtypes: what it computes in.
        tolerance: as the manifest has it.
    """

    function: Any
    expected: dict[str, np.ndarray]
    compute_dtypes: list[str]
    tolerance: float | None


def _write(
    model, stage: Path, samples, served, input_signature, storage_dtype, tolerance, metadata, resources
) -> bundle.Manifest:
    """Fills the staging folder and verifies what it wrote."""
    variables, kept = _half_variables(model, storage_dtype)
    module = tf.Module()
    module.stored = [stored for _, stored in variables]
    module.resources = list(resources)
    signatures = {}
    for name, scope in _signature_scopes(model).items():
        with scope, precision.without_kernels(model):  # what a laptop exports runs natively on a GPU
            functions = served(name)
            for signature, function in functions.items():
                computes = sorted(precision.compute_dtypes(model))
                traced = _trace(function, input_signature, variables)
                # The same trace over the model's own float32 variables is what the artefact is compared with.
                own = _trace(function, input_signature, [])
                outputs = own(**{key: tf.constant(value) for key, value in samples.items()})
                expected = {key: bundle.bytes_not_objects(tensor.numpy()) for key, tensor in outputs.items()}
                allowed = tolerance_of(computes, storage_dtype) if tolerance is None else tolerance
                is_decided = name + bundle.RAW in functions and not signature.endswith(bundle.RAW)
                signatures[signature] = Signature(traced, expected, computes, None if is_decided else allowed)
    return write(stage, module, signatures, samples, storage_dtype, kept, metadata)


def write(
    stage: Path,
    module: tf.Module,
    signatures: Mapping[str, Signature],
    samples: bundle.Arrays,
    storage_dtype: str,
    kept: dict[str, str],
    metadata: dict | Callable[[Path], dict],
) -> bundle.Manifest:
    """Writes a bundle into a staging folder, and verifies it in a fresh process.

    Args:
        stage: an empty folder.
        module: holds the variables and tables of all signatures.
        signatures: by name.
        samples: sample inputs by name, of all signatures.
        storage_dtype: as the manifest has it.
        kept: as the manifest has it.
        metadata: JSON values for the manifest, or a function that gets the finished folder and returns them.

    Returns:
        The bundle's `Manifest`.

    Raises:
        ExportError: an operation can't be served; a signature differs from what is expected by more than its tolerance.
    """
    functions = {name: one.function for name, one in signatures.items()}
    try:
        tf.saved_model.save(module, str(stage), signatures=functions)
    except AssertionError as error:  # TensorFlow's way to say that a table or a variable isn't the module's
        raise bundle.ExportError(
            f"serve uses a resource that isn't a weight of the model or one of `resources`: {bundle.first_line(error)}"
        ) from error
    graph = bundle.check_operations(stage)
    (stage / bundle.EXTRA).mkdir()
    (stage / "assets").mkdir(exist_ok=True)
    expected = {f"{name}/{key}": array for name, one in signatures.items() for key, array in one.expected.items()}
    np.savez(stage / bundle.INPUTS, **{f"inputs/{name}": array for name, array in samples.items()})
    np.savez(stage / bundle.OUTPUTS, **expected)
    if "serving_default" in functions:
        _write_warmup(stage, functions["serving_default"].structured_input_signature[1], samples)
    errors = bundle.replay(stage)
    about = {name: bundle.signatures_of(graph)[name] for name in signatures}
    for name, one in signatures.items():
        bundle.check_errors(name, errors.get(name, {}), about[name]["outputs"].keys(), one.tolerance)
        about[name] |= {
            "compute_dtypes": one.compute_dtypes,
            "tolerance": one.tolerance,
            "max_error": errors[name],
        }
    manifest = bundle.Manifest(
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        versions={"tfhalf": sys.modules[__package__].__version__}
        | {name: importlib.metadata.version(name) for name in _PACKAGES},
        storage_dtype=storage_dtype,
        kept=kept,
        signatures=about,
        sizes=_sizes(stage),
        fingerprint=str(tf.saved_model.experimental.read_fingerprint(str(stage)).signature_def_hash),
        files=bundle.hashes(stage),
        metadata={},
    )
    manifest.write(stage)
    told = metadata(stage) if callable(metadata) else metadata
    manifest = dataclasses.replace(manifest, metadata=plain_json(told))
    manifest.write(stage)
    return manifest


def plain_json(metadata: dict) -> dict:
    """Returns metadata as it comes back from a manifest.

    Raises:
        ExportError: it can't be written there.
    """
    try:
        return json.loads(json.dumps(metadata))
    except (TypeError, ValueError) as error:
        raise bundle.ExportError(f"metadata must hold JSON values: {error}") from error


def _serve_model(model: keras.Model):
    """The model itself as the served function, with the names of its inputs and outputs."""
    if not getattr(model, "inputs", None):
        raise bundle.ExportError(f"model {model.name!r} doesn't know its input shapes; give serve and input_signature")
    names = [tensor.name for tensor in model.inputs]
    signature = {t.name: tf.TensorSpec([None, *t.shape[1:]], t.dtype, name=t.name) for t in model.inputs}

    def serve(**inputs):
        given = [inputs[name] for name in names] if len(names) > 1 else inputs[names[0]]
        if isinstance(getattr(model, "input", None), dict):  # a Sequential has no such attribute before it is called
            given = keras.tree.pack_sequence_as(model.input, [inputs[name] for name in names])
        outputs = model(given, training=False)
        return dict(zip(precision.output_names(model, outputs), tf.nest.flatten(outputs), strict=True))

    return serve, signature


def _half_variables(model: keras.Model, storage_dtype: str):
    """Returns [(Keras variable, stored tf.Variable)] and {name: why it kept its dtype}."""
    pairs, kept = [], {}
    for index, variable in enumerate(model.weights):
        value = keras.ops.convert_to_numpy(variable)
        dtype = variable.dtype
        if dtype == "float32":
            if not np.all(np.isfinite(value)):
                raise bundle.ExportError(f"weight {variable.path} holds non-finite values; the model can't be served")
            reason = why_keep(value, storage_dtype)
            if reason:
                kept[variable.path if variable.path not in kept else f"{variable.path} (weight {index})"] = reason
            else:
                dtype = storage_dtype
        pairs.append((variable, tf.Variable(tf.cast(value, dtype), trainable=False, name="stored")))
    return pairs, kept


def why_keep(value: np.ndarray, storage_dtype: str) -> str:
    """Says why an array of float32 can't be stored in half; "" where it can."""
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


def _served(name: str, serve, decide) -> dict[str, Callable]:
    """The functions behind one signature's name: with its decisions, and without."""
    if decide is None:
        return {name: serve}

    def decided(choose: Decide) -> Callable:
        return lambda **inputs: choose(serve(**inputs))

    decisions = decide if isinstance(decide, Mapping) else {"": decide}
    return {name + added: decided(choose) for added, choose in decisions.items()} | {name + bundle.RAW: serve}


def _trace(serve, input_signature, variables):
    """Traces `serve` with stored variables in place of the model's own."""

    def function(**inputs):
        mapping = [(variable, tf.cast(stored, variable.dtype)) for variable, stored in variables]
        with keras.StatelessScope(state_mapping=mapping):
            outputs = serve(**inputs)
        for name, tensor in outputs.items():
            if tensor.dtype.is_floating and tensor.dtype != tf.float32:
                raise bundle.ExportError(
                    f"output {name} is {tensor.dtype.name}, but a served output must be float32: give the layer "
                    'that makes it dtype="float32", or cast it in serve'
                )
        return {name: tf.identity(tensor, name=name) for name, tensor in outputs.items()}

    specs = {name: tf.TensorSpec(spec.shape, spec.dtype, name=name) for name, spec in input_signature.items()}
    return tf.function(function, autograph=False).get_concrete_function(**specs)


def tolerance_of(compute_dtypes: list[str], storage_dtype: str) -> float:
    """Returns the largest difference that a signature may have by default, from what it computes and stores in."""
    if storage_dtype == "float32" and set(compute_dtypes) == {"float32"}:
        return EXACT_TOLERANCE
    return max(TOLERANCES[dtype] for dtype in [*compute_dtypes, storage_dtype] if dtype in TOLERANCES)


def _write_warmup(stage: Path, specs: Mapping[str, tf.TensorSpec], samples: bundle.Arrays) -> None:
    """Writes single-example requests that TF Serving replays before it takes traffic."""
    arrays = {name: samples[name] for name in specs}
    is_batch = all(spec.shape.rank and spec.shape[0] is None for spec in specs.values())
    count = min(_WARMUP_RECORDS, *map(len, arrays.values())) if is_batch and arrays else 1
    with tf.io.TFRecordWriter(str(stage / bundle.EXTRA / "tf_serving_warmup_requests")) as writer:
        for index in range(count):
            request = predict_pb2.PredictRequest()
            request.model_spec.signature_name = "serving_default"
            for name, array in arrays.items():
                example = array[index : index + 1] if is_batch else array
                request.inputs[name].CopyFrom(tf.make_tensor_proto(example))
            log = prediction_log_pb2.PredictLog(request=request)
            writer.write(prediction_log_pb2.PredictionLog(predict_log=log).SerializeToString())


def _sizes(directory: Path) -> dict[str, int]:
    def total(paths):
        return sum(path.stat().st_size for path in paths if path.is_file())

    return {
        "variables": total((directory / "variables").iterdir()),
        "graph": (directory / "saved_model.pb").stat().st_size,
        "total": total(directory.rglob("*")),
    }
