"""What `tfhalf.hazards` decides by: a model's layers and weights, and what its forward passes show.

`Evidence` holds a model and makes each pass when the first rule asks for it: traced, as the model computes and in
float32 (`precision.computing_in`), and, with a sample, run with its numbers in both. During a pass every layer's `call`
is watched: the operations that it adds to the graph, the arguments that it gets, the first numbers that aren't finite,
and who raised. An operation belongs to the innermost layer that added it. Afterwards the model is as it was.

The functions below it read one operation, tensor or layer. They know nothing of severities or fixes, and say only what
is certain from the graph: an open axis counts as 1, and nothing is seen inside functions and loops that hold no layer.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator

import keras
import numpy as np
import tensorflow as tf

# Private TensorFlow: the only list of which operation has a kernel for which dtype; a test reads it.
from tensorflow.python.framework import kernels as registry

from tfhalf import kernels, precision
from tfhalf.optimizer import LossScaleOptimizer

_SHAPING = ("Cast", "Identity", "Reshape", "ExpandDims", "Squeeze", "BroadcastTo", "StridedSlice")
_SINGULAR = ("Log", "Rsqrt", "Sqrt", "Reciprocal", "Inv")


@dataclasses.dataclass
class Pass:
    """What one forward pass showed.

    Attributes:
        operations: path to the operations that the layer adds itself, without the layers inside it.
        arguments: path to the keyword arguments of each of its calls.
        outputs: the model's, flat.
        bad: (path, number of the call, "input" or "output") of what wasn't finite, in order.
        error: (path, exception) of the innermost layer that raised.
        half_losses: path to dtype, of the layers that add a loss in half.
    """

    operations: dict[str, list[tf.Operation]] = dataclasses.field(default_factory=dict)
    arguments: dict[str, list[dict]] = dataclasses.field(default_factory=dict)
    outputs: list[tf.Tensor] = dataclasses.field(default_factory=list)
    bad: list[tuple[str, int, str]] = dataclasses.field(default_factory=list)
    error: tuple[str, Exception] | None = None
    half_losses: dict[str, str] = dataclasses.field(default_factory=dict)


class Evidence:
    """A model and its passes, each made when the first rule asks for it.

    Args:
        model: a built model; it stays as it is.
        inputs: sample batch, array or structure of arrays; or None, to trace the model's own input shapes.

    Attributes:
        layers: path to layer (`precision.layers_by_path`), with the model itself under "".
        optimizer: what the model is compiled with; None if it isn't compiled.
        in_half: whether any layer computes in half; if not, nothing is traced.
        weights: (path, layer, weight) of every weight, with the innermost layer that has it.
    """

    def __init__(self, model: keras.Model, inputs):
        self.model, self.inputs = model, inputs
        self.layers = {"": model} | precision.layers_by_path(model)
        self.optimizer = getattr(model, "optimizer", None) if model.compiled else None
        self.in_half = any(layer.compute_dtype in precision.HALF_DTYPES for layer in self.layers.values())
        # Parents come before their children: the innermost layer that has a weight keeps it.
        owners = {id(weight): (path, weight) for path, layer in self.layers.items() for weight in layer.weights}
        self.weights = [(path, self.layers[path], weight) for path, weight in owners.values()]

    def halves(self, *dtypes: str) -> Iterator[tuple[str, keras.Layer]]:
        """Yields (path, layer) of those that compute in one of the dtypes; without any: in half."""
        for path, layer in self.layers.items():
            if layer.compute_dtype in (dtypes or precision.HALF_DTYPES):
                yield path, layer

    def traced(self) -> Iterator[tuple[str, tf.Operation]]:
        """Yields (path of its layer, operation) of the traced pass."""
        for path, operations in self.trace.operations.items():
            for operation in operations:
                yield path, operation

    @property
    def stock_scaling(self) -> keras.optimizers.LossScaleOptimizer | None:
        """The optimizer, if it is Keras' own LossScaleOptimizer."""
        stock = isinstance(self.optimizer, keras.optimizers.LossScaleOptimizer)
        return self.optimizer if stock and not isinstance(self.optimizer, LossScaleOptimizer) else None

    @functools.cached_property
    def arrays(self) -> list[tuple[str, keras.Layer, keras.Variable, np.ndarray]]:
        """(path, layer, weight, its numbers in float32) of the weights that are floats and have numbers."""
        return [
            (*row, keras.ops.convert_to_numpy(keras.ops.cast(row[2].value, "float32")))
            for row in self.weights
            if keras.backend.is_float_dtype(row[2].dtype) and math.prod(row[2].shape)
        ]

    @functools.cached_property
    def trace(self) -> Pass:
        """The traced pass as the model computes; empty where nothing is known of its inputs."""
        if not self.in_half or (self.inputs is None and not getattr(self.model, "inputs", None)):
            return Pass()
        return self._checked(lambda: precision.trace(self.model, self.inputs)[1])

    @functools.cached_property
    def twin(self) -> Pass:
        """The traced pass in float32."""
        return self._in_float32(lambda: precision.trace(self.model, self.inputs)[1])

    @functools.cached_property
    def run(self) -> Pass:
        """The pass with the sample's numbers; empty without a sample."""
        if not self.in_half or self.inputs is None or self.trace.error or self.without_kernel:
            return Pass()
        return self._checked(self._forward)

    @functools.cached_property
    def run_twin(self) -> Pass:
        """The pass with the sample's numbers in float32."""
        return self._in_float32(self._forward)

    @functools.cached_property
    def without_kernel(self) -> list[tuple[str, tf.Operation]]:
        """(path, operation) of what has no half kernel on this machine."""
        return [] if kernels.on_accelerator() else [row for row in self.traced() if lacks_kernel(row[1])]

    @functools.cached_property
    def constants(self) -> list[tuple[str, tf.Operation, np.ndarray, np.ndarray]]:
        """(path, operation, its constant in half, the same constant in float32) of arithmetic with constants."""
        found = []
        for path, operations in self.trace.operations.items():
            ours = list(_constants(operations))
            if not any(half and not np.all(np.isfinite(value) & (value != 0)) for _, value, half in ours):
                continue
            twins = list(_constants(self.twin.operations.get(path, [])))
            if [each[0].type for each in ours] == [each[0].type for each in twins]:
                pairs = zip(ours, twins, strict=True)
                found += [(path, op, value, other) for (op, value, half), (_, other, _) in pairs if half]
        return found

    def _forward(self):
        return self.model(tf.nest.map_structure(tf.convert_to_tensor, self.inputs), training=False)

    def _checked(self, forward: Callable) -> Pass:
        """A pass whose failure is half precision's: what fails in float32 too is the caller's, and raised."""
        seen = _observed(self.layers, forward)
        if seen.error:
            twin = self._in_float32(forward)
            if twin.error:
                raise twin.error[1]
        return seen

    def _in_float32(self, forward: Callable) -> Pass:
        with precision.computing_in(self.model, "float32"):
            return _observed(self.layers, forward)


