"""How much of a model really computes in half: parameters and multiply-adds, layer by layer, from the traced graph."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator

import keras
import tensorflow as tf

from tfhalf import precision
from tfhalf.precision import HALF_DTYPES


@dataclasses.dataclass(frozen=True)
class LayerCoverage:
    """What one layer does itself, without the layers inside it.

    Attributes:
        path: as in `precision.layers_by_path`.
        compute_dtype: what its policy says.
        dtypes: multiply-adds of one call, by the dtype that its operations really have.
        parameters: number of its own weights.
        why: for a layer that doesn't compute in half: the reason; else "".
    """

    path: str
    compute_dtype: str
    dtypes: dict[str, int]
    parameters: int
    why: str

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of one call, in every dtype."""
        return sum(self.dtypes.values())


@dataclasses.dataclass(frozen=True)
class Coverage:
    """How much of a model really computes in half; `str()` of it is a table."""

    layers: list[LayerCoverage]

    @property
    def parameters_in_half(self) -> float:
        """Share (0 to 1) of the parameters whose layers compute in half."""
        total = sum(layer.parameters for layer in self.layers)
        return sum(layer.parameters for layer in self.layers if not layer.why) / total if total else 0.0

    @property
    def multiply_adds_in_half(self) -> float:
        """Share (0 to 1) of the multiply-adds whose operations have half operands."""
        total = sum(layer.multiply_adds for layer in self.layers)
        half = sum(count for layer in self.layers for dtype, count in layer.dtypes.items() if dtype in HALF_DTYPES)
        return half / total if total else 0.0

    @property
    def islands(self) -> dict[str, str]:
        """Path to reason, of the layers with weights or multiply-adds that don't compute in half."""
        return {row.path: row.why for row in self.layers if row.why and (row.parameters or row.multiply_adds)}

    def __str__(self) -> str:
        lines = [f"{'layer':40} {'computes in':12} {'parameters':>12} {'multiply-adds':>15}  why not half"]
        lines += [
            f"{row.path:40} {'/'.join(sorted(row.dtypes)) or row.compute_dtype:12} {row.parameters:12,} "
            f"{row.multiply_adds:15,}  {row.why}".rstrip()
            for row in self.layers
            if row.parameters or row.multiply_adds
        ]
        lines.append(
            f"in half: {self.parameters_in_half:.1%} of parameters, {self.multiply_adds_in_half:.1%} of multiply-adds"
        )
        return "\n".join(lines)


def coverage(model: keras.Model, inputs=None) -> Coverage:
    """Measures which layers really compute in half, from the operations of the traced forward pass.

    A policy is only a wish: a layer may cast, and normalisation computes in float32 inside. So the convolutions and
    matrix products of the graph are counted, with the dtype of their operands, for the layer that made them. A loop
    counts as often as it runs where that is known (Keras' recurrent layers), else once.

    Args:
        model: a built model.
        inputs: sample batch, array or structure of arrays; needed where the model doesn't know its input shapes.
            Without it a batch of one is traced.

    Returns:
        A `Coverage`, one row for each layer in the walker's order.

    Raises:
        ValueError: the model's input shapes aren't known and `inputs` is missing.
    """
    open_shapes = [tensor.name for tensor in getattr(model, "inputs", None) or [] if None in tensor.shape[1:]]
    if inputs is None and open_shapes:
        raise ValueError(f"model {model.name!r}: {open_shapes[0]!r} has an open shape; pass inputs=<a sample batch>")
    work: dict[int, dict[str, int]] = {}
    with precision.without_kernels(model), _counting(model, work):
        precision.trace(model, inputs)
    rows = []
    for path, layer in precision.layers_by_path(model).items():
        dtypes = work.get(id(layer), {})
        rows.append(
            LayerCoverage(
                path=path,
                compute_dtype=layer.compute_dtype,
                dtypes=dtypes,
                parameters=sum(math.prod(weight.shape) for weight in precision.own_weights(layer)),
                why=_why_not_half(layer, dtypes),
            )
        )
    return Coverage(rows)


def _why_not_half(layer: keras.Layer, dtypes: dict[str, int]) -> str:
    if layer.compute_dtype not in HALF_DTYPES:
        return f"its policy is {layer.dtype_policy.name}"
    if isinstance(layer, precision.NORMALIZATIONS):
        return "normalisation computes in float32"
    if dtypes and not set(dtypes) & set(HALF_DTYPES):
        return f"its operations run in {'/'.join(sorted(dtypes))} although its policy is {layer.dtype_policy.name}"
    return ""


