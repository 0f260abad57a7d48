"""What a step's graph tells without running it: memory it needs, what it casts, sizes that don't fill tensor cores.

Memory is the sum of what has to be there at once: weights, optimizer state, gradients, and the tensors of the forward
pass that the backward pass reads. That is a lower bound: what an operation needs while it runs isn't in a graph, nor
is what loops keep. The casts' share is by bytes: what casts between float32 and half write, of all that is written.

It reads the graph as it is traced, before TensorFlow optimises it.
"""

import dataclasses
import math
from collections.abc import Iterable

import keras
import tensorflow as tf

from tfhalf import compilation, kernels, precision, taps, workload

_FLOATS = ("float32", *precision.HALF_DTYPES)
# They hand on the memory that they were given.
_ALIASES = ("Identity", "IdentityN", "Reshape", "Squeeze", "ExpandDims", "StopGradient", "PreventGradient")
# They were there before the step, or are no numbers.
_SOURCES = ("Placeholder", "Const", "ReadVariableOp", "VarHandleOp", "Shape", "NoOp")
_MULTIPLE = 8  # see tfhalf.hardware


@dataclasses.dataclass(frozen=True)
class Footprint:
    """What a step's graph tells.

    Attributes:
        kept_bytes: of the tensors of the forward pass that the backward pass reads; 0 in inference.
        held_bytes: of weights; in training also of optimizer state and gradients.
        cast_share: share (0 to 1) of the bytes written that casts between float32 and half write.
        odd_sizes: products and convolutions with sizes that aren't multiples of 8, as "dense/MatMul: 32 x 127 x 10".
    """

    kept_bytes: int
    held_bytes: int
    cast_share: float
    odd_sizes: tuple[str, ...]

    @property
    def memory_bytes(self) -> int:
        """What a step needs at least."""
        return self.kept_bytes + self.held_bytes


def footprint(model: keras.Model, batch: tuple, training: bool) -> Footprint:
    """Traces a step and reads its graph; nothing is run, and the model stays as it is.

    Args:
        model: a built model; compiled where a training step is meant.
        batch: (x, y, sample weight) of tensors; y and weight may be None, and count in training only.
        training: whether it is a training step.
    """
    first_backward = []

    def step(x, y, sample_weight):
        if not training:
            return keras.tree.flatten(taps.inferred(model, x))
        with tf.GradientTape() as tape:
            _, loss = taps.predicted(model, x, y, sample_weight)
        first_backward.append(len(tf.compat.v1.get_default_graph().get_operations()))
        variables = [weight.value for weight in model.trainable_variables]
        return [gradient for gradient in tape.gradient(loss, variables) if gradient is not None]

    with compilation.activities_in_float32(model):
        specs = keras.tree.map_structure(_spec, batch, none_is_leaf=False)
        graph = tf.function(step, autograph=False).get_concrete_function(*specs).graph
    operations = graph.get_operations()
    forward = operations[: first_backward[0]] if training else operations
    backward = operations[len(forward) :]
    held = variables_bytes(model.weights)
    if training:
        held += variables_bytes(model.trainable_variables) + variables_bytes(model.optimizer.variables)
    written = [operation for operation in operations if operation.type not in (*_SOURCES, *_ALIASES)]
    total = sum(map(_written, written))
    casts = sum(_written(operation) for operation in written if _is_half_cast(operation))
    return Footprint(_kept(forward, backward), held, casts / total if total else 0.0, tuple(_odd_sizes(forward)))


def _spec(tensor: tf.Tensor) -> tf.TensorSpec:
    return tf.TensorSpec(tensor.shape, tensor.dtype)


def _kept(forward: list[tf.Operation], backward: list[tf.Operation]) -> int:
    """Bytes of what the forward pass made and the backward pass reads, each memory once."""
    made = {id(operation) for operation in forward if operation.type not in _SOURCES}
    kept = {}
    for operation in backward:
        for tensor in operation.inputs:
            while tensor.op.type in _ALIASES and tensor.op.inputs:
                tensor = tensor.op.inputs[tensor.value_index if tensor.op.type == "IdentityN" else 0]
            if id(tensor.op) in made:
                kept[tensor.ref()] = _bytes(tensor)
    return sum(kept.values())


def _bytes(tensor: tf.Tensor) -> int:
    """Bytes of a tensor; a size that isn't known counts as 1, what holds no numbers as 0."""
    if tensor.shape.rank is None or tensor.dtype in (tf.resource, tf.variant, tf.string):
        return 0
    return math.prod(size or 1 for size in tensor.shape.as_list()) * tensor.dtype.size


def _written(operation: tf.Operation) -> int:
    return sum(map(_bytes, operation.outputs))


def _is_half_cast(operation: tf.Operation) -> bool:
    if operation.type != "Cast":
        return False
    dtypes = operation.inputs[0].dtype.name, operation.outputs[0].dtype.name
    return set(dtypes) <= set(_FLOATS) and dtypes[0] != dtypes[1]


def variables_bytes(variables: Iterable[keras.Variable]) -> int:
    """Returns the bytes that variables hold."""
    return sum(math.prod(variable.shape) * tf.as_dtype(variable.dtype).size for variable in variables)


def _odd_sizes(operations: list[tf.Operation]) -> list[str]:
    """Names the sizes that tensor cores would be padded for; islands in float32 don't run on them."""
    found = {}
    for operation in operations:
        sizes = workload.product_sizes(operation)
        if not sizes or all(size % _MULTIPLE == 0 for size in sizes):
            continue
        if kernels.on_accelerator() and operation.outputs[0].dtype.name not in precision.HALF_DTYPES:
            continue
        found[f"{operation.name.partition('/')[2] or operation.name}: {' x '.join(map(str, sizes))}"] = None
    return list(found)
