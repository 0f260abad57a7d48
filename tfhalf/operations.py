"""Which operations may stand in a graph that is loaded: an allow-list, by what TensorFlow says of each operation.

A SavedModel is a program. TensorFlow marks the operations that do something beside computing their outputs as stateful:
of those only the ones that are named here are let through, which hold variables, tables and lists, draw random numbers
and call functions. All others compute outputs from inputs and are let through, but for the few that reach out of the
graph all the same: some read a file that an attribute names, some are bound to a device, another process or another
machine. Input pipelines (`tf.data`) have no place in a served function.

Two things that a graph does with files are needed, and allowed where they are and nowhere else:

* what saves and restores variables, in the functions that only the saver calls: never where a signature or an
  initialiser gets;
* tables that are filled from a text file, where it is certain that the file is an asset of the SavedModel, by whichever
  way the function is called.

Functions are part of the graph: what they hold is looked at too, whether they are called or not.

Source: the operations' registry, https://www.tensorflow.org/api_docs/python/tf/raw_ops
"""

import functools
import re
from collections.abc import Iterator

import tensorflow as tf
from tensorflow.core.framework import node_def_pb2
from tensorflow.core.protobuf import meta_graph_pb2, saved_model_pb2

# The registry tells which operations are stateful; there is no public name for it.
from tensorflow.python.framework import op_def_registry

_STATEFUL = re.compile(
    # Variables.
    r"VarHandleOp|ReadVariableOp|AssignVariableOp|Assign(Add|Sub)VariableOp|VarIsInitializedOp|DestroyResourceOp"
    r"|DisableCopyOnRead|VariableShape|ResourceGather(Nd)?|ResourceScatter\w+|ResourceStridedSliceAssign"
    r"|Variable(V2)?|TemporaryVariable"
    # Lookup tables.
    r"|(Anonymous)?(Mutable|MutableDense)?HashTable(OfTensors)?(V2)?|LookupTable\w+V2|InitializeTableV2"
    # Lists in loops.
    r"|TensorArray\w*|Stack(Push|Pop|Close)?(V2)?"
    # Calls and branches.
    r"|StatefulPartitionedCall|While|If|Case|Assert|CheckNumerics|DeviceIndex|GuaranteeConst|Empty"
    # Random numbers.
    r"|Random\w+|ParameterizedTruncatedNormal|TruncatedNormal|Multinomial|SampleDistortedBoundingBox(V2)?"
    r"|StatelessRandom\w+|Stateful(RandomBinomial|StandardNormal|TruncatedNormal|Uniform)\w*|Rng(ReadAndSkip|Skip)"
    r"|NonDeterministicInts|(Log)?UniformCandidateSampler|(All|LearnedUnigram|ThreadUnsafeUnigram)CandidateSampler"
)
# Of what the expressions above and below let through.
_REFUSED = {
    "reads the server's files": re.compile(
        r"ReadFile|\w*MatchingFiles\w*|ImmutableConst|(En|De)codeProto(V2)?|GenerateVocabRemapping|LoadAndRemapMatrix"
        r"|FixedUnigramCandidateSampler|RecordInput|Restore(Slice|V2)?|\w*Reader\w*|InitializeTableFrom\w+|Load\w+"
    ),
    "writes the server's files": re.compile(
        r"Write\w+|Save(Slices|V2)?|MergeV2Checkpoints|Sharded\w+|\w*Summary(Db|File)?Writer|DistributedSave|DatasetToTFRecord"
        r"|StoreMinibatchStatisticsInFdo|FileSystem\w+"
    ),
    "needs this Python process": re.compile(r"(Eager)?PyFunc(Stateless)?"),
    "prints or stops the server": re.compile(r"Print(V2)?|Abort|Timestamp|Sleep\w*|WorkerHeartbeat"),
    "reports to files or other machines": re.compile(r"Debug\w+|Copy(Host)?|\w*Stats\w*"),
    "runs on another machine or device": re.compile(
        r"_?(Host)?(Send|Recv)\w*|Collective\w+|Nccl\w+|RemoteCall|(In|Out)feed\w+|CrossReplicaSum|AllToAll|SyncDevice"
        r"|DataService\w+|\w*Distributed\w*|\w*MultiDevice\w*|Batch(Function)?|Unbatch(Grad)?|PartitionedCallRemote"
    ),
    "runs on one kind of device only": re.compile(
        r"\w*TPU\w*|\w*Xla\w*|Cudnn\w+|\w*SparseCore\w*|\w*Minibatch\w*|\w*CooTensors?|Prelinearize\w*|GlobalIterId"
    ),
    "runs an input pipeline": re.compile(
        r"\w*Dataset\w*|\w*Queue\w*|Barrier\w*|\w*Iterator\w*|\w*ThreadPool\w*|\w*MemoryCache|\w*SeedGenerator"
        r"|ComputeBatchSize"
    ),
    "is TensorFlow's own, inside of it": re.compile(r"_\w+"),
}
_SAVER = {"SaveV2", "RestoreV2", "MergeV2Checkpoints", "ShardedFilename"}
_TABLE_FILES = {"InitializeTableFromTextFile", "InitializeTableFromTextFileV2"}
_CALLS = {"PartitionedCall", "StatefulPartitionedCall"}
_OTHER_MACHINE = re.compile(r"/job:(?!localhost\b)")
INIT_SIGNATURE = "__saved_model_init_op"
_INIT_COLLECTIONS = ("saved_model_main_op", "legacy_init_op")
_ASSET_COLLECTION = "saved_model_assets"


