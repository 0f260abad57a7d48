"""A forward and backward pass that is watched: what goes into each layer, what comes out, and both one's gradients.

`watched(model)` lets every layer note its calls while a graph is made. `replay` makes one pass of a training step that
way, beside the step and without a trace in it: weights and random states are read, what layers do to themselves goes
into a `keras.StatelessScope` and is dropped. The gradients of what layers put out are asked of the tape, so that the
pass computes what the step computes, in the same dtypes.

The events of a pass have an order. Forward it is that of the calls. Backward it is the reverse, and a layer's weight
gradients come between the gradient of what it put out and the gradient of what it took in. `places` lists them so: the
first one that isn't finite belongs to the layer that made it, not to those that passed it on.

The cells of recurrent layers and what else is in a loop of the graph are watched as one, from outside.
"""

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Sequence

import keras
import tensorflow as tf

from tfhalf import precision

# Of one layer that is called again and again, as in a decoder that is written out.
_MOST_CALLS = 4
# Of a layer: forward what it takes in, before and after the cast, and gives; backward as many.
MOST_PLACES = 6 * _MOST_CALLS
# What isn't a layer.
DATA, LOSS, MODEL = "(data)", "(loss)", "(model)"


@dataclasses.dataclass(frozen=True)
class Event:
    """What went into a layer or came out of it, once.

    Attributes:
        layer: its path, as in `precision.layers_by_path`; "" is the model.
        parent: the path of the layer that called it, or MODEL, where that computes something itself; else "".
        kind: "enter" (tensors of layers without others inside only), "leave", or, at the end, "predict".
        tensors: the float tensors.
    """

    layer: str
    parent: str
    kind: str
    tensors: list[tf.Tensor]


@dataclasses.dataclass(frozen=True)
class Pass:
    """A watched pass.

    Attributes:
        events: in the order of the forward pass.
        gradients: for each event its tensors' gradients, where there are any, of the scaled loss; of IndexedSlices the
            values.
        loss: float32 scalar, unscaled; None of a pass without one.
        weights: path of a layer to its own trainable variables.
        weight_gradients: path to their gradients, of the scaled loss, as the optimizer gets them.
    """

    events: list[Event]
    gradients: list[list[tf.Tensor]]
    loss: tf.Tensor | None
    weights: dict[str, list[keras.Variable]]
    weight_gradients: dict[str, list[tf.Tensor]]


@dataclasses.dataclass(frozen=True)
class Place:
    """One place of a pass, in the order in which it computes.

    Attributes:
        layer: the path of the layer that computed what is there, or DATA, LOSS, MODEL.
        phase: "forward" or "backward".
        what: in plain words, as "the gradient of its weights".
        tensors: what is there; gradients are of the scaled loss.
    """

    layer: str
    phase: str
    what: str
    tensors: list[tf.Tensor]


@contextlib.contextmanager
def watched(model: keras.Model) -> Iterator[list[Event]]:
    """Lets a model's layers note their calls, while the block runs, in the list that it gives.

    Args:
        model: a built model, accelerated or not.
    """
    events: list[Event] = []
    stack, calls = ["" if only_holds(model) else MODEL], {}
    layers = precision.layers_by_path(model)
    # Keras calls a recurrent layer's cell once outside the loop, to learn its dtypes.
    loops = tuple(path + "/" for path, layer in layers.items() if isinstance(layer, keras.layers.RNN))
    layers = {path: layer for path, layer in layers.items() if not path.startswith(loops)}
    parents = {path for path in layers if any(other.startswith(path + "/") for other in layers)}
    graph = _graph()

    def wrapped(path: str, layer: keras.Layer) -> Callable:
        original, computes = layer.call, not only_holds(layer)

        def call(*args, **kwargs):
            calls[path] = calls.get(path, 0) + 1
            if _graph() is not graph or calls[path] > _MOST_CALLS:
                return original(*args, **kwargs)
            enter = Event(path, stack[-1], "enter", [])
            if path not in parents:  # to those inside, masks travel on the very tensors that would be replaced
                args, kwargs = keras.tree.map_structure(lambda value: _noted(value, enter.tensors), (args, kwargs))
            events.append(enter)
            stack.append(path if computes else stack[-1])
            try:
                outputs = original(*args, **kwargs)
            finally:
                stack.pop()
            events.append(Event(path, stack[-1], "leave", _floats(outputs)))
            return outputs

        return call

    layers = {path: layer for path, layer in layers.items() if not isinstance(layer, keras.layers.InputLayer)}
    with precision.calling(layers, wrapped):
        yield events


def replay(model: keras.Model, data, *, scale, states: Sequence[tuple[keras.Variable, tf.Tensor]] = ()) -> Pass:
    """Makes the forward and backward pass of a training step of Keras, watched, and leaves no trace.

    Args:
        model: a compiled model.
        data: a batch: x, or (x, y), or (x, y, sample_weight).
        scale: float32 scalar that the loss is multiplied by.
        states: variables, as random states, that shall have other values than now in this pass.
    """
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    owners = own_weights(model)
    variables = [variable for some in owners.values() for variable in some]
    values = [tf.identity(variable.value) for variable in variables]
    scope = keras.StatelessScope([*zip(variables, values, strict=True), *states], collect_losses=True)
    with watched(model) as events, scope, tf.GradientTape() as tape:
        tape.watch(values)
        y_pred, loss = predicted(model, x, y, sample_weight)
        scaled = loss * tf.cast(scale, loss.dtype)
    events.append(Event("", "", "predict", _floats(y_pred)))
    tensors = [tensor for event in events for tensor in event.tensors]
    gradients = iter(tape.gradient(scaled, [*values, *tensors]))

    def some(number: int) -> list[tf.Tensor]:
        taken = [next(gradients) for _ in range(number)]
        return [getattr(gradient, "values", gradient) for gradient in taken if gradient is not None]

    return Pass(
        weights=owners,
        weight_gradients={path: some(len(own)) for path, own in owners.items()},
        events=events,
        gradients=[some(len(event.tensors)) for event in events],
        loss=loss,
    )


