"""How much half precision costs each layer by itself: in its float32 twin's pass, one layer at a time in half.

`compare` tells what a pass in half has gathered up to each place. Here no error is handed on: every layer is given what
it is given in float32 and computes that in half, forward and, from the gradient that its output has in float32,
backward. One graph has all of it, which is what makes it cheap: a graph for each layer would take minutes to make.

It ranks. Whether a model bears a layer in half isn't told by one layer's error (`tfhalf.search`).
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import keras
import tensorflow as tf

from tfhalf import compilation, optimizer, precision, taps, twins

# Of one layer that is called again and again; the worst counts.
_MOST_CALLS = 4
# The largest gradient is brought to 2^14, which leaves 2 bits to float16's end.
_TOP = 14.0


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """What a layer by itself loses in half.

    Attributes:
        forward: relative error of what it puts out: norm of the difference divided by float32's norm; infinite where
            half isn't finite.
        backward: that of the gradients of its inputs or of its weights, whichever is larger.
    """

    forward: float
    backward: float

    @property
    def rank(self) -> float:
        """The larger of the two, each in units of its tolerance (`twins.TOLERANCE`; backward its square root)."""
        return max(self.forward / twins.TOLERANCE, self.backward / twins.TOLERANCE**0.5)


@dataclasses.dataclass(frozen=True)
class _Call:
    path: str
    args: tuple
    kwargs: dict
    outputs: list[tf.Tensor]


def half_layers(model: keras.Model, below: str = "") -> list[str]:
    """Returns the layers that a plan can take out of half one by one, by their paths.

    A model that only holds others isn't among them, since what it holds is; nor is what is inside a layer that computes
    itself, as a block or attention, since it and what is inside of it need one dtype more often than not.

    Args:
        model: a built model.
        below: path of a layer; then what is inside it, itself left out. Of a recurrent layer nothing is.
    """
    layers, found = precision.layers_by_path(model), []
    if isinstance(layers.get(below), keras.layers.RNN):
        return []
    for path, layer in layers.items():
        inside = path.startswith(f"{below}/") if below else True
        if inside and not path.startswith(tuple(f"{one}/" for one in found)) and _is_half(layer):
            found.append(path)
    return found


def all_half_layers(model: keras.Model) -> list[str]:
    """Returns `half_layers`, and those inside of them, parents first."""
    found: list[str] = []

    def visit(paths: list[str]) -> None:
        for path in paths:
            found.append(path)
            visit(half_layers(model, path))

    visit(half_layers(model))
    return found


def measure(model: keras.Model, data) -> dict[str, Sensitivity]:
    """Measures what each layer by itself loses in half, on one batch.

    Args:
        model: as it was built; compiled, or nothing is measured backward.
        data: a batch as `fit` gets it: x, or (x, y), or (x, y, sample_weight).

    Returns:
        A `Sensitivity` for each of `all_half_layers`; of those that aren't called, or in a loop of the graph, zeros.

    Example:

    >>> with precision.PrecisionPlan().scope():
    ...     layers = [keras.layers.Dense(1, name="near"), keras.layers.Rescaling(1e5, name="far")]
    ...     model = keras.Sequential([keras.Input([2]), *layers])
    >>> found = measure(model, tf.ones([1, 2]))
    >>> found["far"].forward, found["near"].forward < 0.01
    (inf, True)
    """
    paths = all_half_layers(model)
    rows: dict[str, list[int]] = {path: [] for path in paths}

    needs_scale = precision.needs_loss_scaling(model)

    def errors(data):
        with precision.computing_in(model, "float32"):
            calls, gradients, by_weights = _pass(model, data, paths)
            scale = _scale([*gradients, by_weights]) if needs_scale else tf.ones([])
            true = [_alone(model, call, own, tf.ones([])) for call, own in zip(calls, gradients, strict=True)]
        found = []
        for call, own, twin in zip(calls, gradients, true, strict=True):
            half = _alone(model, call, own, scale)
            rows[call.path].append(len(found))
            found.append([relative_error(*pair) for pair in zip(half, twin, strict=True)])
        return tf.reshape(tf.stack([tf.stack([f, tf.maximum(x, w)]) for f, x, w in found]), [-1, 2])

    with twins.without_randomness(model), compilation.activities_in_float32(model):
        data = twins.tensors(data)
        measured = twins.traced(errors, [data])(data).numpy()
    return {
        path: Sensitivity(*map(float, measured[at].max(0))) if at else Sensitivity(0.0, 0.0)
        for path, at in rows.items()
    }


def _is_half(layer: keras.Layer) -> bool:
    holds = isinstance(layer, keras.layers.InputLayer) or taps.only_holds(layer)
    return layer.compute_dtype in precision.HALF_DTYPES and not holds


def _pass(model: keras.Model, data, paths: list[str]) -> tuple[list[_Call], list[list], list]:
    """A pass of the twin: the layers' calls, the gradients of what they put out, None where there is none, and of the
    weights."""
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    owners = model.trainable_variables
    values = [tf.identity(variable.value) for variable in owners]
    scope = keras.StatelessScope([*zip(owners, values, strict=True)], collect_losses=True)
    compiled = getattr(model, "compiled", False)
    with _recorded(model, paths) as calls, scope, tf.GradientTape() as tape:
        tape.watch([values, [value for value in keras.tree.flatten(x) if taps.is_float(value)]])
        loss = taps.predicted(model, x, y, sample_weight)[1] if compiled else None
        if not compiled:
            model(x)
    if loss is None:
        return calls, [[None] * len(call.outputs) for call in calls], []
    by_weights, gradients = tape.gradient(loss, [values, [tensor for call in calls for tensor in call.outputs]])
    left = iter(gradients)
    return calls, [[next(left) for _ in call.outputs] for call in calls], by_weights


@contextlib.contextmanager
def _recorded(model: keras.Model, paths: list[str]) -> Iterator[list[_Call]]:
    """Notes with what the layers are called, in this graph and not in its loops, and what they put out."""
    calls: list[_Call] = []
    graph = tf.compat.v1.get_default_graph()

    def wrapped(path: str, layer: keras.Layer) -> Callable:
        original = layer.call

        def call(*args, **kwargs):
            outputs = original(*args, **kwargs)
            number = sum(one.path == path for one in calls)
            if tf.compat.v1.get_default_graph() is graph and number < _MOST_CALLS:
                floats = [value for value in keras.tree.flatten(outputs) if taps.is_float(value)]
                calls.append(_Call(path, args, kwargs, floats))
            return outputs

        return call

    layers = precision.layers_by_path(model)
    with precision.calling({path: layers[path] for path in paths}, wrapped):
        yield calls


def _alone(model: keras.Model, call: _Call, gradients: list, scale: tf.Tensor) -> tuple[list, list, list]:
    """A layer by itself, in its dtype now: what it puts out, the gradients of its inputs and of its weights.

    The inputs are float32's; from the gradients of the outputs, times the scale, it computes the others, divided by it.
    """
    layer = precision.layers_by_path(model)[call.path]
    weights = layer.trainable_variables
    values = [tf.identity(weight.value) for weight in weights]
    inputs = [value for value in keras.tree.flatten((call.args, call.kwargs)) if taps.is_float(value)]
    # Of the layer's losses and updates nothing is kept.
    with keras.StatelessScope([*zip(weights, values, strict=True)]), tf.GradientTape() as tape:
        tape.watch([inputs, values])
        outputs = [value for value in keras.tree.flatten(layer(*call.args, **call.kwargs)) if taps.is_float(value)]
    pairs = [(out, own) for out, own in zip(outputs, gradients, strict=True) if own is not None]
    if not pairs:
        return outputs, [], []
    by_output = [tf.cast(tf.convert_to_tensor(own) * scale, out.dtype) for out, own in pairs]
    found = tape.gradient([out for out, _ in pairs], [*inputs, *values], output_gradients=by_output)
    found = [None if one is None else tf.cast(getattr(one, "values", one), tf.float32) / scale for one in found]
    by_inputs, by_weights = found[: len(inputs)], found[len(inputs) :]
    return outputs, [one for one in by_inputs if one is not None], [one for one in by_weights if one is not None]


def _scale(gradients: list[list]) -> tf.Tensor:
    """The power of 2 that brings the largest gradient of float32 near float16's end."""
    tensors = [getattr(one, "values", one) for own in gradients for one in own if one is not None]
    if not tensors:
        return tf.ones([])
    largest = tf.reduce_max(tf.stack([tf.reduce_max(tf.abs(tensor)) for tensor in tensors]))
    exponent = _TOP - tf.math.ceil(tf.math.log(tf.maximum(largest, 1e-30)) / tf.math.log(2.0))
    return 2.0 ** tf.clip_by_value(exponent, float(optimizer.LOWEST_EXPONENT), float(optimizer.HIGHEST_EXPONENT))


def relative_error(half: Sequence[tf.Tensor], true: Sequence[tf.Tensor]) -> tf.Tensor:
    """Returns the norm of the difference divided by that of float32, of all the tensors together, in the graph.

    Args:
        half: what half computed.
        true: the same of float32.

    Returns:
        float64 scalar: infinite where half isn't finite; 0 where there is nothing, or float32 is all zeros.
    """
    if not half or len(half) != len(true):
        return tf.zeros([], tf.float64)
    half, true = ([tf.cast(one, tf.float64) for one in some] for some in (half, true))
    difference = tf.add_n([tf.nn.l2_loss(one - other) for one, other in zip(half, true, strict=True)])
    size = tf.add_n([tf.nn.l2_loss(one) for one in true])
    error = tf.sqrt(tf.math.divide_no_nan(difference, size))
    return tf.where(tf.math.is_finite(difference), error, tf.constant(float("inf"), tf.float64))
