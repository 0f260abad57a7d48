"""A bundle's signature as one graph of constants: what every converter starts from.

Variables become constants, and the casts from the dtype that is stored to the one that is computed in are done here,
once: left in the graph, a runtime would do them on each call. What remains is a SavedModel with one signature and no
variables, of TensorFlow's own operations; no Keras is needed.

Refused is what no runtime but TensorFlow takes: strings and lookup tables. Whether there is a converter for each of the
other operations is the converters' to say.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import tensorflow as tf
from tensorflow.core.framework import graph_pb2, node_def_pb2
from tensorflow.python.framework import convert_to_constants

from tfhalf import bundle, folding, lowering

SIGNATURE = "serving_default"  # of what `Frozen.save` writes
_TABLES = ("LookupTable", "HashTable", "MutableHashTable", "AnonymousHashTable", "AnonymousMutable", "MutableDense")
# Which input of an operation on a loop's lists is the shape of what they hold. Keras' recurrent layers fix it when they
# are traced: for a batch of any size.
_LIST_SHAPES = {"TensorListReserve": 0, "TensorListFromTensor": 1, "TensorListGetItem": 2, "TensorListStack": 1}
_MOST_BYTES = 2**31 - 2**24  # a graph is a protocol buffer, which holds less than 2 GiB; some is the operations'


@dataclasses.dataclass(frozen=True)
class Frozen:
    """A signature without variables.

    Attributes:
        graph: its operations and constants; the inputs aren't in it.
        inputs: name to `tf.TensorSpec`.
        feeds: name of an input to the tensor in the graph that it is.
        fetches: name of an output to the tensor in the graph that it is.
    """

    graph: graph_pb2.GraphDef
    inputs: dict[str, tf.TensorSpec]
    feeds: dict[str, str]
    fetches: dict[str, str]

    @property
    def takes_any_batch(self) -> bool:
        """Whether the first dimension of each input is open."""
        shapes = [spec.shape for spec in self.inputs.values()]
        return all(shape.rank and shape[0] is None for shape in shapes)

    @property
    def has_loops(self) -> bool:
        """Whether there is a loop, as recurrent layers are."""
        return any(node.op in ("While", "StatelessWhile") for node in self.graph.node)

    def fix(self, shapes: Mapping[str, Sequence[int | None]]) -> "Frozen":
        """Returns it with other shapes of its inputs, and all that follows from them as constants.

        Sizes and conditions came from operations on the inputs' shapes, which not every converter computes.

        Args:
            shapes: of each input; the first dimension is the batch.
        """
        inputs = {name: tf.TensorSpec(shapes[name], spec.dtype, name=name) for name, spec in self.inputs.items()}
        given = {tensor: inputs[name] for name, tensor in self.feeds.items()}
        folded, fetches = folding.fold(self.graph, given, list(self.fetches.values()))
        read = {name for node in folded.node for name in _tensors(node)}
        feeds = {name: tensor for name, tensor in self.feeds.items() if tensor in read}
        (batch,) = {shape[0] for shape in shapes.values()}
        for nodes in (folded.node, *(function.node_def for function in folded.library.function)):
            _fix_lists(nodes, batch)
        _rename_functions(folded, "".join(f"_{side}" for shape in shapes.values() for side in shape))
        return Frozen(folded, inputs, feeds, dict(zip(self.fetches, fetches, strict=True)))

    def save(self, folder: Path) -> None:
        """Writes it as a SavedModel with one signature, `SIGNATURE`.

        Args:
            folder: made here.
        """
        specs = {name: tf.TensorSpec(spec.shape, spec.dtype, name=name) for name, spec in self.inputs.items()}

        def call(**inputs):
            given = {tensor: inputs[name] for name, tensor in self.feeds.items()}
            wanted = list(self.fetches.values())
            tensors = tf.graph_util.import_graph_def(self.graph, given, wanted, name="frozen")
            return {name: tf.identity(tensor, name=name) for name, tensor in zip(self.fetches, tensors, strict=True)}

        function = tf.function(call, autograph=False).get_concrete_function(**specs)
        tf.saved_model.save(tf.Module(), str(folder), signatures={SIGNATURE: function})


def freeze(directory: Path, signature: str) -> Frozen:
    """Freezes a signature of a bundle, which was checked.

    Args:
        directory: the version folder.
        signature: one that it has.

    Returns:
        The signature, frozen.

    Raises:
        ExportError: it takes or gives strings, uses a lookup table, or is too large for one graph.
    """
    stored = sum(path.stat().st_size for path in (directory / "variables").iterdir())
    if 2 * stored > _MOST_BYTES:
        raise bundle.ExportError(
            f"{directory}: its weights may come to {2 * stored / 1e9:.1f} GB in float32, and a graph holds 2: "
            "serve the bundle itself"
        )
    loaded = tf.saved_model.load(str(directory))
    function = loaded.signatures[signature]
    specs = dict(sorted(function.structured_input_signature[1].items()))
    # TensorFlow's own converters call this; there is no public name for it. Loops stay whole: converters know them so.
    frozen = convert_to_constants.convert_variables_to_constants_v2(function, lower_control_flow=False)
    graph = frozen.graph.as_graph_def()
    _refuse(directory, signature, graph, specs, function.structured_outputs)
    feeds = {name: tensor.name for name, tensor in zip(specs, function.inputs, strict=False)}
    fetches = {name: t.name for name, t in zip(sorted(function.structured_outputs), frozen.outputs, strict=True)}
    graph = _fold_casts(_without_order(graph))
    given = {tensor: specs[name] for name, tensor in feeds.items()}
    graph, inputs, outputs = lowering.lower(graph, given, list(fetches.values()))
    feeds, fetches = dict(zip(feeds, inputs, strict=True)), dict(zip(fetches, outputs, strict=True))
    outputs = [tensor.partition(":")[0] for tensor in fetches.values()]
    needed = folding.behind(graph, outputs)
    read = {name: tensor for name, tensor in feeds.items() if tensor.partition(":")[0] in needed}
    _keep(graph, lambda node: node.name in needed and (node.op != "Placeholder" or node.name in outputs))
    return Frozen(graph, specs, read, fetches)


def _fix_lists(nodes, batch: int) -> None:
    """Fixes the first dimension of what a loop's lists hold, where that is the only one that is open."""
    named = {node.name: node for node in nodes}
    for node in list(nodes):
        place = _LIST_SHAPES.get(node.op)
        constant = None if place is None else named.get(node.input[place].partition(":")[0])
        if constant is None or constant.op != "Const":
            continue
        shape = tf.make_ndarray(constant.attr["value"].tensor)
        if shape.ndim == 1 and shape.size and shape[0] == -1 and np.all(shape[1:] >= 0):
            fixed = nodes.add()
            fixed.CopyFrom(constant)
            fixed.name = f"{node.name}_fixed"
            value = np.array([batch, *shape[1:]], shape.dtype)
            fixed.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(value))
            node.input[place] = fixed.name if ":" not in node.input[place] else f"{fixed.name}:output:0"