def predicted(model: keras.Model, x, y, sample_weight) -> tuple:
    """Returns what a training step of Keras predicts, and its loss, at least float32; `training` goes where it is
    asked for, as in Keras."""
    y_pred = model(x, training=True) if _asks_for_training(model) else model(x)
    training = {"training": True} if "training" in inspect.signature(model.compute_loss).parameters else {}
    loss = model.compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, **training)
    return y_pred, precision.at_least_float32(tf.convert_to_tensor(loss))


def inferred(model: keras.Model, x):
    """Returns what a model puts out in inference."""
    return model(x, training=False) if _asks_for_training(model) else model(x)


def forward(model: keras.Model, data) -> Pass:
    """Makes the forward pass of an evaluation, watched, and leaves no trace.

    Args:
        model: a built model.
        data: a batch, as `replay` takes it.
    """
    x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
    with watched(model) as events, keras.StatelessScope():
        y_pred = inferred(model, x)
    events.append(Event("", "", "predict", _floats(y_pred)))
    return Pass(events, [[] for _ in events], None, {}, {})


def own_weights(model: keras.Model) -> dict[str, list[keras.Variable]]:
    """Returns each layer's own trainable variables, without those of the layers inside it; "" is the model."""
    left = {id(variable) for variable in model.trainable_variables}
    layers, found = {"": model} | precision.layers_by_path(model), {}
    for path, layer in reversed(layers.items()):  # children before their parents
        found[path] = [variable for variable in layer.trainable_variables if id(variable) in left]
        left -= {id(variable) for variable in found[path]}
    return {path: found[path] for path in layers if found[path]}


def only_holds(layer: keras.Layer) -> bool:
    """Returns whether a layer is a model that computes nothing besides its layers."""
    if isinstance(layer, keras.Sequential):
        return True
    operations = getattr(layer, "operations", None)  # of a functional model
    return operations is not None and all(isinstance(each, keras.Layer) for each in operations)


def places(data, watched_pass: Pass) -> list[Place]:
    """Returns what was computed in a pass, in order, so that the first non-finite one names the layer that made it.

    Args:
        data: the batch.
        watched_pass: as `replay` or `forward` returned it.
    """
    found = [Place(DATA, "forward", "the batch", _floats(data))]
    for event in watched_pass.events:
        if event.kind == "predict":
            found.append(Place(MODEL, "forward", "its output", event.tensors))
        elif event.kind == "leave":
            found.append(Place(event.layer, "forward", "its output", event.tensors))
        elif event.tensors:
            # Keras casts what a layer takes in to the layer's dtype: then it is the cast that overflowed.
            sources = [_before_cast(tensor) for tensor in event.tensors]
            if event.parent:
                found.append(Place(event.parent, "forward", "its own operations", sources))
            found.append(Place(event.layer, "forward", "its input, in its dtype", event.tensors))
    if watched_pass.loss is not None:
        found.append(Place(LOSS, "forward", "the loss", [watched_pass.loss]))
        found += _backward_places(watched_pass)
    return [place for place in found if place.tensors]


def _backward_places(watched_pass: Pass) -> list[Place]:
    found = []
    calls = [event.layer for event in watched_pass.events if event.kind == "enter"]
    for event, gradients in reversed(list(zip(watched_pass.events, watched_pass.gradients, strict=True))):
        if event.kind == "predict":
            found.append(Place(LOSS, "backward", "its gradient by the model's output", gradients))
        elif event.kind == "leave":
            inside = event.parent not in ("", MODEL)  # of a whole model, the layer's name says more
            words = "the gradients inside it" if inside else "the gradient of its output"
            found.append(Place(event.parent if inside else event.layer, "backward", words, gradients))
        else:
            calls.pop()
            if event.layer not in calls:  # its first call, the last one of the backward pass: the sum is complete
                found.append(_of_weights(event.layer, watched_pass))
            found.append(Place(event.layer, "backward", "the gradient of its input", gradients))
    rest = watched_pass.weights.keys() - {event.layer for event in watched_pass.events if event.kind == "enter"}
    return found + [_of_weights(path, watched_pass) for path in watched_pass.weights if path in rest]


def _of_weights(path: str, watched_pass: Pass) -> Place:
    gradients = watched_pass.weight_gradients.get(path, [])
    return Place(path or MODEL, "backward", "the gradient of its weights", gradients)


def _asks_for_training(model: keras.Model) -> bool:
    return "training" in inspect.signature(type(model).call).parameters


def _before_cast(tensor: tf.Tensor) -> tf.Tensor:
    """What a noted tensor was before it was cast, in a graph."""
    if not tf.is_symbolic_tensor(tensor):
        return tensor
    source = tensor.op.inputs[0]  # of the identity
    return source.op.inputs[0] if source.op.type == "Cast" and source.op.inputs[0].dtype.is_floating else source


def _graph() -> tf.Graph | None:
    return None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()


def _floats(structure) -> list[tf.Tensor]:
    return [value for value in keras.tree.flatten(structure) if is_float(value)]


def is_float(value) -> bool:
    """Returns whether a value is a tensor of floats."""
    return isinstance(value, tf.Tensor) and value.dtype.is_floating


def _noted(value, into: list[tf.Tensor]):
    if not is_float(value):
        return value
    copy = tf.identity(value)
    into.append(copy)
    return copy
