"""Replaces operations that the converters don't know by others that they do, with the same numbers.

* `ScaleAndTranslate`, which resizes pictures of any size without aliasing: each row of the result is a weighted mean of
  rows, and each column of columns, so it becomes two matrix products with weights that are computed from the sizes.
* `EnsureShape` becomes nothing: whoever runs a converted file gives what its signature says.

Source: tensorflow/core/kernels/image/scale_and_translate_op.cc, https://github.com/tensorflow/tensorflow
"""

from collections.abc import Mapping

import tensorflow as tf
from tensorflow.core.framework import graph_pb2


def lower(
    graph: graph_pb2.GraphDef, feeds: Mapping[str, tf.TensorSpec], fetches: list[str]
) -> tuple[graph_pb2.GraphDef, list[str], list[str]]:
    """Rewrites a graph.

    Args:
        graph: operations and constants, with or without the inputs.
        feeds: tensors that are inputs, and what they are.
        fetches: tensors that are outputs.

    Returns:
        The graph, and the tensors in it that are `feeds` and `fetches`.
    """
    for node in graph.node:
        if node.op == "EnsureShape":
            node.op = "Identity"
            del node.attr["shape"]
    with tf.Graph().as_default() as built:
        given = {
            tensor: tf.compat.v1.placeholder(spec.dtype, spec.shape, f"given_{index}")
            for index, (tensor, spec) in enumerate(feeds.items())
        }
        mapped = dict(given)
        for node in graph.node:
            if node.op == "ScaleAndTranslate" and node.attr["kernel_type"].s == b"triangle":
                # What it reads is imported with what was replaced before; the rest isn't needed and is left out later.
                names = [name if ":" in name else f"{name}:0" for name in node.input]
                inputs = tf.graph_util.import_graph_def(graph, mapped, names, name="before")
                inputs = [mapped.get(name, tensor) for name, tensor in zip(names, inputs, strict=True)]
                mapped[f"{node.name}:0"] = resize(*inputs, node.attr["antialias"].b)
        outputs = tf.graph_util.import_graph_def(graph, mapped, fetches, name="lowered")
    return built.as_graph_def(), [tensor.name for tensor in given.values()], [tensor.name for tensor in outputs]


def resize(
    pictures: tf.Tensor, size: tf.Tensor, scale: tf.Tensor, translation: tf.Tensor, antialias: bool
) -> tf.Tensor:
    """Computes `ScaleAndTranslate` with the triangle kernel.

    Args:
        pictures: any number[batch, height, width, channels].
        size: int32[2], height and width of the result.
        scale: float32[2], how much larger the result is.
        translation: float32[2], how far it is moved, in its own pixels.
        antialias: whether all pixels count where the result is smaller.

    Returns:
        float32[batch, size[0], size[1], channels].
    """
    shape = tf.shape(pictures)
    known = tf.get_static_value(size)
    height, width, channels = *(known if known is not None else (None, None)), pictures.shape[3]
    rows, columns = (
        _weights(shape[axis + 1], size[axis], scale[axis], translation[axis], antialias) for axis in range(2)
    )
    pictures = tf.cast(pictures, tf.float32)
    # [height, in] @ [batch, in, width * channels]; then the same of columns.
    down = tf.matmul(rows, tf.reshape(pictures, [shape[0], shape[1], shape[2] * channels]))
    down = tf.reshape(down, [shape[0] * size[0], shape[2], channels])
    across = tf.reshape(tf.matmul(columns, down), [shape[0], size[0], size[1], channels])
    across.set_shape([pictures.shape[0], height, width, channels])
    return across


def _weights(
    length: tf.Tensor, size: tf.Tensor, scale: tf.Tensor, translation: tf.Tensor, antialias: bool
) -> tf.Tensor:
    """How much each of `length` pixels counts for each of `size`, float32[size, length]."""
    wide = tf.maximum(1 / scale, 1.0) if antialias else tf.ones([])
    centres = (tf.range(tf.cast(size, tf.float32)) + 0.5 - translation) / scale
    pixels = tf.range(tf.cast(length, tf.float32)) + 0.5
    weights = tf.maximum(1 - tf.abs(pixels[None, :] - centres[:, None]) / wide, 0.0)
    sums = tf.reduce_sum(weights, 1, keepdims=True)
    is_inside = (centres >= 0) & (centres <= tf.cast(length, tf.float32))
    return weights / tf.maximum(sums, 1e-6) * tf.cast(is_inside, tf.float32)[:, None]
