"""The allow-list against TensorFlow's whole registry, and against graphs that try to get around it."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tensorflow as tf
from tensorflow.core.framework import op_def_pb2
from tensorflow.core.protobuf import saved_model_pb2
from tensorflow.python.client import pywrap_tf_session

import tfhalf
from tfhalf import importing, operations

# There is no public way to list what is registered.
REGISTERED = op_def_pb2.OpList.FromString(pywrap_tf_session.TF_GetBuffer(pywrap_tf_session.TF_GetAllOpList())).op

SMELLS = re.compile(
    "File|Read|Write|Writ|Save|Restore|Checkpoint|Dataset|Iterator|Record|LMDB|Sql|Snapshot|Vocab|Print|PyFunc|Python"
    "|Queue|Send|Recv|Collective|Nccl|T[Pp][Uu]|Xla|Cudnn|Cuda|Debug|Dump|Rpc|Remote|Socket|Process|Host|Device|Worker"
    "|Abort|Sleep|Timestamp|Shard|Proto|Service|Distribut|Session|Stage|Mutex|Feed|feed|Mesh|DTensor|AllReduce|AllToAll"
    "|Summary|Server|Client|Log$|Fd$"
)
# They smell and are sound: what each one does.
SOUND = {
    "ReadVariableOp": "a variable",
    "RngReadAndSkip": "a variable",
    "DisableCopyOnRead": "a variable",
    "TensorArrayRead": "a list",
    "TensorArrayReadV2": "a list",
    "TensorArrayReadV3": "a list",
    "TensorArrayWrite": "a list",
    "TensorArrayWriteV2": "a list",
    "TensorArrayWriteV3": "a list",
    "Snapshot": "its input, as it is",
    "DeviceIndex": "a number",
    "Log": "the logarithm",
    **dict.fromkeys(
        ["AudioSummary", "AudioSummaryV2", "HistogramSummary", "ImageSummary", "MergeSummary", "ScalarSummary"],
        "a text for TensorBoard, written nowhere",
    ),
    **dict.fromkeys(["TensorSummary", "TensorSummaryV2"], "a text for TensorBoard, written nowhere"),
}
# Texts that an operation that is let through takes as attributes: none is a path or an address.
# fmt: off
TEXTS = {
    "allowed_devices", "bad_indices_policy", "compression_type", "config", "config_proto", "container",
    "context_dense_keys", "context_sparse_keys", "dct_method", "debug_name", "dense_keys", "dimension_numbers",
    "dst_format", "encoding", "equation", "executor_type", "feature_list_dense_keys",
    "feature_list_dense_missing_assumed_empty", "feature_list_sparse_keys", "field_delim", "fill", "fill_mode",
    "frame_name", "input_encoding", "input_order", "interpolation", "kernel_type", "left_pad", "message",
    "metadata", "na_value", "noise", "padding", "pattern", "placeholder", "rewrite", "right_pad",
    "row_partition_types", "separator", "set_operation", "shared_name", "source", "sparse_keys", "src_format",
    "stack_name", "tensor_array_name", "template", "var_name", "xmp_metadata", "description", "labels",
    "display_name", "device_names",
}
# fmt: on


# By purpose: layers, recurrence, texts, tables, sounds, pictures, random numbers.
# fmt: off
NEEDED = [
    "MatMul", "Conv2D", "DepthwiseConv2dNative", "FusedBatchNormV3", "Einsum", "Softmax", "Erf", "LeakyRelu",
    "MaxPool", "ResizeBilinear", "VarHandleOp", "ReadVariableOp", "AssignVariableOp", "ResourceGather",
    "StatefulPartitionedCall", "While", "StatelessWhile", "If", "Case", "TensorListReserve", "TensorListStack",
    "TensorArrayV3", "Assert", "StringSplitV2", "UnicodeDecodeWithOffsets", "RaggedTensorToTensor",
    "RaggedGather", "RegexReplace", "StaticRegexReplace", "ReduceJoin", "UnicodeEncode", "HashTableV2",
    "LookupTableFindV2", "LookupTableImportV2", "InitializeTableV2", "MutableHashTableV2", "RFFT", "IRFFT",
    "FFT2D", "AudioSpectrogram", "DecodeWav", "DecodeImage", "CombinedNonMaxSuppression", "NonMaxSuppressionV5",
    "CropAndResize", "CTCBeamSearchDecoder", "TopKV2", "RandomUniform", "StatelessRandomUniformV2",
    "StatefulUniform", "StringToHashBucketFast", "ParseExampleV2",
]
# fmt: on


def test_what_smells_is_refused():
    admitted = {one.name for one in REGISTERED if not operations.why_not(one.name)}
    assert {name for name in admitted if SMELLS.search(name)} == set(SOUND)
    assert len(admitted) > 800
    texts = {
        attribute.name
        for one in REGISTERED
        if one.name in admitted
        for attribute in one.attr
        if attribute.type in ("string", "list(string)") and not attribute.allowed_values.list.s
    }
    assert texts <= TEXTS
    inputs = {argument.name for one in REGISTERED if one.name in admitted for argument in one.input_arg}
    assert not {name for name in inputs if re.search("file|path|prefix|address|url", name)}


def test_what_models_need_is_let_through():
    for name in NEEDED:
        assert not operations.why_not(name), name


def saved(function, *specs) -> saved_model_pb2.SavedModel:
    """A SavedModel's graph with a function's operations, and the functions that it calls."""
    proto = saved_model_pb2.SavedModel()
    concrete = tf.function(function, autograph=False).get_concrete_function(*specs)
    proto.meta_graphs.add().graph_def.CopyFrom(concrete.graph.as_graph_def())
    return proto


def in_loop(body):
    return lambda x: tf.while_loop(
        lambda n, _: n < 2, lambda n, y: (n + 1, body(y)), (0, x), (tf.TensorShape([]), x.shape)
    )


def in_calls(body):
    inner = tf.function(body, autograph=False)
    return lambda x: tf.function(lambda y: inner(y), autograph=False)(x)


def in_branch(body):
    return lambda x: tf.cond(tf.strings.length(x) > 1, lambda: body(x), lambda: x)


def first_line(dataset):
    return dataset.reduce("", lambda _, line: line)


ATTACKS = {
    "ReadFile": tf.io.read_file,
    "WriteFile": lambda x: [tf.io.write_file(x, x), x][1],
    "MatchingFiles": lambda x: tf.io.matching_files(x)[0],
    "EagerPyFunc": lambda x: tf.ensure_shape(tf.py_function(lambda y: y, [x], tf.string), []),
    "PyFunc": lambda x: tf.ensure_shape(tf.numpy_function(lambda y: y, [x], tf.string), []),
    "PrintV2": lambda x: [tf.print(x, output_stream="file:///tmp/x"), x][1],
    r"\w*Dataset": lambda x: first_line(tf.data.TextLineDataset(x)),
    "TFRecordDatasetV2": lambda x: [
        tf.raw_ops.TFRecordDatasetV2(
            filenames=x, compression_type="", buffer_size=1, byte_offsets=tf.zeros([0], tf.int64)
        ),
        x,
    ][1],
    "DebugIdentityV2": lambda x: tf.raw_ops.DebugIdentityV2(input=x, debug_urls=["file:///tmp/x"]),
    "ImmutableConst": lambda x: [
        tf.raw_ops.ImmutableConst(dtype=tf.int8, shape=[1], memory_region_name="/etc/hostname"),
        x,
    ][1],
    "DecodeProtoV2": lambda x: [
        tf.raw_ops.DecodeProtoV2(
            bytes=x, message_type="m", field_names=[], output_types=[], descriptor_source="/etc/x"
        ),
        x,
    ][1],
    "CollectiveReduceV2": lambda x: [
        tf.raw_ops.CollectiveReduceV2(
            input=1.0, group_size=1, group_key=1, instance_key=1, ordering_token=[], merge_op="Add", final_op="Id"
        ),
        x,
    ][1],
    "RestoreV2": lambda x: tf.raw_ops.RestoreV2(
        prefix=x, tensor_names=["v"], shape_and_slices=[""], dtypes=[tf.string]
    )[0],
    "Abort": lambda x: [tf.raw_ops.Abort(), x][1],
}


@pytest.mark.parametrize("operation", ATTACKS)
def test_attacks_are_refused_wherever_they_hide(operation):
    for hide in (lambda body: body, in_calls, in_branch, in_loop, lambda body: in_calls(in_loop(in_branch(body)))):

        def attack(x, hide=hide):
            return hide(lambda y: tf.ensure_shape(ATTACKS[operation](y), []))(x)

        found = operations.find_refused(saved(attack, tf.TensorSpec([], tf.string)))
        assert re.match(f"operation {operation} in (the graph|function .*) ", found), found
    assert not operations.find_refused(
        saved(lambda x: in_calls(in_loop(tf.strings.upper))(x), tf.TensorSpec([], tf.string))
    )


@pytest.fixture
def graph(bundle) -> saved_model_pb2.SavedModel:
    """A real bundle's graph, to change."""
    proto = tfhalf.bundle.read_graph(bundle)
    assert not operations.find_refused(proto)
    return proto