@functools.cache
def why_not(operation: str) -> str:
    """Says what an operation does that none in a served graph may; "" for one that may stand there."""
    for why, names in _REFUSED.items():
        if names.fullmatch(operation):
            return why
    definition = op_def_registry.get(operation)
    # What other packages registered in this process is missing elsewhere.
    if definition is None or not hasattr(tf.raw_ops, operation):
        return "isn't part of TensorFlow"
    if definition.is_stateful and not _STATEFUL.fullmatch(operation):
        return "does more than computing its outputs"
    return ""


def find_refused(proto: saved_model_pb2.SavedModel) -> str:
    """Says which operation of a SavedModel may not stand in a graph that is loaded, and why.

    Args:
        proto: what `saved_model.pb` holds.

    Returns:
        As "operation ReadFile in the graph reads the server's files"; "" where all may stand there.
    """
    return next(filter(None, (_Graph(meta_graph).find_refused() for meta_graph in proto.meta_graphs)), "")


def assets(meta_graph: meta_graph_pb2.MetaGraphDef) -> dict[str, str]:
    """Returns the names of tensors that hold the paths of assets, and the files that they name in `assets/`."""
    found = list(meta_graph.asset_file_def)
    for packed in () if found else meta_graph.collection_def[_ASSET_COLLECTION].any_list.value:
        found.append(meta_graph_pb2.AssetFileDef())
        packed.Unpack(found[-1])
    return {asset.tensor_info.name: asset.filename for asset in found}


