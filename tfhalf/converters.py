"""Converts a SavedModel without variables to another runtime's file, in a process without anything of ours.

`tfhalf.convert` starts this file by its path: converters print what they like, and some end the process when they fail.

    python converters.py FORMAT SAVED_MODEL_FOLDER FOLDER

The file is written into FOLDER. On failure the last line on stderr says why, and the exit status isn't 0.

Known troubles of converters, and what is done about them:

* LiteRT: an operation that only "Flex" has makes a file that the stock interpreter doesn't run: such are not allowed.
* tf2onnx goes on where it has no converter, and writes an invalid file: what it logs as an error is an error, and
  `onnx.checker` has the last word. It has none for Erfc, of which Keras' exact gelu is made: it becomes 1 - Erf.
* OpenVINO reports its use over the network when it is imported. Without its package for that it doesn't.

What computes in half in the float16 file of ONNX: all but softmax, exponentials, logarithms, powers, sums and means,
whose numbers are in float32 with a cast before and after (`_FLOAT32`).
"""

import graphlib
import logging
import re
import sys
from pathlib import Path

_SIGNATURE = "serving_default"
_OPSET = 18  # the newest that tf2onnx 1.17 writes
_FLOAT32 = ["Softmax", "LogSoftmax", "Exp", "Log", "Pow", "Sqrt", "Reciprocal", "ReduceMean", "ReduceSum"]
_FLOAT32 += ["ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceLogSumExp", "Softplus"]


class ConversionError(Exception):
    """There is no way to convert it; the message is one line."""


def litert(saved_model: str, folder: Path) -> None:
    """Writes a LiteRT file with float16 weights, which computes in float32."""
    import tensorflow as tf

    converter = tf.lite.TFLiteConverter.from_saved_model(saved_model, signature_keys=[_SIGNATURE])
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.target_spec.supported_types = [tf.float16]
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
    try:
        content = converter.convert()
    except Exception as error:  # ConverterError has no public name
        named = re.findall(r"(?:TF Select|Custom) ops: (.+)", str(error))
        if not named:
            raise
        raise ConversionError(f"LiteRT has no operation for TensorFlow's {'; '.join(named)}") from error
    (folder / "model.tflite").write_bytes(content)


def onnx(saved_model: str, folder: Path) -> None:
    """Writes an ONNX file in float32."""
    _save_onnx(_to_onnx(saved_model), folder)


def onnx_float16(saved_model: str, folder: Path) -> None:
    """Writes an ONNX file that stores and computes in float16, with float32 inputs and outputs."""
    from onnxruntime.transformers import float16

    blocked = [*float16.DEFAULT_OP_BLOCK_LIST, *_FLOAT32]
    model = float16.convert_float_to_float16(_to_onnx(saved_model), keep_io_types=True, op_block_list=blocked)
    _sort(model.graph)
    _save_onnx(model, folder)


def openvino(saved_model: str, folder: Path) -> None:
    """Writes OpenVINO's two files, with float16 weights."""
    sys.modules["openvino_telemetry"] = None  # importing it fails then, for which OpenVINO is prepared
    import openvino as ov

    try:
        model = ov.convert_model(saved_model)
    except ov.frontend.OpConversionFailure as error:
        named = re.findall(r"No conversion rule found for operations: (.+)", str(error))
        if not named:
            raise
        raise ConversionError(f"OpenVINO has no operation for TensorFlow's {'; '.join(named)}") from error
    ov.save_model(model, folder / "model.xml", compress_to_fp16=True)


def _to_onnx(saved_model: str):
    """Returns the model as ONNX, with the signature's names."""
    import tensorflow as tf
    import tf2onnx
    from tensorflow.python.framework import convert_to_constants

    function = tf.saved_model.load(saved_model).signatures[_SIGNATURE]
    # The signature is a function that calls another: one graph is made of them.
    flat = convert_to_constants.convert_variables_to_constants_v2(
        function, lower_control_flow=False, aggressive_inlining=True
    )
    names = {tensor.name: tensor.name.partition(":")[0] for tensor in flat.inputs}
    names |= {t.name: name for name, t in zip(sorted(function.structured_outputs), flat.outputs, strict=True)}
    errors = _Errors()
    logging.getLogger("tf2onnx").addHandler(errors)
    model, _ = tf2onnx.convert.from_graph_def(
        flat.graph.as_graph_def(add_shapes=True),
        input_names=[tensor.name for tensor in flat.inputs],
        output_names=[tensor.name for tensor in flat.outputs],
        opset=_OPSET,
        custom_op_handlers={"Erfc": (_erfc, [])},
        tensors_to_rename=names,
    )
    if errors.unsupported:
        named = ", ".join(sorted(errors.unsupported))
        raise ConversionError(f"ONNX has no operation, or tf2onnx no converter, for TensorFlow's {named}")
    if errors.lines:
        raise ConversionError(f"tf2onnx: {errors.lines[0]}")
    return model


class _Errors(logging.Handler):
    """Keeps what tf2onnx logs as errors and goes on after."""

    def __init__(self):
        super().__init__(logging.ERROR)
        self.unsupported, self.lines = set(), []

    def emit(self, record: logging.LogRecord) -> None:
        line = " ".join(record.getMessage().split())
        unsupported = r"Tensorflow op \[.*: (\w+)\] is not supported|Failed to convert node .*?OP=(\w+?)(?:\\n|\s)"
        if found := re.match(unsupported, line):
            self.unsupported.add(found.group(1) or found.group(2))
        else:
            self.lines.append(line)


def _erfc(context, node, name, _) -> None:
    """Makes 1 - Erf(x) of Erfc(x)."""
    import numpy as np

    one = context.make_const(f"{name}_one", np.ones([], "float32"))
    erf = context.make_node("Erf", node.input, op_name_scope=name)
    node.type = "Sub"
    context.replace_inputs(node, [one.output[0], erf.output[0]])


def _sort(graph) -> None:
    """Puts nodes behind those whose outputs they read, also in graphs of their own: new casts were put at the end."""
    makers = {output: index for index, node in enumerate(graph.node) for output in node.output}
    before = {index: {makers[name] for name in _reads(node) if name in makers} for index, node in enumerate(graph.node)}
    nodes = [graph.node[index] for index in graphlib.TopologicalSorter(before).static_order()]
    copies = [type(node).FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)


def _reads(node) -> set[str]:
    names = set(node.input)
    for graph in (attribute.g for attribute in node.attribute):
        names |= {output.name for output in graph.output}.union(*(_reads(inner) for inner in graph.node))
    return names


def _save_onnx(model, folder: Path) -> None:
    import onnx as onnx_package

    onnx_package.checker.check_model(model, full_check=True)
    (folder / "model.onnx").write_bytes(model.SerializeToString())


def main(format: str, saved_model: str, folder: str) -> None:
    """Converts; ends the process with the reason where it can't."""
    sys.modules["keras"] = None  # isn't needed; TensorFlow imports it where it is, half the time of its start
    write = {"litert": litert, "onnx": onnx, "onnx_float16": onnx_float16, "openvino": openvino}[format]
    try:
        write(saved_model, Path(folder))
    except Exception as error:  # converters raise whatever they like
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        what = "" if isinstance(error, ConversionError) else f"{type(error).__name__}: "
        sys.exit(f"\n{what}{lines[-1] if lines else 'no reason given'}")


if __name__ == "__main__":
    main(*sys.argv[1:])