def _observed(layers: dict[str, keras.Layer], forward: Callable) -> Pass:
    """Runs a forward pass, and notes what each layer's `call` gets, gives and adds to the graph."""
    seen, counted = Pass(), set()
    try:
        with precision.calling(layers, lambda path, layer: _watched(path, layer.call, seen, counted)):
            seen.outputs = tf.nest.flatten(forward())
        seen.error = None  # a layer that tries one thing and then another
        # Parents come before their children, and hold the same tensors.
        losses = {id(loss): (path, loss) for path, layer in layers.items() for loss in layer.losses if is_half(loss)}
        seen.half_losses = {path: loss.dtype.name for path, loss in losses.values()}
    except Exception as error:  # whatever a layer does
        seen.error = seen.error or ("", error)
    return seen


def _watched(path: str, original: Callable, seen: Pass, counted: set[int]) -> Callable:
    """A layer's `call` that notes what it does."""

    def call(*args, **kwargs):
        graph = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
        first = len(graph.get_operations()) if graph else 0
        calls = seen.arguments.setdefault(path, [])
        number = len(calls)
        calls.append(kwargs)
        _note(seen, (path, number, "input"), (args, kwargs))
        try:
            result = original(*args, **kwargs)
        except Exception as error:
            seen.error = seen.error or (path, error)
            raise
        _note(seen, (path, number, "output"), result)
        new = [each for each in graph.get_operations()[first:] if id(each) not in counted] if graph else []
        counted.update(map(id, new))
        seen.operations.setdefault(path, []).extend(new)
        return result

    return call


def _note(seen: Pass, place: tuple[str, int, str], values) -> None:
    tensors = [each for each in tf.nest.flatten(values) if isinstance(each, tf.Tensor) and hasattr(each, "numpy")]
    if any(each.dtype.is_floating and not bool(tf.reduce_all(tf.math.is_finite(each))) for each in tensors):
        seen.bad.append(place)


# What one layer, array, operation or tensor shows


def accelerated(layer: keras.Layer) -> bool:
    """Returns whether `tfhalf.accelerate` has put a kernel on a layer."""
    return any(hasattr(layer.__dict__.get(name), precision.KERNEL_MARK) for name in precision.KERNEL_ATTRIBUTES)


