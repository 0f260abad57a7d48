"""A model's twin in float32: the same weights and the same batch, computed without half precision.

`precision.computing_in(model, "float32")` makes it. What differs between the two is what half precision does, if all
else is the same, and for this is what is here: layers that draw random numbers are silenced, and batches are as `fit`
hands them to a step. `tfhalf.scale_window` and `tfhalf.comparison` measure what differs. They make passes beside the
training step, as `tfhalf.taps` does, and leave no trace.

Layers that draw random numbers are called as in inference in both twins, with what is inside them, since their draws
depend on the dtype. These are layers with a `keras.random.SeedGenerator` of their own whose call has an argument
`training`: Dropout, noise, augmentation, cells with dropout. Not silenced is what draws without either, as `tf.random`
in a call, or a layer that samples in inference too; it looks like a difference of precision.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import keras
import numpy as np
import tensorflow as tf

from tfhalf import precision, taps

# Of a relative error. A hundred roundings of float16 in one direction, or ten thousand at random (2^-11 * 100 = 0.049):
# what adds up to more isn't rounding.
TOLERANCE = 0.05
MOST_ROWS = 40  # of a table or a picture


@contextlib.contextmanager
def without_randomness(model: keras.Model) -> Iterator[None]:
    """Calls every layer that draws random numbers as in inference while the block runs.

    Args:
        model: whose layers; inside of the block they are called by another `call`, afterwards as before.

    Example:

    >>> model = keras.Sequential([keras.Input([2]), keras.layers.Dropout(0.5)])
    >>> with without_randomness(model):
    ...     model(np.ones([1, 2]), training=True).numpy()
    array([[1., 1.]], dtype=float32)
    """

    def silenced(path: str, layer: keras.Layer) -> Callable:
        original = layer.call

        def call(*args, **kwargs):
            return original(*args, **kwargs | ({"training": False} if "training" in kwargs else {}))

        return call

    with precision.calling(
        {path: layer for path, layer in precision.layers_by_path(model).items() if _draws(layer)}, silenced
    ):
        yield


def _draws(layer: keras.Layer) -> bool:
    """Whether a layer has a generator of its own; Keras lists those that were set as attributes."""
    values = [each for own in vars(layer).values() for each in (own if isinstance(own, list | tuple) else [own])]
    return any(isinstance(value, keras.random.SeedGenerator) for value in values)


def require_half(model: keras.Model, dtypes: Sequence[str]) -> str:
    """Refuses a model that can't be measured.

    Args:
        model: compiled; some layer computes in one of the dtypes.
        dtypes: "float16", "bfloat16", or both.

    Returns:
        The first of the dtypes that the model computes in.

    Raises:
        ValueError: the model isn't compiled, or nothing in it computes in any of the dtypes.
    """
    if not getattr(model, "compiled", False):
        raise ValueError(f"model {model.name!r} isn't compiled: there is no loss to take the gradient of")
    found = precision.compute_dtypes(model)
    if not found & set(dtypes):
        raise ValueError(
            f"model {model.name!r}: no layer computes in {' or '.join(dtypes)}, but in {', '.join(sorted(found))}: "
            "there is nothing to measure"
        )
    return next(dtype for dtype in dtypes if dtype in found)


def tensors(data):
    """Returns a batch as `fit` hands it to a step.

    Args:
        data: x, or (x, y), or (x, y, sample_weight), of arrays or numbers, nested as the model takes them.

    Returns:
        The same, of tensors; what is float64 has become float32. What is no array stays, as a tensor does.
    """

    def convert(value):
        if not isinstance(value, np.ndarray | np.generic | int | float):
            return value
        value = np.asarray(value)
        return tf.convert_to_tensor(value.astype("float32") if value.dtype == "float64" else value)

    return keras.tree.map_structure(convert, data)


def gradients(
    model: keras.Model, weights: Sequence[keras.Variable], data, scale: tf.Tensor
) -> tuple[tf.Tensor, list[tf.Tensor]]:
    """Makes the pass of a training step, in the graph, and leaves no trace.

    Args:
        model: compiled.
        weights: by which the gradients are taken.
        data: a batch: x, or (x, y), or (x, y, sample_weight).
        scale: float32 scalar that the loss is multiplied by.

    Returns:
        The loss, not scaled; and the gradients of the scaled loss as the optimizer gets them, float32: of IndexedSlices
        the values, one zero where there is none.
    """
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    values = [tf.identity(weight.value) for weight in weights]
    scope = keras.StatelessScope([*zip(weights, values, strict=True)], collect_losses=True)
    with scope, tf.GradientTape() as tape:
        tape.watch(values)
        _, loss = taps.predicted(model, x, y, sample_weight)
        scaled = loss * tf.cast(scale, loss.dtype)
    found = [getattr(gradient, "values", gradient) for gradient in tape.gradient(scaled, values)]
    return loss, [tf.zeros([1]) if gradient is None else tf.cast(gradient, tf.float32) for gradient in found]


def traced(function: Callable, *arguments: list) -> Callable:
    """Returns a function as a graph, made once for all the values that each of its arguments is going to have.

    Args:
        function: of tensors, nested or not.
        *arguments: for each argument some values; what differs in their shapes is left open.
    """

    def common(*values):
        specs = [tf.type_spec_from_value(value) for value in values]
        return specs[0].most_specific_common_supertype(specs[1:])

    signature = [tf.nest.map_structure(common, *values) for values in arguments]
    # Made at once: TensorFlow warns of functions that are made again and again when they are called.
    return tf.function(function, autograph=False).get_concrete_function(*signature)
