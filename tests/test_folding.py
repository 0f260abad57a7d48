"""What follows from shapes becomes constants, conditions are decided, and the numbers stay TensorFlow's."""

import numpy as np
import tensorflow as tf

from tfhalf import folding


def serve(picture, factor):
    """Asks for sizes, decides by them, loops as often as they say, and reads a number that isn't known."""
    shape = tf.shape(picture)
    side = shape[1] + tf.math.floormod(-shape[1], 4)
    padded = tf.cond(
        tf.equal(side, shape[1]), lambda: picture, lambda: tf.pad(picture, [[0, 0], [0, side - shape[1]], [0, 0]])
    )
    halves = tf.split(padded, 2, axis=2)
    rows = tf.reshape(halves[0] + halves[1], [shape[0], side // 4, -1])
    many = tf.cond(factor > 2, lambda: rows * factor, lambda: rows - 1)
    return many + tf.cast(tf.range(shape[0])[:, None, None], tf.float32)


def test_sizes_are_constants_and_only_open_conditions_stay():
    specs = tf.TensorSpec([None, None, 6], tf.float32, name="picture"), tf.TensorSpec([], tf.float32, name="factor")
    function = tf.function(serve, autograph=False).get_concrete_function(*specs)
    graph = function.graph.as_graph_def()
    for length in (7, 8):
        fixed = {"picture:0": tf.TensorSpec([1, length, 6], tf.float32), "factor:0": specs[1]}
        inputs = [node for node in graph.node if node.op == "Placeholder"]
        without = type(graph).FromString(graph.SerializeToString())
        for node in inputs:
            without.node.remove(node)
        folded, (output,) = folding.fold(without, fixed, [function.outputs[0].name])
        kinds = [node.op for node in folded.node]
        assert not {"Shape", "FloorMod", "Range", "Pack"} & set(kinds)
        assert sum(kind in ("If", "StatelessIf") for kind in kinds) == 1, "the number isn't known before"
        assert ("Pad" in kinds) == (length == 7)
        with tf.Graph().as_default() as built:
            given = {name: tf.compat.v1.placeholder(spec.dtype, spec.shape) for name, spec in fixed.items()}
            (made,) = tf.graph_util.import_graph_def(folded, given, [output], name="")
        picture = np.random.default_rng(length).normal(size=[1, length, 6]).astype("float32")
        for factor in (1.0, 3.0):
            with tf.compat.v1.Session(graph=built) as session:
                seen = session.run(made, dict(zip(given.values(), (picture, factor), strict=True)))
            np.testing.assert_allclose(seen, function(tf.constant(picture), tf.constant(factor)), rtol=1e-6)
