"""Which dtype computes and which stores: the plan, the proof of what it did, and the one walker over layers.

The recipe (Micikevicius et al. 2018, "Mixed Precision Training", section 3): variables stay float32 (master
weights), convolutions and matrix products compute in half, what sums many terms or leaves the model stays
float32 (islands). Keras expresses the first two as the policies `mixed_float16` and `mixed_bfloat16`; a
`PrecisionPlan` says which layers are exceptions, by the path of the layer's name, and can be saved.

A plan is used in two steps: `.scope()` sets the plain global policy while the model is built, `.apply(model)`
sets the exceptions on the built layers, and again on a model that was loaded. (Keras' `DTypePolicyMap` in one step
misses every layer that reads its policy when it is made, and is lost in custom blocks on reload.)

It does no loss scaling (`tfhalf.LossScaleOptimizer`) and doesn't choose a plan.
"""

import contextlib
import dataclasses
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from keras.dtype_policies import DTypePolicyMap

HALF_DTYPES = ("float16", "bfloat16")
# Methods that `tfhalf.accelerate` replaces on a layer's instance.
KERNEL_ATTRIBUTES = ("call", "_compute_attention", "inner_loop")
KERNEL_MARK = "is_a_kernel"
# They compute in float32 inside, whatever half policy they have.
NORMALIZATIONS = (
    keras.layers.BatchNormalization,
    keras.layers.LayerNormalization,
    keras.layers.GroupNormalization,
    keras.layers.RMSNormalization,
)


def layers_by_path(model: keras.Layer) -> dict[str, keras.Layer]:
    """Returns every layer below a model, nested ones too, by its path of names.

    The path is made of the names from the model's children downwards, joined by "/": `encoder/layer_3/attention`.
    The model's own name isn't in it, so a plan fits the model under any name. A layer that is used twice has the
    path of its first place; a second layer of one name in one parent gets "_1" behind it, a third "_2".

    Args:
        model: a built or unbuilt Keras model or layer.

    Returns:
        Path to layer, parents before their children, in the order in which Keras tracks them.
    """
    found: dict[str, keras.Layer] = {}
    seen = {id(model)}

    def visit(parent: keras.Layer, prefix: str) -> None:
        # Private Keras: there is no public list of a layer's direct children, only of a model's.
        for layer in parent._layers:
            if id(layer) in seen:
                continue
            seen.add(id(layer))
            path = base = prefix + layer.name
            repeats = 0
            while path in found:
                repeats += 1
                path = f"{base}_{repeats}"
            found[path] = layer
            visit(layer, path + "/")

    visit(model, "")
    return found


