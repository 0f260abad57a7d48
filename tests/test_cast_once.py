"""The weights are cast before loading, and nothing else changes: same bits, tables and loops included."""

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

import tfhalf
from tfhalf import cast_once

HALF, BFLOAT16, FLOAT = tf.float16.as_datatype_enum, tf.bfloat16.as_datatype_enum, tf.float32.as_datatype_enum


def casts_of_weights(folder) -> int:
    """Casts from half that stand behind the reading of a variable."""
    graph = saved_model_pb2.SavedModel.FromString((folder / "saved_model.pb").read_bytes()).meta_graphs[0]
    count = 0
    for function in graph.graph_def.library.function:
        reads = {f"{node.name}:value:0" for node in function.node_def if node.op == "ReadVariableOp"}
        count += sum(
            node.op == "Cast" and node.input[0] in reads and node.attr["SrcT"].type in (HALF, BFLOAT16)
            for node in function.node_def
        )
    return count


def same_bits(source, target, inputs):
    before, after = tf.saved_model.load(str(source)), tf.saved_model.load(str(target))
    for name, function in before.signatures.items():
        expected = function(**inputs)
        for key, tensor in after.signatures[name](**inputs).items():
            np.testing.assert_array_equal(tensor.numpy(), expected[key].numpy(), err_msg=f"{name} {key}")
    return after


def test_same_bits_from_every_signature(bundle, samples, tmp_path):
    cast, halves = cast_once.write(bundle, tmp_path / "once")
    assert cast == halves > 10
    assert casts_of_weights(bundle) > 10
    assert casts_of_weights(tmp_path / "once") == 0
    loaded = same_bits(bundle, tmp_path / "once", {"picture": tf.constant(samples)})
    assert {variable.dtype for variable in loaded.signatures["serving_default"].variables} == {tf.float32}
    tfhalf.verify(bundle)  # nothing was changed in it


def save(folder, module, function):
    signature = tf.function(function).get_concrete_function(x=tf.TensorSpec([None], tf.float32, name="x"))
    tf.saved_model.save(module, str(folder), signatures=signature)


def test_tables_and_strings_stay(tmp_path):
    module = tf.Module()
    module.table = tf.lookup.StaticHashTable(
        tf.lookup.KeyValueTensorInitializer(tf.constant(["a", "b"]), tf.constant([1, 2])), 0
    )
    module.embedding = tf.Variable(tf.random.stateless_normal([3, 4], [1, 2], dtype=tf.float16))

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="text")])
    def function(text):
        weights = tf.cast(module.embedding, tf.float32)
        _, total = tf.while_loop(lambda n, _: n < 3, lambda n, y: (n + 1, y + weights), [0, tf.zeros([3, 4])])
        return {"y": tf.gather(total, module.table.lookup(text)), "upper": tf.strings.upper(text)}

    tf.saved_model.save(module, str(tmp_path / "1"), signatures=function)
    assert cast_once.write(tmp_path / "1", tmp_path / "once") == (1, 1)
    same_bits(tmp_path / "1", tmp_path / "once", {"text": tf.constant(["b", "a", "x", ""])})


def test_variable_that_is_used_otherwise_is_left_alone(tmp_path):
    module = tf.Module()
    module.plain, module.used = tf.Variable([0.1], dtype=tf.float16), tf.Variable([0.1], dtype=tf.float16)
    module.back = tf.Variable([0.1], dtype=tf.bfloat16)

    def function(x):
        half = tf.cast(x, tf.float16) * module.used  # computed in half itself
        return {"y": tf.cast(module.plain, x.dtype) * x + tf.cast(half, x.dtype) + tf.cast(module.back, x.dtype)}

    save(tmp_path / "1", module, function)
    assert cast_once.write(tmp_path / "1", tmp_path / "once") == (2, 3)
    same_bits(tmp_path / "1", tmp_path / "once", {"x": tf.constant([1.0, 3.0])})


def test_variable_that_only_the_saver_reads_and_float32_ones(tmp_path):
    module = tf.Module()
    module.weight, module.unused = tf.Variable([2.0]), tf.Variable([1.0], dtype=tf.float16)
    save(tmp_path / "1", module, lambda x: {"y": x * module.weight})
    cast_once.write(tmp_path / "1", tmp_path / "once")
    same_bits(tmp_path / "1", tmp_path / "once", {"x": tf.constant([1.0])})


def test_what_is_no_saved_model_of_tensorflow_2(tmp_path):
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "saved_model.pb").write_bytes(saved_model_pb2.SavedModel().SerializeToString())
    with pytest.raises(ValueError, match="object graph"):
        cast_once.write(tmp_path / "1", tmp_path / "once")