class _Graph:
    """A graph with its functions, and who calls whom. "" stands for the graph itself where a function is named."""

    def __init__(self, meta_graph: meta_graph_pb2.MetaGraphDef):
        graph = meta_graph.graph_def
        self.bodies = {"": graph.node} | {f.signature.name: f.node_def for f in graph.library.function}
        self.nodes = {where: {node.name: node for node in body} for where, body in self.bodies.items()}
        self.arguments = {f.signature.name: [a.name for a in f.signature.input_arg] for f in graph.library.function}
        self.attributes = {f.signature.name: f.attr for f in graph.library.function}
        self.gradients = {gradient.function_name: gradient.gradient_func for gradient in graph.library.gradient}
        self.objects = meta_graph.object_graph_def
        self.assets = {_tensor(name) for name in assets(meta_graph)}
        signatures = dict(meta_graph.signature_def)
        init = signatures.pop(INIT_SIGNATURE, meta_graph_pb2.SignatureDef())
        served = self._before(info.name for one in signatures.values() for info in one.outputs.values())
        prepared = {info.name for info in init.outputs.values()}
        prepared |= {name for key in _INIT_COLLECTIONS for name in meta_graph.collection_def[key].node_list.value}
        saver = meta_graph.saver_def
        self.init_nodes = self._before(prepared) - served
        self.saver_nodes = self._before(filter(None, (saver.save_tensor_name, saver.restore_op_name)))
        self.saver_nodes -= served | self.init_nodes
        others = (node for node in graph.node if node.name not in self.saver_nodes)
        self.called = self._reached([name for node in others for name in self._functions_of(node)])
        self.called |= self._reached(self.objects.concrete_functions)

    def find_refused(self) -> str:
        """As the function above."""
        for where, body in self.bodies.items():
            place = f"function {where}" if where else "the graph"
            for node in body:
                why = self._why_not(where, node)
                if why:
                    return f"operation {node.op} in {place} {why}"
        return ""

    def _why_not(self, where: str, node: node_def_pb2.NodeDef) -> str:
        if _OTHER_MACHINE.search(node.device):
            return f"runs on another machine, {node.device}"
        if strange := [name for name in _named(node.attr) if name not in self.arguments]:
            return f"calls {strange[0]}, which is no function of the graph"
        if node.op in self.arguments:
            return ""
        if node.op in _SAVER and self._is_saver(where, node):
            return ""
        if node.op in _TABLE_FILES and len(node.input) > 1 and self._is_asset(where, node.input[1], node, set()):
            return ""
        return why_not(node.op)

    def _is_saver(self, where: str, node: node_def_pb2.NodeDef) -> bool:
        if not where:
            return node.name in self.saver_nodes
        # TensorFlow may put one function in another one's place when both say that they implement the same.
        return where not in self.called and "api_implements" not in self.attributes[where]

    def _is_asset(self, where: str, name: str, user: node_def_pb2.NodeDef, seen: set) -> bool:
        """Whether a text is the path of an asset, however the node that uses it comes to run."""
        if name.startswith("^"):
            return False
        source = self.nodes[where].get(name.partition(":")[0])
        if source is not None and source.op == "Identity":
            return self._is_asset(where, source.input[0], user, seen)
        if not where and source is not None and source.op == "ReadVariableOp":
            return self._holds_asset(_node(source.input[0]), user, seen)
        if not where:  # the loader says where the assets are to what it runs itself only
            return _tensor(name) in self.assets and user.name in self.init_nodes
        if source is not None or name not in self.arguments[where]:
            return False
        if "api_implements" in self.attributes[where]:
            return False
        index = self.arguments[where].index(name)
        if (where, index) in seen:
            return True
        seen.add((where, index))
        calls = [(place, node) for place, body in self.bodies.items() for node in body if where in _all_called(node)]
        return self._is_bound_to_asset(where, index) and all(
            node.op in _CALLS and index < len(node.input) and self._is_asset(place, node.input[index], node, seen)
            for place, node in calls
        )

    def _holds_asset(self, variable: str, user: node_def_pb2.NodeDef, seen: set) -> bool:
        """Whether all that is ever put into a variable of the graph is the path of an asset."""
        handles = [node for body in self.bodies.values() for node in body if node.op == "VarHandleOp"]
        names = [node.name for node in handles if _shared_name(node) == _shared_name(self.nodes[""][variable])]
        users = [node for node in self.bodies[""] if variable in map(_node, node.input)]
        assigned = [node.input[1] for node in users if node.op == "AssignVariableOp"]
        return (
            names == [variable]
            and {node.op for node in users} <= {"AssignVariableOp", "ReadVariableOp", "VarIsInitializedOp"}
            and all(self._is_asset("", name, user, seen) for name in assigned)
        )

    def _is_bound_to_asset(self, function: str, index: int) -> bool:
        """Whether an object that can call a function gives it an asset there; true where none can."""
        if function not in self.objects.concrete_functions:
            return True
        bound = self.objects.concrete_functions[function].bound_inputs
        index -= len(self.arguments[function]) - len(bound)  # what is bound comes last
        return index >= 0 and self.objects.nodes[bound[index]].WhichOneof("kind") == "asset"

    def _before(self, names) -> set[str]:
        """The nodes of the graph that must run before these tensors or operations are there."""
        todo, found = [_node(name) for name in names], set()
        while todo:
            name = todo.pop()
            if name in self.nodes[""] and name not in found:
                found.add(name)
                todo += map(_node, self.nodes[""][name].input)
        return found

    def _reached(self, names) -> set[str]:
        """These functions, and all that they call."""
        todo, found = list(names), set()
        while todo:
            name = todo.pop()
            if name in self.arguments and name not in found:
                found.add(name)
                todo += [one for node in self.bodies[name] for one in self._functions_of(node)]
                todo.append(self.gradients.get(name, ""))
        return found

    def _functions_of(self, node: node_def_pb2.NodeDef) -> list[str]:
        return [name for name in _all_called(node) if name in self.arguments]


def _all_called(node: node_def_pb2.NodeDef) -> set[str]:
    return {node.op, *_named(node.attr)}


def _named(attributes) -> Iterator[str]:
    """The functions that attributes name."""
    for value in attributes.values():
        kind = value.WhichOneof("value")
        for function in [value.func] if kind == "func" else value.list.func if kind == "list" else ():
            if function.name:
                yield function.name
            yield from _named(function.attr)


def _shared_name(node: node_def_pb2.NodeDef) -> str:
    return node.attr["shared_name"].s.decode(errors="replace") or node.name


def _node(name: str) -> str:
    return name.removeprefix("^").partition(":")[0]


def _tensor(name: str) -> str:
    return name if ":" in name else f"{name}:0"