def test_an_attribute_can_name_functions_of_the_graph_only(graph):
    node = next(node for node in graph.meta_graphs[0].graph_def.node if node.op == "StatefulPartitionedCall")
    name = node.attr["f"].func.name
    node.attr["f"].func.name = "ReadFile"
    assert "calls ReadFile, which is no function of the graph" in operations.find_refused(graph)
    node.attr["f"].func.name = name
    node.attr["f"].func.attr["inner"].list.func.add(name="WriteFile")
    assert "calls WriteFile, which is no function" in operations.find_refused(graph)


def test_other_machines_and_unknown_operations_are_refused(graph):
    node = graph.meta_graphs[0].graph_def.node[0]
    node.device = "/job:localhost/replica:0/task:0/device:CPU:0"
    assert not operations.find_refused(graph)
    node.device = "/job:worker/task:1"
    assert "runs on another machine" in operations.find_refused(graph)
    node.device = ""
    for name in ("OurOwnKernel", "_Send", "_HostRecv"):
        node.op = name
        assert f"operation {name} in the graph" in operations.find_refused(graph)


def served_call(meta, function: str):
    """Lets what serves also call a function, before it answers."""
    call = next(
        n for n in meta.graph_def.node if n.op == "StatefulPartitionedCall" and n.attr["f"].func.name == function
    )
    output = meta.signature_def["serving_default"].outputs["logits"].name.partition(":")[0]
    next(n for n in meta.graph_def.node if n.name == output).input.append(f"^{call.name}")