@contextlib.contextmanager
def _counting(model: keras.Model, work: dict[int, dict[str, int]]) -> Iterator[None]:
    """Lets each layer's `call` note the operations that it adds to the graph, less those that inner layers noted."""
    counted: set[int] = set()
    loops: list[tuple[tf.Graph, int]] = []  # graph and number of time steps of the recurrent layers around us

    def watched(path: str, layer: keras.Layer) -> Callable:
        original = layer.call

        def call(*args, **kwargs):
            graph = tf.compat.v1.get_default_graph()
            recurrent = isinstance(layer, keras.layers.RNN)
            if recurrent:
                loops.append((graph, args[0].shape[1] or 1))
            first = len(graph.get_operations())
            try:
                return original(*args, **kwargs)
            finally:
                if recurrent:
                    loops.pop()
                # Keras runs a cell once outside the loop, to learn its outputs' dtypes; that isn't work.
                trial = bool(loops) and loops[-1][0] is graph and not recurrent and not getattr(layer, "unroll", False)
                times = 1 if not loops or loops[-1][0] is graph else loops[-1][1]
                for operation in graph.get_operations()[first:]:
                    if id(operation) in counted:
                        continue
                    counted.add(id(operation))
                    for dtype, amount in () if trial else _work(operation):
                        dtypes = work.setdefault(id(layer), {})
                        dtypes[dtype] = dtypes.get(dtype, 0) + amount * times

        return call

    with precision.calling(precision.layers_by_path(model), watched):
        yield


def _work(operation: tf.Operation) -> Iterator[tuple[str, int]]:
    """Yields (dtype, multiply-adds) of one operation, or of all inside it where it calls a function."""
    if operation.type in ("PartitionedCall", "StatefulPartitionedCall"):
        # Keras puts grouped convolutions on the CPU into a function; TensorFlow has no public way to look inside.
        for inner in operation.graph._get_function(operation.get_attr("f").name).graph.get_operations():
            yield from _work(inner)
    elif amount := _multiply_adds(operation):
        yield operation.outputs[0].dtype.name, amount


def _multiply_adds(operation: tf.Operation) -> int:
    """Multiply-adds of one operation from its static shapes; 0 for what is neither convolution nor matrix product."""

    def shape(tensor) -> list[int]:
        return [size or 1 for size in tensor.shape.as_list()] if tensor.shape.rank is not None else [1]

    inputs, kind = operation.inputs, operation.type
    if kind in ("Conv2D", "Conv3D"):
        return math.prod(shape(operation.outputs[0])) * math.prod(shape(inputs[1])[:-1])
    if kind in ("Conv2DBackpropInput", "Conv3DBackpropInputV2"):  # a transposed convolution
        return math.prod(shape(inputs[2])) * math.prod(shape(inputs[1])[:-1])
    if kind == "DepthwiseConv2dNative":
        return math.prod(shape(operation.outputs[0])) * math.prod(shape(inputs[1])[:2])
    if kind in ("MatMul", "BatchMatMulV2", "BatchMatMulV3"):
        transposed = operation.get_attr("transpose_a" if kind == "MatMul" else "adj_x")
        return math.prod(shape(operation.outputs[0])) * shape(inputs[0])[-2 if transposed else -1]
    if kind == "Einsum":
        left = operation.get_attr("equation").decode().split("->")[0].split(",")
        sizes = {
            label: size
            for labels, tensor in zip(left, inputs, strict=True)
            for label, size in zip(labels, shape(tensor), strict=False)
        }
        return math.prod(sizes.values())
    return 0


def product_sizes(operation: tf.Operation) -> tuple[int, ...]:
    """Returns the sizes that tensor cores see of an operation, none where it is no product or ordinary convolution.

    Of a matrix product they are rows, inner size and columns, of a convolution its input and output channels; a size
    that isn't known is left out.
    """
    if operation.type in ("Conv2D", "Conv3D"):
        kernel = operation.inputs[1].shape
        sizes = kernel.as_list()[-2:] if kernel.rank else []
    elif operation.type in ("MatMul", "BatchMatMulV2", "BatchMatMulV3"):
        left, result = operation.inputs[0].shape, operation.outputs[0].shape
        if not left.rank or not result.rank:
            return ()
        transposed = operation.get_attr("transpose_a" if operation.type == "MatMul" else "adj_x")
        rows, columns = result.as_list()[-2:]
        sizes = [rows, left.as_list()[-2 if transposed else -1], columns]
    else:
        return ()
    return tuple(size for size in sizes if size)
