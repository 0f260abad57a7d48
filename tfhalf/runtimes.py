"""Runs a converted file, or a signature of a SavedModel, in its own runtime: in a process without anything of ours.

`tfhalf.latency` starts this file by its path: what comes out is what the runtime answers on its own.

    python runtimes.py KIND PATH INPUTS.npz OUTPUTS.npz

KIND is "litert", "onnx", "openvino:f32", "openvino:bf16" (the precision that it may compute in) or
"tensorflow:<signature>". INPUTS holds an array "<case>/<name>" for each input of each case; OUTPUTS gets an array
"<case>/<name>" for each output. Then a line of JSON says that it is ready, and each line on stdin, a batch size, is
answered by the seconds of calls at that size. It ends when stdin does.

Every runtime gets as many threads as there are cores, takes numpy arrays, and gives numpy arrays.
"""

import json
import os
import sys
import time
from collections.abc import Callable

import numpy as np

_SECONDS, _FEWEST, _MOST = 0.2, 3, 200  # of one round of calls; their number
_THREADS = len(os.sched_getaffinity(0))

Call = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]


def tensorflow(path: str, signature: str) -> Call:
    """A SavedModel's signature, called as anyone would."""
    sys.modules["keras"] = None  # no server has it; TensorFlow imports it where it is, half the time of its start
    import tensorflow as tf

    loaded = tf.saved_model.load(path)

    def call(inputs):
        # `loaded` must live as long as the function: it owns the variables.
        outputs = loaded.signatures[signature](**{name: tf.constant(array) for name, array in inputs.items()})
        return {name: tensor.numpy() for name, tensor in outputs.items()}

    return call


def litert(path: str, _: str) -> Call:
    """LiteRT's interpreter."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(path, num_threads=_THREADS)
    runner = interpreter.get_signature_runner("serving_default")
    shapes = [details["shape_signature"] for details in runner.get_input_details().values()]
    return _called(lambda inputs: runner(**inputs), shapes)


def onnx(path: str, _: str) -> Call:
    """ONNX Runtime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = _THREADS
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def call(inputs):
        return dict(zip(names, session.run(names, inputs), strict=True))

    return _called(call, [one.shape for one in session.get_inputs()])


def openvino(path: str, precision: str) -> Call:
    """OpenVINO on the CPU, told which precision it may compute in: it chooses bfloat16 by itself where it is faster."""
    sys.modules["openvino_telemetry"] = None  # it reports its use over the network; without that package it doesn't
    import openvino as ov

    core = ov.Core()
    if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise RuntimeError("this CPU has no bfloat16 instructions")
    settings = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": _THREADS}
    compiled = core.compile_model(path, "CPU", settings)
    names = [output.get_any_name() for output in compiled.outputs]

    def call(inputs):
        outputs = compiled(inputs)
        return {name: outputs[index] for index, name in enumerate(names)}

    return _called(call, [[side.to_string() for side in one.partial_shape] for one in compiled.inputs])


def _called(call: Call, shapes) -> Call:
    """The function itself, or one that gives it examples one by one where its file is for a batch of 1 only."""
    if not any([*shape][:1] in ([1], ["1"]) for shape in shapes):
        return call

    def one_by_one(inputs):
        size = len(next(iter(inputs.values())))
        rows = [call({name: array[index : index + 1] for name, array in inputs.items()}) for index in range(size)]
        return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}

    return one_by_one


def seconds(call: Call, inputs: dict[str, np.ndarray], batch: int) -> list[float]:
    """Returns the times of calls; a first one, in which memory is planned for the size, isn't counted."""
    tiled = {name: array[np.arange(batch) % len(array)] for name, array in inputs.items()}
    call(tiled)
    times = []
    while len(times) < _FEWEST or (sum(times) < _SECONDS and len(times) < _MOST):
        start = time.perf_counter()
        call(tiled)
        times.append(time.perf_counter() - start)
    return times


def main(kind: str, path: str, inputs_path: str, outputs_path: str) -> None:
    """Loads, runs every case, then answers batch sizes with times."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what runtimes print isn't an answer
    runtime, _, setting = kind.partition(":")
    call = {"tensorflow": tensorflow, "litert": litert, "onnx": onnx, "openvino": openvino}[runtime](path, setting)
    cases: dict[str, dict[str, np.ndarray]] = {}
    with np.load(inputs_path, allow_pickle=False) as file:
        for key, array in file.items():
            case, _, name = key.partition("/")
            cases.setdefault(case, {})[name] = array
    np.savez(outputs_path, **{f"{case}/{name}": array for case in cases for name, array in call(cases[case]).items()})
    answers.write('"ready"\n')
    for line in sys.stdin:
        answers.write(json.dumps(seconds(call, next(iter(cases.values())), int(line))) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
