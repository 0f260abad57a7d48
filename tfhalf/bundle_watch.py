"""The watch on a bundle: which operation inside its graph overflows, and how much room the others have.

A served number may look fine although something inside was infinite: ReLU6, tanh and a softmax hide it. Here the
signature's functions are inlined into one graph, its variables become constants, and beside each operation with a half
output it is measured how large that is, and whether what went in was finite. The bundle and what it answers stay as
they are.

The layer is told from the operations' name scopes, which Keras makes of the layers' names as it traces them, the
model's first. What is in a loop of the graph, as the cells of recurrent layers, is one operation, from outside.

Source: https://www.tensorflow.org/guide/saved_model; the inlining is what TensorFlow's converters start with.
"""

import dataclasses
import os
import re
from pathlib import Path

import numpy as np
import tensorflow as tf
from tensorflow.python.framework import convert_to_constants

from tfhalf import bundle

_HALF = (tf.float16, tf.bfloat16)
# Their values were looked at where they were made.
_PASSED_ON = {"Const", "Identity", "IdentityN", "Placeholder", "Reshape", "Squeeze", "ExpandDims", "Transpose"}


@dataclasses.dataclass(frozen=True)
class Operation:
    """What an operation of a bundle's graph put out, in half.

    Attributes:
        layer: names of the layers around it, the model's first, as "classifier/encoder/dense"; "" outside of all.
        name: of the operation, in its layer.
        kind: as "MatMul".
        dtype: "float16" or "bfloat16".
        non_finite: number of values that are infinite or NaN.
        overflows: whether there are such values although everything that went in was finite.
        largest: largest finite magnitude.
        bits_left: powers of 2 from there to the dtype's largest number; infinite where all is 0.
    """

    layer: str
    name: str
    kind: str
    dtype: str
    non_finite: int
    overflows: bool
    largest: float
    bits_left: float


def watch_saved_model(directory: str | os.PathLike, inputs=None, signature: str = "serving_default") -> list[Operation]:
    """Lists the operations of a bundle that overflow, or make NaN, from finite numbers.

    Args:
        directory: the version folder.
        inputs: arrays by name, or one array; as many examples as shall be looked at. Default: the bundle's own samples.
        signature: name of a signature that the bundle has.

    Returns:
        The operations, in the order of the graph; none where all is well.

    Raises:
        ExportError: the bundle isn't what its manifest says, has no such signature or inputs, or can't be watched.

    Example:

    >>> import tempfile, keras, tfhalf
    >>> with tfhalf.PrecisionPlan().scope():
    ...     layers = [keras.Input([2], name="x"), keras.layers.Rescaling(256.0, name="large")]
    ...     layers += [keras.layers.ReLU(6.0, name="hides"), keras.layers.Dense(1, dtype="float32", name="y")]
    ...     model = keras.Sequential(layers, name="small")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     manifest = tfhalf.export_saved_model(model, f"{folder}/1", inputs=np.ones([3, 2], "float32"))
    ...     sound = watch_saved_model(f"{folder}/1")
    ...     found = watch_saved_model(f"{folder}/1", np.full([1, 2], 300.0, "float32"))
    >>> sound, [(one.layer, one.non_finite) for one in found]
    ([], [('small/large', 2)])
    """
    return [one for one in measure_saved_model(directory, inputs, signature) if one.overflows]


def measure_saved_model(
    directory: str | os.PathLike, inputs=None, signature: str = "serving_default"
) -> list[Operation]:
    """Measures what every operation of a bundle that computes in half puts out.

    Args:
        directory: as in `watch_saved_model`, and so are the others.
        inputs: arrays by name, or one array. Default: the bundle's own samples.
        signature: name of a signature that the bundle has.

    Returns:
        All of them, in the order of the graph; of what only hands values on nothing.

    Raises:
        ExportError: as in `watch_saved_model`.
    """
    directory = Path(directory)
    signatures = bundle.Manifest.read(directory).signatures
    if signature not in signatures:
        raise bundle.ExportError(f"{directory} has no signature {signature!r}; it has {', '.join(signatures)}")
    bundle.verify(directory)
    loaded = tf.saved_model.load(str(directory))
    function = loaded.signatures[signature]
    if inputs is None:
        with np.load(directory / bundle.INPUTS, allow_pickle=False) as file:
            inputs = {name.partition("/")[2]: array for name, array in file.items()}
    arrays = bundle.named_arrays(inputs, function.structured_input_signature[1])
    try:
        operations, rows = _measured(function, arrays)
    except (ValueError, TypeError, NotImplementedError, tf.errors.OpError) as error:
        raise bundle.ExportError(f"{directory}: {signature} can't be watched: {bundle.first_line(error)}") from error
    return [_operation(operation, row) for operation, row in zip(operations, rows, strict=True)]