@dataclasses.dataclass(frozen=True)
class PrecisionPlan:
    """A default dtype policy and the layers that are exceptions to it.

    Args:
        default: name of the Keras policy that a model is built under: "float32", "mixed_float16" or "mixed_bfloat16".
        layers: regular expression to policy name. An expression must match a layer's whole path
            (`layers_by_path`); a layer that it matches takes everything below it along.

    Raises:
        ValueError: a policy is unknown, or doesn't keep float32 variables; an expression can't be compiled.

    Example:

    >>> plan = PrecisionPlan("mixed_float16", {"head": "float32"})
    >>> with plan.scope():
    ...     model = keras.Sequential([
    ...         keras.Input([4]), keras.layers.Dense(8, name="body"), keras.layers.Dense(2, name="head")])
    >>> model = plan.apply(model)
    >>> [layer.compute_dtype for layer in model.layers]
    ['float16', 'float32']

    Source: Micikevicius et al. 2018, section 3.1 and 3.3, https://arxiv.org/abs/1710.03740
    """

    default: str = "mixed_float16"
    layers: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        object.__setattr__(self, "layers", dict(self.layers))
        _check_policy(self.default, "default")
        for pattern, policy in self.layers.items():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"PrecisionPlan: layers[{pattern!r}] is no regular expression: {error}") from error
            _check_policy(policy, f"layers[{pattern!r}]")

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        """Makes `default` Keras' global dtype policy while the block runs."""
        previous = keras.config.dtype_policy()
        keras.config.set_dtype_policy(self.default)
        try:
            yield
        finally:
            keras.config.set_dtype_policy(previous)

    def apply(self, model: keras.Model) -> keras.Model:
        """Sets the exceptions' policies on the layers of a model that was built under `scope()`, or loaded.

        Layers that no expression matches keep theirs. Calling it again changes nothing.

        Args:
            model: a built model.

        Returns:
            The same model.

        Raises:
            ValueError: an expression matches no layer, or two match the same one; the message lists the layers' paths.
        """
        layers = layers_by_path(model)
        chosen: dict[str, str] = {}
        for pattern in self.layers:
            matched = [path for path in layers if re.fullmatch(pattern, path)]
            if not matched:
                raise ValueError(f"PrecisionPlan: layers[{pattern!r}] matches no layer. {_listing(layers)}")
            for path in layers:
                if not any(path == top or path.startswith(top + "/") for top in matched):
                    continue
                if path in chosen:
                    raise ValueError(
                        f"PrecisionPlan: layer {path!r} is matched twice, by {chosen[path]!r} and {pattern!r}; "
                        f"make the expressions exclude each other. {_listing(layers)}"
                    )
                chosen[path] = pattern
        for path, pattern in chosen.items():
            _set_policy(layers[path], self.layers[pattern])
        # Functions that Keras has traced already hold the old dtypes.
        model.train_function = model.test_function = model.predict_function = None
        return model

    @property
    def needs_loss_scaling(self) -> bool:
        """Whether the plan lets any layer compute in float16."""
        return "mixed_float16" in {self.default, *self.layers.values()}

    def to_json(self) -> dict:
        """Returns the plan as plain JSON values; `from_json` is its inverse."""
        return {"default": self.default, "layers": dict(self.layers)}

    @classmethod
    def from_json(cls, value: dict) -> "PrecisionPlan":
        """Returns the plan that `to_json` wrote.

        Raises:
            ValueError: the value isn't a plan.
        """
        if not isinstance(value, dict) or not set(value) <= {"default", "layers"} or "default" not in value:
            raise ValueError(f'PrecisionPlan: expected {{"default": ..., "layers": {{...}}}}, got {value!r}')
        layers = value.get("layers", {})
        if not isinstance(layers, dict):
            raise ValueError(f"PrecisionPlan: layers must map expressions to policies, got {layers!r}")
        return cls(value["default"], layers)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the plan as JSON."""
        Path(path).write_text(json.dumps(self.to_json(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike) -> "PrecisionPlan":
        """Reads a plan that `save` wrote.

        Raises:
            OSError: the file can't be read.
            ValueError: the file holds no plan.
        """
        try:
            return cls.from_json(json.loads(Path(path).read_text(encoding="utf-8")))
        except json.JSONDecodeError as error:
            raise ValueError(f"PrecisionPlan: {path} isn't JSON: {error}") from error


@contextlib.contextmanager
def computing_in(model: keras.Model, dtype: str) -> Iterator[None]:
    """Makes every half layer of a model compute in another dtype while the block runs; islands stay float32.

    Args:
        model: a built model.
        dtype: "float32", "float16" or "bfloat16".
    """
    policy = dtype if dtype == "float32" else f"mixed_{dtype}"
    halves = [layer for layer in [model, *layers_by_path(model).values()] if layer.compute_dtype in HALF_DTYPES]
    before = [layer.dtype_policy for layer in halves]
    try:
        for layer in halves:
            _set_policy(layer, policy)
        yield
    finally:
        for layer, old in zip(halves, before, strict=True):
            _set_policy(layer, old)


@contextlib.contextmanager
def without_kernels(model: keras.Model) -> Iterator[None]:
    """Lets every layer of a model compute as Keras wrote it while the block runs, whether it is accelerated or not."""
    layers = [model, *layers_by_path(model).values()]
    taken = [(layer, take_kernels(layer)) for layer in layers]
    try:
        yield
    finally:
        for layer, kernels in taken:
            layer.__dict__.update(kernels)


def take_kernels(layer: keras.Layer) -> dict[str, Callable]:
    """Takes the kernels off one layer and returns them by name; what else was put on its instance stays."""
    ours = [name for name in KERNEL_ATTRIBUTES if hasattr(layer.__dict__.get(name), KERNEL_MARK)]
    return {name: layer.__dict__.pop(name) for name in ours}


def at_least_float32(tensor: tf.Tensor) -> tf.Tensor:
    """Returns a half tensor in float32, and any other as it is."""
    return tf.cast(tensor, tf.float32) if tensor.dtype.name in HALF_DTYPES else tensor


def compute_dtypes(model: keras.Model) -> set[str]:
    """Returns the dtypes that a model's layers are set to compute in."""
    return {layer.compute_dtype for layer in layers_by_path(model).values()}


def needs_loss_scaling(model: keras.Model) -> bool:
    """Returns whether a layer computes in float16, whose gradients underflow; bfloat16 has float32's range."""
    return "float16" in compute_dtypes(model)


def require_float32_outputs(model: keras.Model, inputs=None) -> None:
    """Refuses a model that hands half-precision numbers to its loss or to a client.

    In half, a loss loses its gradient: float16 binary cross-entropy of a wrong sample is exactly flat from logit 8.

    Args:
        model: a built model.
        inputs: sample batch; needed where the model doesn't know its own input shapes.

    Raises:
        ValueError: an output isn't float32; the message says which and how to mend it.
    """
    _, outputs = trace(model, inputs)
    for name, output in zip(output_names(model, outputs), tf.nest.flatten(outputs), strict=True):
        if output.dtype in (tf.float16, tf.bfloat16):
            raise ValueError(
                f"model {model.name!r}: {name} is {output.dtype.name}, but a model's outputs must be float32. Give the "
                f'last layer dtype="float32", or add PrecisionPlan(layers={{"{name}": "float32"}}).apply(model)'
            )


