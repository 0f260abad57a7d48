"""What stands for operations without a converter, against TensorFlow's own kernels."""

import numpy as np
import pytest
import tensorflow as tf

from tfhalf import lowering

PICTURES = np.random.default_rng(0).uniform(0, 255, [2, 13, 29, 3]).astype("float32")


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("size", [(5, 7), (13, 29), (40, 3), (1, 64)])
def test_resize_is_tensorflows(size, antialias):
    expected = tf.image.resize(PICTURES, size, antialias=antialias)
    scale = np.float32(size) / np.float32(PICTURES.shape[1:3])
    seen = lowering.resize(tf.constant(PICTURES), tf.constant(size), tf.constant(scale), tf.zeros([2]), antialias)
    assert seen.shape == expected.shape
    np.testing.assert_allclose(seen, expected, atol=2e-3)


def test_moved_pictures_are_tensorflows():
    size, scale, moved = tf.constant([20, 20]), tf.constant([0.7, 1.3]), tf.constant([3.0, -4.0])
    expected = tf.raw_ops.ScaleAndTranslate(
        images=PICTURES, size=size, scale=scale, translation=moved, kernel_type="triangle", antialias=True
    )
    np.testing.assert_allclose(lowering.resize(tf.constant(PICTURES), size, scale, moved, True), expected, atol=2e-3)


def test_graph_is_rewritten_for_any_size():
    def serve(pictures):
        pictures = tf.ensure_shape(pictures, [None, None, None, 3])
        small = tf.image.resize(pictures, [8, 6], antialias=True)
        return tf.image.resize(small * 2, [16, 16], antialias=True)

    spec = tf.TensorSpec([None, None, None, 3], tf.uint8)
    function = tf.function(serve).get_concrete_function(spec)
    graph = function.graph.as_graph_def()
    before = {node.op for node in graph.node}
    assert {"EnsureShape", "ScaleAndTranslate"} <= before
    lowered, (given,), (made,) = lowering.lower(graph, {function.inputs[0].name: spec}, [function.outputs[0].name])
    imported = tf.compat.v1.wrap_function(lambda: tf.graph_util.import_graph_def(lowered, name=""), [])
    run = imported.prune([given], [made])
    assert not {"EnsureShape", "ScaleAndTranslate"} & {node.op for node in run.graph.as_graph_def().node}
    assert run.outputs[0].shape.as_list() == [None, 16, 16, 3]
    for side in (5, 31):
        pictures = np.random.default_rng(side).integers(0, 255, [2, side, 9, 3]).astype("uint8")
        np.testing.assert_allclose(run(tf.constant(pictures))[0], function(tf.constant(pictures)), atol=2e-3)
