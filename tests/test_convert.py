"""Every format, run as its own runtime's users do, against plain TensorFlow; what can't be converted leaves nothing."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfhalf
from tests.conftest import ROOT
from tfhalf import convert

pytestmark = pytest.mark.slow

# Without tfhalf and TensorFlow: as the runtimes' documentation says. Each reads x.npy and writes y.npy.
PROGRAMS = {
    "litert": """
from ai_edge_litert.interpreter import Interpreter
run = Interpreter(sys.argv[1] + "/model.tflite").get_signature_runner("serving_default")
y = np.concatenate([run(**{name: row[None]})[output] for row in x])
""",
    "onnx": """
import onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1] + "/model.onnx", providers=["CPUExecutionProvider"])
y, = session.run([output], {name: x})
""",
    "openvino": """
import openvino
model = openvino.Core().compile_model(sys.argv[1] + "/model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
y = model({name: x})[output]
""",
}
PROGRAMS["onnx_float16"] = PROGRAMS["onnx"]
START = """
import sys
sys.modules["tensorflow"] = sys.modules["keras"] = sys.modules["tfhalf"] = sys.modules["openvino_telemetry"] = None
import numpy as np
name, output = sys.argv[2:4]
x = np.load(sys.argv[4])
"""


def run_plainly(format: str, folder: Path, name: str, output: str, x: np.ndarray, scratch: Path) -> np.ndarray:
    """What a published file answers in a fresh process."""
    np.save(scratch / "x.npy", x)
    code = START + PROGRAMS[format] + "np.save(sys.argv[5], y)"
    command = [sys.executable, "-c", code, folder, name, output, scratch / "x.npy", scratch / "y.npy"]
    subprocess.run(command, check=True, capture_output=True, cwd="/", timeout=120)
    return np.load(scratch / "y.npy")


def tensorflow_float32(directory: Path, name: str, output: str, x: np.ndarray) -> np.ndarray:
    """The oracle: the bundle's float32 signature, called plainly."""
    loaded = tf.saved_model.load(str(directory))
    return loaded.signatures["serving_float32"](**{name: tf.constant(x)})[output].numpy()


def share(seen: np.ndarray, expected: np.ndarray) -> float:
    assert seen.shape == expected.shape
    assert seen.dtype == expected.dtype == np.float32
    return float(np.max(np.abs(seen - expected)) / max(1, np.max(np.abs(expected))))


@pytest.fixture(scope="module")
def output(bundle, tmp_path_factory) -> Path:
    """The bundle in every format: a CNN, BatchNormalization, GRUs both ways, attention, exact gelu."""
    folder = tmp_path_factory.mktemp("converted")
    for format in convert.FORMATS:
        convert.convert(bundle, format, folder)
    return folder


def export(tmp_path: Path, serve, **inputs: np.ndarray) -> Path:
    """A bundle of a function, with a weight that it ignores."""
    model = keras.Sequential([keras.Input([1]), keras.layers.Dense(1)])
    signature = {name: tf.TensorSpec([None, *array.shape[1:]], array.dtype) for name, array in inputs.items()}
    folder = tmp_path / "odd" / "1"
    tfhalf.export_saved_model(model, folder, inputs=inputs, serve=serve, input_signature=signature)
    return folder


@pytest.mark.parametrize("format", convert.FORMATS)
def test_file_answers_as_tensorflow_in_float32(bundle, output, samples, tmp_path, format):
    expected = tensorflow_float32(bundle, "picture", "logits", samples)
    seen = run_plainly(format, output / format, "picture", "logits", samples, tmp_path)
    # Sums in another order, or 2^-11 of float16 at some 20 roundings.
    assert share(seen, expected) < (1e-2 if format == "onnx_float16" else 2e-4)


@pytest.mark.parametrize("format", convert.FORMATS)
def test_manifest_says_what_it_is(bundle, output, format):
    converted = convert.check(bundle, output / format)
    told = json.loads((output / format / "manifest.json").read_text())
    assert told["format"] == converted.format == format
    assert told["source"]["signature"] == "serving_float32"
    assert told["source"]["fingerprint"] == tfhalf.Manifest.read(bundle).fingerprint
    assert told["batch"] == (1 if format == "litert" else None), "recurrent layers need a fixed batch in LiteRT only"
    assert told["inputs"] == {"picture": {"dtype": "float32", "shape": [told["batch"], 16, 16, 3]}}
    assert told["outputs"] == {"logits": {"dtype": "float32", "shape": [None, 10]}}
    assert told["max_error"]["logits"] <= told["tolerance"] < 0.02
    assert sorted(told["files"]) == sorted(set(os.listdir(output / format)) - {"manifest.json"})
    assert (told["precision"]["settings"] == {"INFERENCE_PRECISION_HINT": "f32"}) == (format == "openvino")
    assert told["metadata"] == {"task": "test"}


def test_float16_files_are_half_the_size(output):
    size = {path.name: path.stat().st_size for path in (output / "openvino").iterdir()}
    size |= {format: next((output / format).glob("model.*")).stat().st_size for format in ("onnx", "onnx_float16")}
    size["litert"] = (output / "litert" / "model.tflite").stat().st_size
    # Of 170,000 weights; the graph itself comes on top. OpenVINO writes it to a file of its own.
    for name in ("litert", "onnx_float16", "model.bin"):
        assert size[name] < 0.58 * size["onnx"], size


def test_weights_are_stored_once_and_in_float16(output):
    import onnx

    model = onnx.load(output / "onnx_float16" / "model.onnx")
    large = [one for one in model.graph.initializer if np.prod(one.dims) >= 256]
    assert {onnx.TensorProto.DataType.Name(one.data_type) for one in large} == {"FLOAT16"}
    assert len({one.raw_data for one in large}) == len(large) > 10
    for one in (model, onnx.load(output / "onnx" / "model.onnx")):
        onnx.checker.check_model(one, full_check=True)
        constants = {initializer.name for initializer in one.graph.initializer}
        assert not [node for node in one.graph.node if node.op_type == "Cast" and node.input[0] in constants]


def test_what_is_published_is_checked(bundle, copy, output):
    with pytest.raises(tfhalf.ExportError, match=r"onnx exists; choose another output, or remove it"):
        convert.convert(bundle, "onnx", output)
    file = copy.parent / "onnx" / "model.onnx"
    file.parent.mkdir()
    for path in (output / "onnx").iterdir():
        (file.parent / path.name).write_bytes(path.read_bytes())
    convert.check(bundle, file.parent)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(tfhalf.ExportError, match="aren't those that were published"):
        convert.check(bundle, file.parent)
    (output / "onnx" / "more").write_text("")
    try:
        with pytest.raises(tfhalf.ExportError, match="aren't those that were published"):
            convert.check(bundle, output / "onnx")
    finally:
        (output / "onnx" / "more").unlink()
    with pytest.raises(tfhalf.ExportError, match="holds no converted file"):
        convert.check(bundle, copy)
    other = dataclasses.replace(tfhalf.Manifest.read(copy), metadata={"task": "another"})
    other.write(copy)
    with pytest.raises(tfhalf.ExportError, match="was made of another bundle"):
        convert.check(copy, output / "onnx")


@pytest.mark.soak
def test_plain_network_takes_any_batch_everywhere(tmp_path):
    with tfhalf.PrecisionPlan().scope():
        layers = [keras.layers.Conv2D(8, 3, activation="relu"), keras.layers.Flatten(), keras.layers.Dropout(0.5)]
        model = keras.Sequential([keras.Input([8, 8, 1], name="x"), *layers, keras.layers.Dense(3, dtype="float32")])
    x = np.random.default_rng(2).normal(size=[5, 8, 8, 1]).astype("float32")
    bundle = tmp_path / "plain" / "1"
    tfhalf.export_saved_model(model, bundle, inputs=x)
    converted = convert.convert(bundle, "litert", tmp_path / "out")
    assert converted.batch is None
    program = PROGRAMS["litert"].replace(
        "np.concatenate([run(**{name: row[None]})[output] for row in x])", "run(x=x)[output]"
    )
    assert program != PROGRAMS["litert"]
    PROGRAMS["litert whole batch"] = program
    name = next(iter(converted.outputs))
    seen = run_plainly("litert whole batch", tmp_path / "out" / "litert", "x", name, x, tmp_path)
    assert share(seen, tensorflow_float32(bundle, "x", name, x)) < 2e-4


@pytest.mark.soak
def test_inputs_and_outputs_keep_their_names_and_whole_numbers(tmp_path):
    def serve(pixels, length, about):
        mask = tf.sequence_mask(length, 6, dtype=tf.float32)
        return {"zebra": pixels * mask, "apple": tf.argmax(pixels, 1, output_type=tf.int32) + length}

    inputs = {
        "pixels": np.random.default_rng(3).normal(size=[4, 6]).astype("float32"),
        "length": np.array([1, 6, 3, 0], "int32"),
        "about": np.zeros([4, 2], "float32"),  # isn't read
    }
    bundle = export(tmp_path, serve, **inputs)
    for format in ("litert", "onnx", "openvino"):
        converted = convert.convert(bundle, format, tmp_path / "out")
        assert converted.outputs.keys() == {"zebra", "apple"}
        assert converted.max_error["apple"] == 0


@pytest.mark.soak
@pytest.mark.parametrize("format", ["litert", "onnx", "openvino"])
def test_operation_without_a_converter_is_named(tmp_path, format):
    bundle = export(tmp_path, lambda x: {"y": tf.math.igamma(x, x)}, x=np.ones([2, 3], "float32"))
    with pytest.raises(tfhalf.ExportError, match="Igamma") as caught:
        convert.convert(bundle, format, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path / "out") == []


def test_input_and_output_of_one_name_are_told(tmp_path):
    bundle = export(tmp_path, lambda x: {"x": x * 2}, x=np.ones([2, 3], "float32"))
    for format in ("onnx", "onnx_float16", "openvino"):
        with pytest.raises(tfhalf.ExportError, match="can't have an input and an output of one name, x"):
            convert.convert(bundle, format, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.soak
def test_strings_leave_nothing(tmp_path):
    bundle = export(tmp_path, lambda x: {"y": tf.strings.length(x)}, x=np.array(["a", "bc"]).astype("S"))
    for format in convert.FORMATS:
        with pytest.raises(tfhalf.ExportError, match="input x of serving_float32 is strings"):
            convert.convert(bundle, format, tmp_path / "out")
        assert os.listdir(tmp_path / "out") == []


def test_difference_over_the_tolerance_publishes_nothing(bundle, output, tmp_path):
    seen = convert.check(bundle, output / "openvino").max_error["logits"]
    with pytest.raises(tfhalf.ExportError, match=r"openvino: logits differs by .*, more than the tolerance"):
        convert.convert(bundle, "openvino", tmp_path, tolerance=0.9 * seen)
    assert os.listdir(tmp_path) == []
    for tolerance in (-0.1, 1, float("nan")):
        with pytest.raises(tfhalf.ExportError, match="0 to below 1"):
            convert.convert(bundle, "onnx", tmp_path, tolerance=tolerance)
    with pytest.raises(tfhalf.ExportError, match="format must be one of litert, onnx, "):
        convert.convert(bundle, "caffe", tmp_path)


def test_damaged_bundle_is_refused_first(copy, tmp_path):
    data = copy / "variables" / "variables.data-00000-of-00001"
    content = bytearray(data.read_bytes())
    content[100] ^= 1
    data.write_bytes(content)
    with pytest.raises(tfhalf.ExportError, match="isn't the file that was exported"):
        convert.convert(copy, "openvino", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.soak
def test_numbers_that_are_too_large_for_half_are_refused_in_it(tmp_path):
    # A constant that float16 doesn't hold becomes its largest number, 65504, when the file is made.
    bundle = export(tmp_path, lambda x: {"y": x * 1e5}, x=np.full([2, 3], 0.3, "float32"))
    convert.convert(bundle, "openvino", tmp_path / "out")
    with pytest.raises(tfhalf.ExportError, match="onnx_float16: y differs by "):
        convert.convert(bundle, "onnx_float16", tmp_path / "out")
    assert os.listdir(tmp_path / "out") == ["openvino"]


SCRIPT = """
import resource, signal, sys
from tfhalf import bundle, convert
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
limits = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
try:
    convert.convert(sys.argv[1], "openvino", sys.argv[2])
except bundle.ExportError as error:
    print(error, flush=True)
resource.setrlimit(resource.RLIMIT_FSIZE, limits)
convert.convert(sys.argv[1], "openvino", sys.argv[2])
"""


def test_full_disk_and_kill_publish_nothing(bundle, tmp_path):
    # A limit on the size of files fails writes in the middle, as a full disk does.
    command = [sys.executable, "-c", SCRIPT, str(bundle), str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        assert re.search("File too large|can't write|can't be converted", line), line
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob(".staging-openvino-*/model.*")) and time.monotonic() < deadline:
            time.sleep(0.005)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
    # One, which the next export or conversion sweeps up: what failed before left nothing.
    assert [name[:18] for name in os.listdir(tmp_path)] == [".staging-openvino-"]


@pytest.mark.soak
def test_missing_package_is_named_and_import_needs_none(bundle, tmp_path):
    # All packages but OpenVINO, as links in another folder.
    here = Path(np.__file__).parents[1]
    for path in here.iterdir():
        if not path.name.startswith("openvino"):
            (tmp_path / path.name).symlink_to(path)
    code = (
        "import sys, tfhalf; from tfhalf import convert\n"
        "print(sorted({'ai_edge_litert', 'onnx', 'onnxruntime', 'tf2onnx', 'openvino'} & sys.modules.keys()))\n"
        f"try: convert.convert({str(bundle)!r}, 'openvino', '/nowhere')\n"
        "except tfhalf.ExportError as error: print(error)"
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}"}
    command = [sys.executable, "-S", "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd="/", timeout=120, check=False)
    assert result.stdout.splitlines() == ["[]", "openvino needs the package openvino: pip install 'tfhalf[convert]'"]
