"""Processes that answer, one that fails beside them, and who is fastest."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tfhalf import bundle as bundles
from tfhalf import latency
from tfhalf.latency import Contender, Row


def test_fastest_is_the_fastest_of_those_that_are_right():
    rows = [
        Row("slow", 1, 0.1, 0.01, {1: 3.0, 32: 4.0}),
        Row("wrong", 1, 0.1, 0.2, {1: 1.0, 32: 1.0}),
        Row("broken", 1, 0.1, failed="no"),
        Row("not a number", 1, 0.1, float("nan"), {1: 1.0, 32: 1.0}),
        Row("good at 1", 1, 0.1, 0.1, {1: 2.0, 32: 5.0}),
    ]
    assert latency.fastest(rows, 1).name == "good at 1"
    assert latency.fastest(rows, 32).name == "slow"
    assert latency.fastest(rows[1:4], 1) is None
    assert latency.fastest([], 1) is None


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """ONNX files that multiply by 2 and by 3, made by hand, and one that is none."""
    folder = tmp_path_factory.mktemp("onnx")
    open_batch = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3]) for name in "xy"}
    for factor in (2.0, 3.0):
        by = helper.make_tensor("by", TensorProto.FLOAT, [], [factor])
        nodes = [helper.make_node("Mul", ["x", "by"], ["y"])]
        graph = helper.make_graph(nodes, "times", [open_batch["x"]], [open_batch["y"]], [by])
        opset = helper.make_opsetid("", 18)
        onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=10), folder / f"{factor:g}.onnx")
    (folder / "no.onnx").write_bytes(b"no model")
    return folder


X = np.arange(15, dtype="float32").reshape(5, 3)


def test_contenders_are_timed_beside_one_that_fails_and_one_that_is_wrong(files):
    contenders = [Contender(name, "onnx", files / f"{name}.onnx", 7, 1e-3) for name in ("2", "no", "3")]
    right, damaged, wrong = latency.measure(contenders, {"x": X}, {"y": X * 2}, rounds=2)
    assert right.serves
    assert right.max_error == 0
    assert 0 < right.seconds[1] < 5
    assert 0 < right.seconds[32] < 5
    assert not damaged.serves
    assert not damaged.seconds
    assert damaged.failed.startswith("onnx can't run it: ")
    assert "InvalidProtobuf" in damaged.failed
    assert not wrong.serves
    assert wrong.max_error == 0.5
    assert wrong.seconds


def test_process_that_dies_is_told(files):
    with latency.Runtime("onnx", files / "2.onnx", {"some": {"x": X}, "one": {"x": X[:1]}}) as runtime:
        process = runtime._process
        np.testing.assert_array_equal(runtime.outputs["some"]["y"], X * 2)
        np.testing.assert_array_equal(runtime.outputs["one"]["y"], X[:1] * 2)
        process.kill()
        process.wait()
        with pytest.raises(bundles.ExportError, match="ended by signal 9"):
            runtime.seconds(1)
    with latency.Runtime("onnx", files / "2.onnx", {"some": {"x": X}}) as runtime:
        process = runtime._process
    assert process.poll() is not None, "it outlives its context"
    with pytest.raises(bundles.ExportError, match=r"onnx can't run it: .*z"):
        latency.Runtime("onnx", files / "2.onnx", {"some": {"z": X}})


def test_missing_output_is_infinitely_wrong():
    one = np.ones([2], "float32")
    assert latency.errors({"a": one}, {"a": one * 2, "b": one}) == {"a": 0.5, "b": float("inf")}