def output_names(model: keras.Model, outputs) -> list[str]:
    """Returns a name for each of a model's outputs: the layers' that make them, where the model knows them.

    Args:
        model: a built model.
        outputs: what calling it returned.
    """
    if isinstance(model, keras.Sequential):
        return [model.layers[-1].name]
    own = getattr(model, "output_names", None)
    return own or [f"output_{index}" for index in range(len(tf.nest.flatten(outputs)))]


@dataclasses.dataclass(frozen=True)
class LayerCoverage:
    """What one layer does itself, without the layers inside it.

    Attributes:
        path: as in `layers_by_path`.
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
    with without_kernels(model), _counting(model, work):
        trace(model, inputs)
    rows = []
    for path, layer in layers_by_path(model).items():
        dtypes = work.get(id(layer), {})
        # Private Keras: a layer's direct children, as in layers_by_path.
        children = {id(weight) for child in layer._layers for weight in child.weights}
        own = [weight for weight in layer.weights if id(weight) not in children]
        rows.append(
            LayerCoverage(
                path=path,
                compute_dtype=layer.compute_dtype,
                dtypes=dtypes,
                parameters=sum(math.prod(weight.shape) for weight in own),
                why=_why_not_half(layer, dtypes),
            )
        )
    return Coverage(rows)


def _why_not_half(layer: keras.Layer, dtypes: dict[str, int]) -> str:
    if layer.compute_dtype not in HALF_DTYPES:
        return f"its policy is {layer.dtype_policy.name}"
    if isinstance(layer, NORMALIZATIONS):
        return "normalisation computes in float32"
    if dtypes and not set(dtypes) & set(HALF_DTYPES):
        return f"its operations run in {'/'.join(sorted(dtypes))} although its policy is {layer.dtype_policy.name}"
    return ""


def traced_graph(model: keras.Model) -> tf.Graph:
    """Returns the graph of one forward pass, for TensorBoard.

    Raises:
        ValueError: the model doesn't know its input shapes.
    """
    return trace(model, None)[0]


def trace(model: keras.Model, inputs):
    """Traces one forward pass over a sample batch, or over the model's own input shapes; returns (graph, outputs)."""
    if inputs is not None:
        specs = tf.nest.map_structure(lambda value: tf.TensorSpec(np.shape(value), tf.as_dtype(value.dtype)), inputs)
    elif getattr(model, "inputs", None):
        own = model.inputs[0] if isinstance(model, keras.Sequential) else model.input
        specs = tf.nest.map_structure(lambda tensor: tf.TensorSpec([1, *tensor.shape[1:]], tensor.dtype), own)
    else:
        raise ValueError(f"model {model.name!r} doesn't know its input shapes; pass inputs=<a sample batch>")
    outputs = []

    def forward(values):
        outputs.append(model(values, training=False))
        return tf.nest.flatten(outputs[-1])

    graph = tf.function(forward, autograph=False).get_concrete_function(specs).graph
    return graph, outputs[-1]


@contextlib.contextmanager
def _counting(model: keras.Model, work: dict[int, dict[str, int]]) -> Iterator[None]:
    """Lets each layer's `call` note the operations that it adds to the graph, less those that inner layers noted."""
    counted: set[int] = set()
    loops: list[tuple[tf.Graph, int]] = []  # graph and number of time steps of the recurrent layers around us

    def watch(layer: keras.Layer) -> None:
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

        layer.call = call

    watched = list(layers_by_path(model).values())
    try:
        for layer in watched:
            watch(layer)
        yield
    finally:
        for layer in watched:
            layer.__dict__.pop("call", None)


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


def _set_policy(layer: keras.Layer, policy: str | keras.DTypePolicy) -> None:
    if isinstance(layer.dtype_policy, DTypePolicyMap):
        # Private Keras: its setter would write into the map, which other layers and models share.
        layer._dtype_policy = keras.dtype_policies.get(policy)
    else:
        layer.dtype_policy = policy


def _check_policy(policy: str, where: str) -> None:
    try:
        known = keras.dtype_policies.get(policy)
    except (ValueError, TypeError) as error:
        raise ValueError(f"PrecisionPlan: {where} is {policy!r}, which is no Keras dtype policy") from error
    if known is None or known.variable_dtype != "float32" or not isinstance(policy, str):
        raise ValueError(
            f"PrecisionPlan: {where} is {policy!r}; variables must stay float32 (master weights): "
            'use "float32", "mixed_float16" or "mixed_bfloat16"'
        )


def _listing(layers: dict[str, keras.Layer]) -> str:
    return "The layers are: " + ", ".join(layers)