def rounded(array, dtype: str) -> np.ndarray:
    """Returns what is left, in float32, of numbers that are stored in a dtype."""
    with np.errstate(over="ignore"):
        return np.asarray(array, "float32").astype(tf.as_dtype(dtype).as_numpy_dtype).astype("float32")


def num_distinct(value: np.ndarray | None) -> int:
    """Returns how many different numbers an array has; 0 for an unknown one."""
    return 0 if value is None else len(np.unique(value.astype("float64")))


def _constants(operations: list[tf.Operation]) -> Iterator[tuple[tf.Operation, np.ndarray, bool]]:
    """Yields (operation, constant operand, whether that is in half) of arithmetic with a constant."""
    for operation in operations:
        if operation.type in ("AddV2", "Sub", "Mul", "RealDiv", "Maximum", "Minimum", "SelectV2"):
            for operand in operation.inputs:
                if operand.dtype.is_floating and operand.op.type == "Const":
                    value = np.asarray(tf.get_static_value(operand)).astype("float32")
                    yield operation, value, operand.dtype.name in precision.HALF_DTYPES


def is_half(tensor: tf.Tensor, *dtypes: str) -> bool:
    """Returns whether a tensor has one of the dtypes; without any: is in half."""
    return tensor.dtype.name in (dtypes or precision.HALF_DTYPES)


def num_terms(tensor: tf.Tensor, axes) -> int:
    """Returns the number of elements over some axes, as far as it is known: an open axis counts as 1."""
    return math.prod(tensor.shape[int(axis)] or 1 for axis in np.ravel(axes))


def half_source(tensor: tf.Tensor) -> tf.Tensor:
    """Follows indices back through what moves, clips or wraps them (where(i < 0, i + n, i)), up to a half tensor."""
    while tensor.op.type in (*_SHAPING, "Minimum", "Maximum", "SelectV2") and not is_half(tensor):
        tensor = tensor.op.inputs[2 if tensor.op.type == "SelectV2" else 0]
    return tensor


def is_mask(tensor: tf.Tensor) -> bool:
    """Returns whether a tensor is made of whole numbers or truth values, as 1 - cast(mask) is: mostly 0 and 1."""
    while tensor.dtype.is_floating and tensor.op.type in (*_SHAPING, "Sub", "AddV2"):
        tensor = next((each for each in tensor.op.inputs if each.op.type != "Const"), tensor.op.inputs[0])
    return tensor.op.type != "Const" and not tensor.dtype.is_floating


def guarded_operation(tensor: tf.Tensor) -> str:
    """Returns what an added constant keeps from 0: the type of the operation, "" for none."""
    for operation in tensor.consumers():
        if operation.type in _SINGULAR:
            return operation.type
        if operation.type == "RealDiv" and operation.inputs[1] is tensor:
            return "a division"
        if operation.type in _SHAPING and (found := guarded_operation(operation.outputs[0])):
            return found
    return ""


def num_pooled_terms(operation: tf.Operation) -> int:
    """Returns the terms of one output of an average pooling, or of an einsum that is a scalar product."""
    if operation.type != "Einsum":
        return math.prod(operation.get_attr("ksize"))
    left, _, kept = operation.get_attr("equation").decode().partition("->")
    labels = left.split(",")
    if len(labels) != 2 or set(labels[0]) != set(labels[1]):
        return 0  # a matrix product, which accumulates in float32
    summed = [axis for axis, label in enumerate(labels[0]) if label not in kept]
    return num_terms(operation.inputs[0], summed) if summed else 0


def lacks_kernel(operation: tf.Operation) -> bool:
    """Returns whether no CPU kernel takes an operation's half dtypes."""
    dtypes = {
        name: attribute.type
        for name, attribute in operation.node_def.attr.items()
        if attribute.WhichOneof("value") == "type"
    }
    if not any(tf.as_dtype(dtype).name in precision.HALF_DTYPES for dtype in dtypes.values() if dtype):
        return False
    return not any(
        all(dtypes.get(name) in allowed for name, allowed in kernel if name in dtypes)
        for kernel in _cpu_kernels(operation.type)
    )


@functools.cache
def _cpu_kernels(kind: str) -> list[list[tuple[str, list[int]]]]:
    """For each CPU kernel of an operation the dtypes that its attributes may have."""
    return [
        [(each.name, list(each.allowed_values.list.type)) for each in kernel.constraint]
        for kernel in registry.get_registered_kernels_for_op(kind).kernel
        if kernel.device_type == "CPU"
    ]
