"""The command, its table, and its exit status."""

import json
import os

import numpy as np
import pytest
import tensorflow as tf
from absl import flags

import tfhalf
from apps import convert, runner
from tests.conftest import run_module
from tfhalf import ExportError
from tfhalf import convert as formats
from tfhalf.latency import Row


def values_of(*arguments) -> flags.FlagValues:
    values = flags.FlagValues()
    convert.define_flags(values)
    values(["convert", *arguments])
    return values


@pytest.mark.soak
def test_command_converts_measures_and_says_who_is_fastest(bundle, tmp_path):
    arguments = ["apps.convert", f"--saved_model={bundle}", f"--output={tmp_path}", "--rounds=1"]
    result = run_module(*arguments)
    assert result.returncode == 0, result.stderr
    assert "openvino: published; " in result.stdout
    last = result.stdout.splitlines()[-3]
    assert last.startswith("on this machine serve it with ")
    report = json.loads((tmp_path / "runtimes.json").read_text())
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows) == [
        "TensorFlow serving_default",
        "TensorFlow serving_float32",
        "TensorFlow serving_bfloat16",
        "LiteRT, float16 weights",
        "ONNX Runtime float32",
        "ONNX Runtime float16",
        "OpenVINO float32, float16 weights",
        "OpenVINO bfloat16, float16 weights",
    ]
    for row in rows.values():
        assert row["failed"] in ("", "openvino:bf16 can't run it: RuntimeError: this CPU has no bfloat16 instructions")
        if not row["failed"]:
            assert row["serves"]
            assert 0 < row["seconds"]["1"] < 60
            assert row["max_error"] <= row["tolerance"]
    best = min((row for row in rows.values() if row["serves"]), key=lambda row: row["seconds"]["1"])
    assert report["serve_with"]["1"] == best["name"]
    assert best["name"] in last
    assert sorted(os.listdir(tmp_path)) == sorted([*formats.FORMATS, "runtimes.json"])


@pytest.mark.slow
def test_the_same_command_goes_on_and_asked_for_is_a_must(bundle, tmp_path, capsys):
    arguments = [f"--saved_model={bundle}", f"--output={tmp_path}", "--rounds=0"]
    convert.run(values_of(*arguments, "--formats=openvino"))
    assert "openvino: published; " in capsys.readouterr().out
    before = (tmp_path / "openvino" / "model.bin").stat().st_mtime_ns
    (tmp_path / "onnx").mkdir()
    with pytest.raises(runner.AppError, match=r"refused, for the reasons above: onnx$"):
        convert.run(values_of(*arguments, "--formats=openvino,onnx"))
    printed = capsys.readouterr().out
    assert "openvino: was there; " in printed
    assert "onnx: refused: " in printed
    assert "holds no converted file" in printed
    with pytest.raises(runner.AppError, match="refused, for the reasons above: openvino"):
        convert.run(values_of(*arguments, "--formats=openvino", "--tolerance=1e-9"))
    assert "was published before, with a difference of " in capsys.readouterr().out
    assert (tmp_path / "openvino" / "model.bin").stat().st_mtime_ns == before
    assert sorted(os.listdir(tmp_path)) == ["onnx", "openvino"], "nothing was measured"


@pytest.mark.soak
def test_a_model_from_elsewhere_becomes_a_bundle(tmp_path):
    module = tf.Module()
    module.kernel = tf.Variable(np.arange(12, dtype="float32").reshape(4, 3))
    specs = [tf.TensorSpec([None, 4], name="x")]
    serve = tf.function(lambda x: {"y": x @ module.kernel}, input_signature=specs)
    tf.saved_model.save(module, str(tmp_path / "theirs"), signatures={"serving_default": serve})
    inputs = np.random.default_rng(0).normal(size=[5, 4]).astype("float32")
    np.savez(tmp_path / "inputs.npz", x=inputs)
    target = tmp_path / "models" / "mine" / "1"
    arguments = [f"--import={tmp_path}/theirs", f"--saved_model={target}", f"--inputs={tmp_path}/inputs.npz"]
    more = ["--formats=openvino", f"--output={tmp_path}/out", "--rounds=0"]
    result = run_module("apps.convert", *arguments, *more)
    assert result.returncode == 0, result.stderr
    assert f"theirs became {target}: serving_default; weights " in result.stdout
    assert "openvino: published; " in result.stdout
    y = tfhalf.load_saved_model(target)(inputs)["y"]
    np.testing.assert_allclose(y, inputs @ np.arange(12).reshape(4, 3), rtol=1e-3, atol=1e-3)
    with pytest.raises(ExportError, match="exists; choose another version"):
        convert.run(values_of(*arguments))


def test_wrong_flags_are_told(bundle, tmp_path):
    with pytest.raises(runner.AppError, match="--formats=caffe: the formats are litert, onnx, onnx_float16, openvino"):
        convert.run(values_of(f"--saved_model={bundle}", "--formats=onnx,caffe"))
    with pytest.raises(runner.AppError, match="--inputs has an effect with --import only"):
        convert.run(values_of(f"--saved_model={bundle}", "--inputs=inputs.npz"))
    with pytest.raises(ExportError, match="is no tfhalf bundle"):
        convert.run(values_of(f"--saved_model={tmp_path}"))


def test_table_names_the_fastest_for_one_and_for_many():
    rows = [
        Row("first", 1_500_000, 1e-2, 1e-3, {1: 0.002, 32: 0.010}),
        Row("second", 500_000, 1e-2, 2e-3, {1: 0.001, 32: 0.020}),
        Row("third", 500_000, 1e-2, failed="onnx can't run it: no"),
    ]
    text = convert.as_text(rows)
    assert text.splitlines()[-1] == "on this machine serve it with second; batches of 32 with first"
    assert "1.50       0.001      0.01         2.000        10.000" in text
    assert "onnx can't run it: no" in text
    assert convert.as_text(rows[1:]).splitlines()[-1] == "on this machine serve it with second"
    assert "nothing serves" in convert.as_text(rows[2:])