def _measured(function, arrays: dict[str, np.ndarray]) -> tuple[list[tf.Operation], np.ndarray]:
    """Runs a signature, and measures its operations: non-finite values, whether it overflows, the largest magnitude."""
    # TensorFlow's own converters call this; there is no public name for it. Loops stay whole: nothing can be read from
    # within a lowered one.
    frozen = convert_to_constants.convert_variables_to_constants_v2(function, lower_control_flow=False)
    given = {name: tf.constant(array) for name, array in arrays.items()}
    captured = function.captured_inputs
    # What isn't a variable, as a lookup table, is an input of the frozen graph under the name that it had.
    given |= {
        tensor.name.partition(":")[0]: value
        for tensor, value in zip(function.inputs[len(function.inputs) - len(captured) :], captured, strict=True)
    }
    feeds = [(tensor, given[tensor.name.partition(":")[0]]) for tensor in frozen.inputs]
    operations = [operation for operation in frozen.graph.get_operations() if _computes(operation)]
    if not operations:
        return [], np.zeros([0, 3])
    with frozen.graph.as_default():
        known: dict[str, tf.Tensor] = {}
        rows = tf.stack([_row(operation, known) for operation in operations])
    run = frozen.prune([tensor for tensor, _ in feeds], [rows, *frozen.outputs])
    return operations, run(*[value for _, value in feeds])[0].numpy()


def _computes(operation: tf.Operation) -> bool:
    return operation.type not in _PASSED_ON and any(output.dtype in _HALF for output in operation.outputs)


def _row(operation: tf.Operation, known: dict[str, tf.Tensor]) -> tf.Tensor:
    outputs = [output for output in operation.outputs if output.dtype in _HALF]
    counts = [_non_finite(output, known) for output in outputs]
    sources = [_non_finite(tensor, known) for tensor in operation.inputs if tensor.dtype.is_floating]
    bad, before = tf.add_n(counts), tf.add_n([tf.zeros([]), *sources])
    sizes = [tf.abs(tf.cast(output, tf.float32)) for output in outputs]
    largest = [tf.reduce_max(tf.where(tf.math.is_finite(size), size, 0.0)) for size in sizes]
    overflows = tf.cast((bad > 0.0) & tf.equal(before, 0.0), tf.float32)
    return tf.stack([bad, overflows, tf.maximum(tf.reduce_max(tf.stack(largest)), 0.0)])  # of nothing it is -inf


def _non_finite(tensor: tf.Tensor, known: dict[str, tf.Tensor]) -> tf.Tensor:
    if tensor.name not in known:
        bad = tf.math.logical_not(tf.math.is_finite(tensor))
        known[tensor.name] = tf.cast(tf.math.count_nonzero(bad, dtype=tf.int32), tf.float32)
    return known[tensor.name]


def _operation(operation: tf.Operation, row: np.ndarray) -> Operation:
    dtype = next(output.dtype for output in operation.outputs if output.dtype in _HALF)
    bad, overflows, largest = (float(value) for value in row)
    layer, name = layer_of(operation.name)
    bits = float(np.log2(float(dtype.max) / largest)) if largest else float("inf")
    return Operation(layer, name, operation.type, dtype.name, int(bad), bool(overflows), largest, bits)


def layer_of(name: str) -> tuple[str, str]:
    """Splits the name of an operation into its layers' names and its own in there.

    Keras opens a layer's name scope twice for each call, once to build it, and TensorFlow makes names of scopes unique
    by numbers: "dense" is called in the scope "dense_1". A scope without a number is the operation's.

    Args:
        name: as in a frozen graph: "StatefulPartitionedCall/small_1/dense_1/Tensordot/MatMul".

    Returns:
        As ("small/dense", "Tensordot/MatMul").
    """
    scopes = name.split("/")
    while len(scopes) > 1 and re.fullmatch(r"(Stateful)?PartitionedCall(_\d+)?", scopes[0]):
        del scopes[0]
    layers = []
    while len(scopes) > 1 and (numbered := re.fullmatch(r"(.+)_\d+", scopes[0])):
        layers.append(numbered.group(1))
        del scopes[0]
    return "/".join(layers), "/".join(scopes)
