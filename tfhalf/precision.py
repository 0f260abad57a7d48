"""Which dtype computes and which stores: the formats, the plan, and the one walker over layers.

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
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from keras.dtype_policies import DTypePolicyMap

HALF_DTYPES = ("float16", "bfloat16")
# What a model is built under: float32 everywhere, or half computation over float32 variables.
POLICIES = ("float32", *(f"mixed_{dtype}" for dtype in HALF_DTYPES))


@dataclasses.dataclass(frozen=True)
class Format:
    """Exponents (of 2) of a dtype: what is below `zero` becomes 0, below `normal` is subnormal, from `end` on infinite.

    Half of the smallest subnormal is rounded to 0, so that `zero` is one below the smallest one's exponent.

    Attributes:
        zero, normal, end: exponents.
        bits: of the significand, with the hidden one.

    Source: IEEE 754-2019, table 3.5
    """

    zero: int
    normal: int
    end: int
    bits: int

    @property
    def exact(self) -> int:
        """Integers up to here are exact; the next one isn't."""
        return 2**self.bits

    @property
    def largest(self) -> float:
        """The largest finite number."""
        return 2.0**self.end - 2.0 ** (self.end - self.bits)


FORMATS = {
    "float16": Format(-25, -14, 16, 11),
    "bfloat16": Format(-134, -126, 128, 8),
    "float32": Format(-150, -126, 128, 24),
}
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


@contextlib.contextmanager
def calling(layers: Mapping[str, keras.Layer], wrapped: Callable[[str, keras.Layer], Callable]) -> Iterator[None]:
    """Calls each layer by another `call` while the block runs, and afterwards as before.

    Args:
        layers: path to layer.
        wrapped: of a path and its layer, whose `call` it finds, the function to be called instead.
    """
    before = {path: layer.__dict__.get("call") for path, layer in layers.items()}
    try:
        for path, layer in layers.items():
            # Not by setattr: Keras locks a built layer against new attributes that hold state, and this is none.
            layer.__dict__["call"] = wrapped(path, layer)
        yield
    finally:
        for path, layer in layers.items():
            layer.__dict__.pop("call", None)
            if before[path] is not None:
                layer.__dict__["call"] = before[path]


def own_weights(layer: keras.Layer) -> list[keras.Variable]:
    """Returns a layer's weights without those of the layers inside it."""
    # Private Keras: a layer's direct children, as in layers_by_path.
    children = {id(weight) for child in layer._layers for weight in child.weights}
    return [weight for weight in layer.weights if id(weight) not in children]


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
        return policy_of("float16") in {self.default, *self.layers.values()}

    @property
    def computes_in_half(self) -> bool:
        """Whether the plan lets any layer compute in half."""
        return {self.default, *self.layers.values()} != {"float32"}

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


def policy_of(dtype: str) -> str:
    """Returns the policy that computes in a dtype and stores in float32: of "float16" it is "mixed_float16"."""
    return f"mixed_{dtype}" if dtype in HALF_DTYPES else dtype


def dtype_of(policy: str) -> str:
    """Returns the dtype that one of `POLICIES` computes in: the inverse of `policy_of`."""
    return policy.removeprefix("mixed_")


@contextlib.contextmanager
def keeping_policies(model: keras.Model) -> Iterator[None]:
    """Gives a model and its layers their own policies back when the block ends, whatever was set in it."""
    layers = [model, *layers_by_path(model).values()]
    before = [layer.dtype_policy for layer in layers]
    try:
        yield
    finally:
        for layer, old in zip(layers, before, strict=True):
            if layer.dtype_policy is not old:
                _set_policy(layer, old)


@contextlib.contextmanager
def computing_in(model: keras.Model, dtype: str) -> Iterator[None]:
    """Makes every half layer of a model compute in another dtype while the block runs; islands stay float32.

    Args:
        model: a built model.
        dtype: "float32", "float16" or "bfloat16".
    """
    policy = policy_of(dtype)
    with keeping_policies(model):
        for layer in [model, *layers_by_path(model).values()]:
            if layer.compute_dtype in HALF_DTYPES:
                _set_policy(layer, policy)
        yield


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