@pytest.mark.parametrize("kind", ["save", "restore"])
def test_what_saves_and_restores_is_the_savers_only(graph, kind):
    meta = graph.meta_graphs[0]
    (function,) = (f for f in meta.graph_def.library.function if f"_traced_{kind}" in f.signature.name)
    operation = "SaveV2|ShardedFilename|MergeV2Checkpoints" if kind == "save" else "RestoreV2"
    name = function.signature.name

    def served(meta):
        served_call(meta, name)

    def called(meta):
        wrapper = next(f for f in meta.graph_def.library.function if "signature_wrapper" in f.signature.name)
        wrapper.node_def.add(name="x", op="PartitionedCall").attr["f"].func.name = name

    def has_object(meta):
        meta.object_graph_def.concrete_functions[name].bound_inputs.append(0)

    def may_take_anothers_place(meta):
        same = next(f for f in meta.graph_def.library.function if f.signature.name == name)
        same.attr["api_implements"].s = b"x"

    for change in (served, called, has_object, may_take_anothers_place):
        changed = saved_model_pb2.SavedModel.FromString(graph.SerializeToString())
        change(changed.meta_graphs[0])
        found = operations.find_refused(changed)
        assert re.search(f"operation ({operation}) in function .* the server's files", found), change.__name__


def test_a_name_alone_lets_nothing_through():
    proto = saved(in_calls(tf.io.read_file), tf.TensorSpec([], tf.string))
    text = proto.SerializeToString()
    for name in {f.signature.name for f in proto.meta_graphs[0].graph_def.library.function}:
        assert name.startswith("__inference_")  # another name of the same length
        text = text.replace(name.encode(), b"_traced_save"[: len(name)] + name.encode()[12:])
    renamed = saved_model_pb2.SavedModel.FromString(text)
    assert "operation ReadFile in function _traced_save" in operations.find_refused(renamed)


class Words(tf.Module):
    """A table that is filled from a text file, an asset."""

    def __init__(self, file: Path):
        super().__init__()
        lines = tf.lookup.TextFileInitializer(
            str(file), tf.string, tf.lookup.TextFileIndex.WHOLE_LINE, tf.int64, tf.lookup.TextFileIndex.LINE_NUMBER
        )
        self.table = tf.lookup.StaticHashTable(lines, -1)

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="text")])
    def serve(self, text):
        return {"id": self.table.lookup(text)}


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Path:
    """A SavedModel with such a table."""
    folder = tmp_path_factory.mktemp("words")
    (folder / "words.txt").write_text("one\ntwo\n")
    module = Words(folder / "words.txt")
    tf.saved_model.save(module, str(folder / "1"), signatures={"serving_default": module.serve})
    return folder / "1"


