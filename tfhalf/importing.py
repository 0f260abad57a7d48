"""A model that others trained becomes a bundle: its signatures as they are, its weights in half, checked like ours.

A SavedModel's graph is looked at before it is loaded (`tfhalf.operations`). Each signature is frozen - its functions
inlined, its variables turned into constants - and put into a new graph where float16 variables, cast once on the way
in, take the place of those constants. What the source answers to the sample inputs, in a fresh process, is what the
bundle is compared with. Names, dtypes and shapes of the signatures stay.

A Keras file (.keras, .h5) is loaded by Keras, without code that it may bring along, and exported as any model is.

What isn't brought along: how to train it, functions that aren't signatures.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tensorflow.core.framework import graph_pb2
from tensorflow.core.protobuf import meta_graph_pb2, saved_model_pb2
from tensorflow.python.framework import convert_to_constants

from tfhalf import bundle, export, operations, precision, publishing

_KERAS = (".keras", ".h5", ".hdf5")
# Random samples: how many rows, and how long every other open axis is.
_ROWS, _LENGTH = 4, 16
_WORDS = ("a", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "import", "print(1)")

Specs = dict[str, dict[str, tf.TensorSpec]]


def import_model(
    source: str | os.PathLike,
    directory: str | os.PathLike,
    *,
    inputs: bundle.Arrays | None = None,
    seed: int = 0,
    storage_dtype: str = "float16",
    tolerance: float | None = None,
    metadata: dict | None = None,
) -> bundle.Manifest:
    """Makes a verified bundle of a SavedModel's folder or a Keras file; publishes it in one rename, or not at all.

    Args:
        source: the folder, or the file (.keras, .h5).
        directory: the version folder, as `saved_models/name/1`; it must not exist.
        inputs: sample inputs by name, of all signatures. Default: random ones, four rows, 16 where another axis is
            open: numbers from 0 to 1, whole numbers 0 or 1, a few words.
        seed: of the random inputs.
        storage_dtype: "float16", "bfloat16" or "float32".
        tolerance: largest difference to the source's outputs, as a share of the largest output (at least 1). Default:
            as in `export_saved_model`.
        metadata: JSON values for the manifest.

    Returns:
        The bundle's `Manifest`; its metadata tells the source and the sample inputs.

    Raises:
        ExportError: the source can't be read, loaded or run; it holds an operation that can't be served; the bundle
            differs from it by more than the tolerance; the folder exists or can't be written.
    """
    source, directory = Path(source), Path(directory)
    if os.path.lexists(directory):
        raise bundle.ExportError(f"{directory} exists; choose another version")
    about = {"task": "imported", "source": source.name, "samples": "given" if inputs else f"random, seed {seed}"}
    given = {"inputs": inputs, "seed": seed, "storage_dtype": storage_dtype, "tolerance": tolerance}
    given["metadata"] = export.plain_json(about | (metadata or {}))
    if source.is_dir():
        return _import_saved_model(source, directory, **given)
    if source.suffix in _KERAS:
        return _import_keras(source, directory, **given)
    raise bundle.ExportError(f"{source} is neither a SavedModel's folder nor a Keras file ({', '.join(_KERAS)})")


def _import_keras(source: Path, directory: Path, *, inputs, seed: int, **given) -> bundle.Manifest:
    try:
        model = keras.saving.load_model(source, compile=False)  # its safe mode: no code out of the file
    except Exception as error:  # Keras raises whatever it comes across in old files
        raise bundle.ExportError(
            f"Keras {keras.__version__} can't load {source}: {bundle.first_line(error)}"
        ) from error
    specs = {t.name: tf.TensorSpec([None, *t.shape[1:]], t.dtype, name=t.name) for t in model.inputs}
    samples = dict(inputs or _random_samples(specs, seed))
    try:
        return export.export_saved_model(model, directory, inputs=samples, **given)
    except (ValueError, tf.errors.InvalidArgumentError) as error:
        raise _cannot_run(source, error) from error


def _import_saved_model(
    source: Path, directory: Path, *, inputs, seed: int, storage_dtype: str, tolerance: float | None, metadata: dict
) -> bundle.Manifest:
    if storage_dtype not in export.TOLERANCES:
        raise bundle.ExportError(f"storage_dtype must be one of {', '.join(export.TOLERANCES)}, got {storage_dtype!r}")
    proto = bundle.read_graph(source)
    if refused := operations.find_refused(proto):
        raise bundle.ExportError(f"{source}: {refused}; it can't be served")
    graph = _serving_graph(source, proto)
    samples = _samples(source, _specs(source, graph), inputs, seed)
    with tempfile.TemporaryDirectory() as scratch:
        readable = _without_training_state(source, proto, Path(scratch) / "source")
        np.savez(Path(scratch) / "inputs.npz", **{f"inputs/{name}": array for name, array in samples.items()})
        try:
            expected = bundle.run(readable, Path(scratch) / "inputs.npz")
        except bundle.ExportError as error:
            raise _cannot_run(source, error) from error
        loaded = tf.saved_model.load(str(readable), tags=list(graph.meta_info_def.tags))
        store = _Store(storage_dtype)
        signatures = {
            name: _signature(source, name, function, store, expected, tolerance)
            for name, function in loaded.signatures.items()
        }
        module = tf.Module()
        module.stored = store.variables
        module.resources = store.tables
        with publishing.whole(directory) as stage:
            return export.write(stage, module, signatures, samples, storage_dtype, store.kept, metadata)


def _signature(source: Path, name: str, function, store: "_Store", expected, tolerance) -> export.Signature:
    """What is to be written of a loaded signature."""
    try:
        traced, computes = _in_half(function, store)
    except (ValueError, tf.errors.OpError) as error:
        raise bundle.ExportError(
            f"{source}: TensorFlow {tf.__version__} can't make constants of the variables of {name}: "
            f"{bundle.first_line(error)}"
        ) from error
    allowed = export.tolerance_of(computes, store.storage_dtype) if tolerance is None else tolerance
    own = {key.removeprefix(f"{name}/"): array for key, array in expected.items() if key.startswith(f"{name}/")}
    return export.Signature(traced, own, computes, allowed)


def _cannot_run(source: Path, error: Exception) -> bundle.ExportError:
    return bundle.ExportError(
        f"{source} can't be run on these sample inputs; give others that it takes: {bundle.first_line(str(error))}"
    )


def _serving_graph(source: Path, proto: saved_model_pb2.SavedModel) -> meta_graph_pb2.MetaGraphDef:
    graphs = [graph for graph in proto.meta_graphs if "serve" in graph.meta_info_def.tags]
    if len(graphs) != 1:
        raise bundle.ExportError(f"{source} has {len(graphs)} graphs to serve; it must have one")
    return graphs[0]


def _specs(source: Path, graph: meta_graph_pb2.MetaGraphDef) -> Specs:
    """The signatures' inputs."""
    found = {}
    for name, signature in bundle.signatures_of(graph).items():
        found[name] = {
            key: tf.TensorSpec(about["shape"], about["dtype"], name=key) for key, about in signature["inputs"].items()
        }
    if not found:
        raise bundle.ExportError(f"{source} has no signature: nothing says what it takes and gives")
    return found


