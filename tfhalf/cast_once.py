"""Casts a SavedModel's half weights to float32 once, on disk, before it is loaded, instead of on each call.

A bundle stores its weights in half, and each signature begins by casting them: ReadVariableOp, Cast. Here a copy of the
SavedModel is written in which those variables are float32 and the casts cast nothing. Casting from half to float32 is
exact, so all signatures give the same numbers as before; they go on sharing one set of variables, and tables,
strings and loops are left as they are. The price is twice the memory for the weights.

A variable is changed only if every signature does nothing but cast it to float32; any other stays as it is. What
casts from float32 to the dtype that a layer computes in stays, too.

TensorFlow's own way, `convert_variables_to_constants_v2`, puts the weights into the graph (at most 2 GB, once for
each signature), leaves tables out as inputs, and takes the functions that both graphs name alike from the first one.
Grappler doesn't fold a cast of a large constant that grows by it.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2, trackable_object_graph_pb2

from tfhalf import precision

_HALVES = {tf.as_dtype(name).as_datatype_enum for name in precision.HALF_DTYPES}
_FLOAT32 = tf.float32.as_datatype_enum
_CALLS = {"PartitionedCall", "StatefulPartitionedCall"}
_CHECKPOINT = "variables/variables"
_OBJECT_GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"


def write(source: Path, target: Path) -> tuple[int, int]:
    """Writes a copy of a SavedModel whose half weights are float32.

    Args:
        source: the SavedModel's folder; nothing is changed in it.
        target: a folder, made by this function.

    Returns:
        How many variables were cast, and how many half variables there are.

    Raises:
        ValueError: it isn't a SavedModel of TensorFlow 2 with variables that are its own.
    """
    proto = saved_model_pb2.SavedModel.FromString((source / "saved_model.pb").read_bytes())
    if len(proto.meta_graphs) != 1 or not proto.meta_graphs[0].HasField("object_graph_def"):
        raise ValueError("it has no object graph")
    graph = proto.meta_graphs[0]
    nodes = graph.object_graph_def.nodes
    halves = {index for index, node in enumerate(nodes) if node.variable.dtype in _HALVES}
    uses = _Uses(graph, halves)
    cast = halves - uses.kept
    for index in cast:
        nodes[index].variable.dtype = _FLOAT32
    for read, casts in uses.of(cast):
        read.attr["dtype"].type = _FLOAT32
        for node in casts:
            node.attr["SrcT"].type = _FLOAT32  # a cast from float32 to float32 hands its input on
    target.mkdir(parents=True)
    (target / "saved_model.pb").write_bytes(proto.SerializeToString())
    for name in ("assets", "fingerprint.pb"):
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name)
        elif (source / name).exists():
            shutil.copy(source / name, target / name)
    _write_variables(source, target, graph.object_graph_def, cast)
    return len(cast), len(halves)


class _Uses:
    """Where each half variable is read, and which may not be changed."""

    def __init__(self, graph, halves: set[int]) -> None:
        self._functions = {function.signature.name: function for function in graph.graph_def.library.function}
        self._reads: dict[int, list] = {index: [] for index in halves}
        self._seen: set[tuple[str, int, int]] = set()
        self.kept: set[int] = set()
        for name, concrete in graph.object_graph_def.concrete_functions.items():
            if name not in self._functions or "_traced_save" in name or "_traced_restore" in name:
                continue
            arguments = self._functions[name].signature.input_arg
            first = len(arguments) - len(concrete.bound_inputs)
            for position, index in enumerate(concrete.bound_inputs, first):
                if index in halves:
                    self._follow(name, position, index)

    def of(self, variables: set[int]) -> Iterator[tuple]:
        """Yields each read of these variables with the casts behind it."""
        for index in variables:
            yield from self._reads[index]

    def _follow(self, name: str, position: int, variable: int) -> None:
        """Looks at what a function does with one of its arguments, and what the functions that it calls do."""
        if (name, position, variable) in self._seen:
            return
        self._seen.add((name, position, variable))
        function = self._functions[name]
        argument = function.signature.input_arg[position].name
        if argument in function.ret.values():
            self.kept.add(variable)
        for node in function.node_def:
            for place, source in enumerate(node.input):
                if source != argument:
                    continue
                if node.op == "ReadVariableOp":
                    self._read(function, node, variable)
                elif node.op in _CALLS:
                    self._follow(node.attr["f"].func.name, place, variable)
                else:
                    self.kept.add(variable)

    def _read(self, function, read, variable: int) -> None:
        value = f"{read.name}:value:0"
        consumers = [node for node in function.node_def if value in node.input]
        are_casts = all(node.op == "Cast" and node.attr["DstT"].type == _FLOAT32 for node in consumers)
        if not are_casts or value in function.ret.values():
            self.kept.add(variable)
        self._reads[variable].append((read, consumers))


def _write_variables(source: Path, target: Path, object_graph, cast: set[int]) -> None:
    """Writes the checkpoint with those variables in float32."""
    reader = tf.train.load_checkpoint(str(source / _CHECKPOINT))
    keys = _checkpoint_keys(reader, object_graph)
    if missing := cast - keys.keys():
        raise ValueError(f"{len(missing)} variables aren't in its checkpoint")
    changed = {keys[index] for index in cast}
    names = sorted(reader.get_variable_to_shape_map())
    tensors = [tf.constant(reader.get_tensor(name)) for name in names]
    tensors = [
        tf.cast(tensor, tf.float32) if name in changed else tensor for name, tensor in zip(names, tensors, strict=True)
    ]
    (target / _CHECKPOINT).parent.mkdir()
    tf.raw_ops.SaveV2(
        prefix=str(target / _CHECKPOINT), tensor_names=names, shape_and_slices=[""] * len(names), tensors=tensors
    )


def _checkpoint_keys(reader, object_graph) -> dict[int, str]:
    """Node of the object graph -> the name of its value in the checkpoint, by walking both graphs together."""
    proto = trackable_object_graph_pb2.TrackableObjectGraph.FromString(reader.get_tensor(_OBJECT_GRAPH))
    keys, seen, waiting = {}, set(), [(0, 0)]
    while waiting:
        index, stored = waiting.pop()
        if index in seen:
            continue
        seen.add(index)
        for attribute in proto.nodes[stored].attributes:
            if attribute.name == "VARIABLE_VALUE":
                keys[index] = attribute.checkpoint_key
        children = {child.local_name: child.node_id for child in proto.nodes[stored].children}
        for child in object_graph.nodes[index].children:
            if child.local_name in children:
                waiting.append((child.node_id, children[child.local_name]))
    return keys