def test_tables_are_filled_from_assets_only(words):
    proto = tfhalf.bundle.read_graph(words)
    assert not operations.find_refused(proto)
    assert set(operations.assets(proto.meta_graphs[0]).values()) == {"words.txt"}
    (name,) = (
        f.signature.name
        for f in proto.meta_graphs[0].graph_def.library.function
        if any(node.op == "InitializeTableFromTextFileV2" for node in f.node_def)
    )

    def function(meta):
        return next(f for f in meta.graph_def.library.function if f.signature.name == name)

    def constant(meta):
        """Another file's name, beside the asset's."""
        node = function(meta).node_def.add(name="other", op="Const")
        node.attr["dtype"].type = tf.string.as_datatype_enum
        node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto("/etc/passwd"))
        fill = next(n for n in function(meta).node_def if n.op == "InitializeTableFromTextFileV2")
        fill.input[1] = "other:output:0"

    def served(meta):
        output = meta.signature_def["serving_default"].outputs["id"].name.partition(":")[0]
        call = next(n for n in meta.graph_def.node if n.attr["f"].func.name == name)
        next(n for n in meta.graph_def.node if n.name == output).input.append(f"^{call.name}")

    def unbound(meta):
        bound = meta.object_graph_def.concrete_functions[name].bound_inputs
        nodes = meta.object_graph_def.nodes
        for index, node in enumerate(bound):
            if nodes[node].WhichOneof("kind") == "asset":
                bound[index] = 0

    def no_asset(meta):
        del meta.asset_file_def[:]

    def overwritten(meta):
        """The variable that holds the path gets another one too."""
        other = meta.graph_def.node.add(name="again", op="AssignVariableOp", input=["Variable", "Const"])
        assert other.name

    def shared(meta):
        other = meta.graph_def.node.add(name="twin", op="VarHandleOp")
        variable = next(n for n in meta.graph_def.node if n.name == "Variable")
        other.attr["shared_name"].s = variable.attr["shared_name"].s or b"Variable"

    for change in (constant, served, unbound, no_asset, overwritten, shared):
        changed = saved_model_pb2.SavedModel.FromString(proto.SerializeToString())
        change(changed.meta_graphs[0])
        assert "InitializeTableFromTextFileV2 in function" in operations.find_refused(changed), change.__name__


LOADS = "import sys, tensorflow as tf; tf.saved_model.load(sys.argv[1])"


def test_nothing_runs_before_it_is_refused(words, tmp_path):
    """A table whose filling writes a file, in a folder whose manifest is right: TensorFlow writes it, we don't."""
    proto = tfhalf.bundle.read_graph(words)
    meta = proto.meta_graphs[0]
    (function,) = (
        f
        for f in meta.graph_def.library.function
        if any(node.op == "InitializeTableFromTextFileV2" for node in f.node_def)
    )
    evil = tmp_path / "evil"
    for name, value in (("target", str(evil)), ("content", "x")):
        node = function.node_def.add(name=name, op="Const")
        node.attr["dtype"].type = tf.string.as_datatype_enum
        node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(value))
    function.node_def.add(name="write", op="WriteFile", input=["target:output:0", "content:output:0"])
    function.control_ret["write"] = "write"
    function.signature.control_output.append("write")
    folder = Path(shutil.copytree(words, tmp_path / "1"))
    (folder / "saved_model.pb").write_bytes(proto.SerializeToString())
    (folder / "assets.extra").mkdir(exist_ok=True)
    fingerprint = tf.saved_model.experimental.read_fingerprint(str(folder)).signature_def_hash
    interface = tfhalf.bundle.signatures_of(meta)
    interface["serving_default"] |= {"compute_dtypes": [], "tolerance": 0.0, "max_error": {}}
    tfhalf.Manifest("", {}, "float32", {}, interface, {}, str(fingerprint), tfhalf.bundle.hashes(folder), {}).write(
        folder
    )
    for check in (tfhalf.load_saved_model, tfhalf.verify, tfhalf.bundle.check):
        with pytest.raises(tfhalf.ExportError, match=r"operation WriteFile in function .* writes the server's files"):
            check(folder)
    with pytest.raises(tfhalf.ExportError, match="operation WriteFile"):
        importing.import_model(folder, tmp_path / "imported" / "1")
    assert not evil.exists()
    subprocess.run([sys.executable, "-c", LOADS, str(folder)], check=True, capture_output=True)
    assert evil.read_text() == "x"
