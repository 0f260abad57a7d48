"""Computes what of a graph follows from the shapes of its inputs, once they are known, and leaves constants there.

A graph that takes pictures or sounds of any size asks for their shapes, computes others from them and decides by them;
not every converter has operations for that. TensorFlow's own pass stops at operations whose shapes it doesn't know, and
isn't run again with what was found; here it goes on until nothing new is found.
"""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import tensorflow as tf
from tensorflow.core.framework import graph_pb2

# There is no public name for it.
from tensorflow.python.framework import function_def_to_graph

_CONDITIONS = ("If", "StatelessIf")
_NOT_COMPUTED = ("Placeholder", "While", "StatelessWhile")
_MOST = 2**20  # numbers in a constant that is made: larger ones are quicker computed than read


def fold(
    graph: graph_pb2.GraphDef, feeds: Mapping[str, tf.TensorSpec], fetches: Sequence[str]
) -> tuple[graph_pb2.GraphDef, list[str]]:
    """Rewrites a graph.

    Args:
        graph: operations and constants, without the inputs.
        feeds: tensors that are inputs, and what they are.
        fetches: tensors that are outputs.

    Returns:
        The graph, without the inputs, which keep their names; and the tensors in it that are `fetches`.
    """
    fetches = list(fetches)
    for turn in itertools.count():
        with tf.Graph().as_default() as built:
            given = _placeholders(feeds)
            outputs = tf.graph_util.import_graph_def(graph, given, fetches, name="")
        found, condition = _known(built), _decided(built)
        if not found and condition is None:
            return graph, fetches
        with tf.Graph().as_default() as built:
            given = _placeholders(feeds)
            with tf.name_scope(f"known_{turn}"):
                given |= {name: tf.constant(value) for name, value in found.items()}
            if condition is not None:
                given |= _branch(graph, given, condition, f"taken_{turn}")
            outputs = tf.graph_util.import_graph_def(graph, given, fetches, name="")
        fetches = [tensor.name for tensor in outputs]
        graph = built.as_graph_def()
        needed = behind(graph, [tensor.op.name for tensor in outputs])
        needed -= {tensor.partition(":")[0] for tensor in feeds}
        kept = [node for node in graph.node if node.name in needed]
        del graph.node[:]
        graph.node.extend(kept)
    raise AssertionError("it ends when nothing new is found")


def behind(graph: graph_pb2.GraphDef, outputs: list[str]) -> set[str]:
    """Returns the names of the operations that outputs depend on, themselves too."""
    nodes = {node.name: node for node in graph.node}
    needed, waiting = set(), list(outputs)
    while waiting:
        name = waiting.pop().removeprefix("^").partition(":")[0]
        if name not in needed:
            needed.add(name)
            waiting += nodes[name].input
    return needed


def _placeholders(feeds: Mapping[str, tf.TensorSpec]) -> dict[str, tf.Tensor]:
    """The inputs, under their names."""
    return {
        tensor: tf.compat.v1.placeholder(spec.dtype, spec.shape, tensor.partition(":")[0])
        for tensor, spec in feeds.items()
    }


def _known(graph: tf.Graph) -> dict[str, np.ndarray]:
    """Tensors that follow from constants and shapes and are read by what doesn't, with their values."""
    shapes, known = {}, set()
    for operation in graph.get_operations():  # in order: what is read comes first
        inputs, outputs = operation.inputs, operation.outputs
        if operation.type == "Shape" and inputs[0].shape.is_fully_defined():
            shapes[outputs[0]] = np.array(inputs[0].shape.as_list(), outputs[0].dtype.as_numpy_dtype)
        elif operation.type not in _NOT_COMPUTED and not operation.op_def.is_stateful:
            is_small = all((tensor.shape.num_elements() or 0) <= _MOST for tensor in outputs)
            if all(tensor in known or tensor in shapes for tensor in inputs) and (is_small or not inputs):
                known |= set(outputs)
    computed = [
        tensor
        for tensor in known
        if tensor.op.type != "Const" and tensor.dtype.is_numpy_compatible and _is_read(tensor, known | shapes.keys())
    ]
    with tf.compat.v1.Session(graph=graph) as session:
        values = dict(zip(computed, session.run(computed, shapes), strict=True))
    values |= {tensor: value for tensor, value in shapes.items() if _is_read(tensor, known)}
    return {tensor.name: value for tensor, value in values.items()}


def _is_read(tensor: tf.Tensor, known) -> bool:
    """Whether something reads it that isn't known itself."""
    return any(not set(reader.outputs) <= set(known) for reader in tensor.consumers())


def _decided(graph: tf.Graph) -> tf.Operation | None:
    """The first condition that is a constant."""
    operations = (one for one in graph.get_operations() if one.type in _CONDITIONS)
    return next((one for one in operations if one.inputs[0].op.type == "Const"), None)


def _branch(graph: graph_pb2.GraphDef, given, condition: tf.Operation, name: str) -> dict[str, tf.Tensor]:
    """Imports the branch that is taken; returns what stands for the condition's outputs."""
    taken = "then_branch" if tf.get_static_value(condition.inputs[0]) else "else_branch"
    (function,) = (one for one in graph.library.function if one.signature.name == condition.get_attr(taken).name)
    body, names = function_def_to_graph.function_def_to_graph_def(function)
    read = [tensor.name for tensor in condition.inputs][1:]
    inputs = tf.graph_util.import_graph_def(graph, given, read, name=f"{name}/before")
    inputs = [given.get(key, tensor) for key, tensor in zip(read, inputs, strict=True)]
    arguments = dict(zip((f"{one.name}:0" for one in function.signature.input_arg), inputs, strict=True))
    results = [names[function.ret[one.name]] for one in function.signature.output_arg]
    outputs = tf.graph_util.import_graph_def(body, arguments, results, name=name)
    outputs = [arguments.get(key, tensor) for key, tensor in zip(results, outputs, strict=True)]
    return dict(zip((tensor.name for tensor in condition.outputs), outputs, strict=True))