def _samples(source: Path, specs: Specs, inputs: bundle.Arrays | None, seed: int) -> dict[str, np.ndarray]:
    """One array for each name; signatures that take inputs of one name share it."""
    names: dict[str, tf.TensorSpec] = {}
    for one in specs.values():
        for key, spec in one.items():
            if names.setdefault(key, spec) != spec:
                raise bundle.ExportError(f"{source}: its signatures take several kinds of {key}; import them apart")
    return bundle.named_arrays(_random_samples(names, seed) if inputs is None else inputs, names)


def _random_samples(specs: Mapping[str, tf.TensorSpec], seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    samples = {}
    for name, spec in specs.items():
        sides = spec.shape.as_list() if spec.shape.rank is not None else [None]
        shape = [side if side is not None else _LENGTH if index else _ROWS for index, side in enumerate(sides)]
        if spec.dtype == tf.string:
            texts = [" ".join(random.choice(_WORDS, 8)).encode() for _ in range(int(np.prod(shape)))]
            samples[name] = np.array(texts).reshape(shape)
        elif spec.dtype.is_floating:
            samples[name] = random.uniform(size=shape).astype(spec.dtype.as_numpy_dtype)
        else:
            samples[name] = random.integers(0, 2, shape).astype(spec.dtype.as_numpy_dtype)
    return samples


def _without_training_state(source: Path, proto: saved_model_pb2.SavedModel, scratch: Path) -> Path:
    """A copy of the SavedModel that loads without the optimizer: old ones have slots that TensorFlow can't load."""
    changed = saved_model_pb2.SavedModel.FromString(proto.SerializeToString())
    for graph in changed.meta_graphs:
        for node in graph.object_graph_def.nodes:
            del node.slot_variables[:]
            if node.user_object.identifier == "optimizer":  # as one, it needs Keras to be loaded
                node.user_object.identifier = "_generic_user_object"
    shutil.copytree(source, scratch, symlinks=False)
    (scratch / bundle.GRAPH).write_bytes(changed.SerializeToString())
    return scratch


class _Store:
    """The weights and lookup tables as they will be stored; each once, whichever signatures use it."""

    def __init__(self, storage_dtype: str):
        self.storage_dtype = storage_dtype
        self.kept: dict[str, str] = {}
        self._stored: dict[int, tf.Variable] = {}
        self._tables: dict[Any, tf.lookup.StaticHashTable] = {}

    @property
    def variables(self) -> list[tf.Variable]:
        """All of them."""
        return list(self._stored.values())

    @property
    def tables(self) -> list[tf.lookup.StaticHashTable]:
        """All of them."""
        return list(self._tables.values())

    def of(self, variable: tf.Variable) -> tf.Variable:
        """What is stored for a variable."""
        key = id(variable.handle)
        if key not in self._stored:
            value, dtype = variable.numpy(), variable.dtype
            if dtype == tf.float32:
                if reason := export.why_keep(value, self.storage_dtype):
                    self.kept[variable.name if variable.name not in self.kept else f"{variable.name} ({key})"] = reason
                else:
                    dtype = tf.as_dtype(self.storage_dtype)
            self._stored[key] = tf.Variable(
                tf.cast(value, dtype) if dtype != variable.dtype else value, trainable=False
            )
        return self._stored[key]

    def table_of(self, handle: tf.Tensor, key: Any, graph: graph_pb2.GraphDef) -> tf.lookup.StaticHashTable:
        """A table with the entries of a loaded one; an Estimator's can't be saved again as they are."""
        nodes = [*graph.node, *(node for function in graph.library.function for node in function.node_def)]
        finds = [node.attr for node in nodes if node.op == "LookupTableFindV2"]
        for keys, values in {(attributes["Tin"].type, attributes["Tout"].type) for attributes in finds}:
            if key in self._tables:
                break
            with contextlib.suppress(tf.errors.InvalidArgumentError):  # another table's kinds
                entries = tf.raw_ops.LookupTableExportV2(table_handle=handle, Tkeys=keys, Tvalues=values)
                rows = tf.lookup.KeyValueTensorInitializer(*entries)
                default = tf.zeros([], values)  # isn't used: each look-up brings its own
                self._tables[key] = tf.lookup.StaticHashTable(rows, default)
        if key not in self._tables:
            raise ValueError("it uses a resource that is neither a variable nor a lookup table")
        return self._tables[key]


def _in_half(function, store: _Store) -> tuple[Any, list[str]]:
    """Traces a loaded signature over the stored variables; returns it, and what it computes in."""
    specs = function.structured_input_signature[1]
    names = {f"sample_input_{index}": name for index, name in enumerate(specs)}
    wrapped = tf.function(
        lambda **given: function(**{names[key]: value for key, value in given.items()}), autograph=False
    )
    plain = wrapped.get_concrete_function(
        **{key: tf.TensorSpec(specs[name].shape, specs[name].dtype, name=key) for key, name in names.items()}
    )
    # TensorFlow's own converters call this; there is no public name for it. Functions are inlined before variables are
    # looked for: it loses those that an Estimator's function gathers rows of.
    frozen = convert_to_constants.convert_variables_to_constants_v2(
        plain, lower_control_flow=False, aggressive_inlining=True
    )
    graph_def = frozen.graph.as_graph_def()
    variables = {id(variable.handle): variable for variable in plain.graph.variables}
    captured = {internal.op.name: external for external, internal in plain.graph.captures}
    outputs = [tensor.name for tensor in frozen.outputs]

    present = {node.name for node in graph_def.node}
    stored, tables = {}, _tables(graph_def, store)
    for name, external in captured.items():
        if id(external) in variables:
            stored[name] = (store.of(variables[id(external)]), variables[id(external)].dtype)
        elif external.dtype == tf.resource and name in present:
            tables[name] = store.table_of(external, id(external), graph_def)

    def serve(**inputs):
        feeds = {key: inputs[name] for key, name in names.items()}
        feeds |= {name: tf.cast(variable.value(), dtype) for name, (variable, dtype) in stored.items()}
        feeds |= {name: tf.identity(table.resource_handle) for name, table in tables.items()}
        others = captured.keys() - feeds.keys()
        feeds |= {name: tf.identity(captured[name]) for name in others & present}
        feeds = {f"{name}:0": tensor for name, tensor in feeds.items() if name in present}
        tensors = tf.graph_util.import_graph_def(graph_def, input_map=feeds, return_elements=outputs, name="")
        answers = zip(sorted(function.structured_outputs), tensors, strict=True)
        return {name: tf.identity(tensor, name=name) for name, tensor in answers}

    kinds = {tensor.dtype.name for one in frozen.graph.get_operations() for tensor in one.outputs}
    named = {name: tf.TensorSpec(spec.shape, spec.dtype, name=name) for name, spec in specs.items()}
    traced = tf.function(serve, autograph=False).get_concrete_function(**named)
    return traced, sorted(kinds & {*precision.FORMATS, "float64"})


def _tables(graph: graph_pb2.GraphDef, store: _Store) -> dict[str, tf.lookup.StaticHashTable]:
    """Replaces tables that the graph itself makes, as an Estimator's does, by inputs; returns what to feed them."""
    found = {}
    for node in graph.node:
        if node.op == "HashTableV2":
            shared_name = node.attr["shared_name"].s
            # By this name it is the one that was filled when the SavedModel was loaded.
            handle = tf.raw_ops.HashTableV2(
                key_dtype=node.attr["key_dtype"].type,
                value_dtype=node.attr["value_dtype"].type,
                container=node.attr["container"].s,
                shared_name=shared_name,
            )
            found[node.name] = store.table_of(handle, shared_name, graph)
            node.op = "Placeholder"
            node.attr.clear()
            node.attr["dtype"].type = tf.resource.as_datatype_enum
    return found