def _rename_functions(graph: graph_pb2.GraphDef, suffix: str) -> None:
    """Gives a graph's functions other names: a process knows one function by a name."""
    names = {function.signature.name for function in graph.library.function}
    for function in graph.library.function:
        function.signature.name += suffix
    for node in [*graph.node, *(node for function in graph.library.function for node in function.node_def)]:
        node.op += suffix if node.op in names else ""
        for attribute in node.attr.values():
            for function in [attribute.func, *attribute.list.func]:
                if function.name in names:
                    function.name += suffix


def _tensors(node: node_def_pb2.NodeDef) -> list[str]:
    """The tensors that an operation reads, by their whole names."""
    return [name if ":" in name else f"{name}:0" for name in node.input]


def _keep(graph: graph_pb2.GraphDef, wanted: Callable[[node_def_pb2.NodeDef], bool]) -> None:
    kept = [node for node in graph.node if wanted(node)]
    del graph.node[:]
    graph.node.extend(kept)


def _refuse(directory: Path, signature: str, graph: graph_pb2.GraphDef, inputs, outputs) -> None:
    """Raises for strings and tables, and says which operation they are read by."""
    nodes = [*graph.node, *(node for function in graph.library.function for node in function.node_def)]
    why = "LiteRT, ONNX Runtime and OpenVINO take and give numbers; serve the bundle itself"
    for name, spec in inputs.items():
        if spec.dtype == tf.string:
            names, readers = {name}, []
            for node in graph.node:  # in order: what is read comes first
                if names & {one.partition(":")[0] for one in node.input}:
                    names |= {node.name} if node.op == "Identity" else set()
                    readers += [node.op] if node.op != "Identity" else []
            read = f", read by the operation {readers[0]}" if readers else ""
            raise bundle.ExportError(f"{directory}: input {name} of {signature} is strings{read}: {why}")
    for name, spec in outputs.items():
        if spec.dtype == tf.string:
            raise bundle.ExportError(f"{directory}: output {name} of {signature} is strings: {why}")
    for node in nodes:
        if node.op.startswith(_TABLES):
            raise bundle.ExportError(f"{directory}: {signature} has a lookup table, operation {node.op}: {why}")


def _without_order(graph: graph_pb2.GraphDef) -> graph_pb2.GraphDef:
    """Drops what only says which operation runs first: without variables it orders assertions, no numbers."""
    for node in graph.node:
        inputs = [name for name in node.input if not name.startswith("^")]
        del node.input[:]
        node.input.extend(inputs)
    return graph


def _fold_casts(graph: graph_pb2.GraphDef) -> graph_pb2.GraphDef:
    """Replaces casts of constants by constants."""
    nodes = {node.name: node for node in graph.node}

    def constant(name: str) -> node_def_pb2.NodeDef | None:
        node = nodes.get(name.partition(":")[0])
        while node is not None and node.op == "Identity":
            node = nodes.get(node.input[0].partition(":")[0])
        return node if node is not None and node.op == "Const" else None

    for node in graph.node:
        source = constant(node.input[0]) if node.op == "Cast" else None
        if source is not None:
            dtype = tf.as_dtype(node.attr["DstT"].type)
            value = tf.make_ndarray(source.attr["value"].tensor).astype(dtype.as_numpy_dtype)
            node.op = "Const"
            del node.input[:]
            node.attr.clear()
            node.attr["dtype"].type = dtype.as_datatype_enum
            node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(value, dtype))
    return graph
