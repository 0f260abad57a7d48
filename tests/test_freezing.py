"""Frozen signatures: no variables, no casts of weights, the same numbers."""

import numpy as np
import pytest
import tensorflow as tf

import tfhalf
from tfhalf import freezing


def test_graph_holds_float32_constants_and_the_same_numbers(bundle, samples, tmp_path):
    frozen = freezing.freeze(bundle, "serving_float32")
    nodes = [*frozen.graph.node, *(node for f in frozen.graph.library.function for node in f.node_def)]
    kinds = {node.op for node in nodes}
    assert not kinds & {"VarHandleOp", "ReadVariableOp", "Placeholder"}
    halves = [node for node in nodes if node.op == "Const" and node.attr["dtype"].type == tf.float16.as_datatype_enum]
    assert not halves
    assert not [node for node in nodes if node.op == "Cast" and node.attr["SrcT"].type == tf.float16.as_datatype_enum]
    frozen.save(tmp_path / "frozen")
    expected = tf.saved_model.load(str(bundle)).signatures["serving_float32"](picture=tf.constant(samples))
    loaded = tf.saved_model.load(str(tmp_path / "frozen"))
    assert list(loaded.signatures) == [freezing.SIGNATURE]
    seen = loaded.signatures[freezing.SIGNATURE](picture=tf.constant(samples))
    np.testing.assert_allclose(seen["logits"], expected["logits"], rtol=1e-5, atol=1e-5)
    assert frozen.takes_any_batch


def test_batch_can_be_fixed(bundle, samples, tmp_path):
    freezing.freeze(bundle, "serving_float32").fix({"picture": [1, 16, 16, 3]}).save(tmp_path / "one")
    loaded = tf.saved_model.load(str(tmp_path / "one"))
    function = loaded.signatures[freezing.SIGNATURE]
    assert function.structured_input_signature[1]["picture"].shape == [1, 16, 16, 3]
    assert function.structured_outputs["logits"].shape == [1, 10]
    with pytest.raises((TypeError, ValueError, tf.errors.InvalidArgumentError)):
        function(picture=tf.constant(samples))


def test_strings_and_tables_are_refused(tmp_path):
    module = tf.Module()
    rows = tf.lookup.KeyValueTensorInitializer(tf.constant([1, 2]), [3.0, 4.0])
    module.table = tf.lookup.StaticHashTable(rows, 0.0)
    signatures = {}
    for name, dtype, function in (
        ("takes", tf.string, lambda x: {"y": tf.strings.length(tf.identity(x))}),
        ("gives", tf.int32, lambda x: {"y": tf.strings.as_string(x)}),
        ("looks", tf.int32, lambda x: {"y": module.table.lookup(x)}),
    ):
        signatures[name] = tf.function(function, input_signature=[tf.TensorSpec([None], dtype, name="x")])
    tf.saved_model.save(module, str(tmp_path / "1"), signatures=signatures)
    for name, message in (
        ("takes", "input x of takes is strings, read by the operation StringLength: .*serve the bundle itself"),
        ("gives", "output y of gives is strings: .*serve the bundle itself"),
        ("looks", "looks has a lookup table, operation LookupTableFindV2: .*serve the bundle itself"),
    ):
        with pytest.raises(tfhalf.ExportError, match=message):
            freezing.freeze(tmp_path / "1", name)


def test_large_weights_are_refused(copy):
    with open(copy / "variables" / "variables.data-00000-of-00001", "ab") as file:
        file.truncate(2**30)  # a hole: nothing is written
    with pytest.raises(tfhalf.ExportError, match=r"may come to 2\.1 GB in float32.*serve the bundle itself"):
        freezing.freeze(copy, "serving_float32")
