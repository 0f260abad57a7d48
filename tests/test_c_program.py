"""A program in C, without Python, runs a bundle by TensorFlow's C API and answers as we do."""

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

import tfhalf
from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc isn't installed")


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    """The example, compiled against the TensorFlow that is installed."""
    built = tmp_path_factory.mktemp("c") / "predict"
    libraries = tf.sysconfig.get_lib()
    command = ["gcc", "-std=c11", "-Wall", "-Werror", str(ROOT / "examples" / "predict.c"), "-o", str(built)]
    command += [f"-I{tf.sysconfig.get_include()}", f"-L{libraries}", f"-Wl,-rpath,{libraries}"]
    command += ["-l:libtensorflow_cc.so.2", "-l:libtensorflow_framework.so.2"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return built


def run(program: Path, *arguments: str, numbers: bytes = b"") -> subprocess.CompletedProcess:
    quiet = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"}
    return subprocess.run(
        [program, *arguments], input=numbers, capture_output=True, check=False, timeout=120, env=quiet
    )


@pytest.mark.parametrize("signature", ["serving_default", "serving_float32"])
def test_answers_as_load_saved_model(program, bundle, samples, signature):
    # The names that saved_model_cli prints.
    about = tfhalf.bundle.read_graph(bundle).meta_graphs[0].signature_def[signature]
    shape = ",".join(map(str, samples.shape))
    names = f"{about.inputs['picture'].name}={shape}", about.outputs["logits"].name
    result = run(program, str(bundle), *names, numbers=samples.tobytes())
    assert result.returncode == 0, result.stderr
    answer = np.frombuffer(result.stdout, np.float32).reshape(len(samples), 10)
    expected = tfhalf.load_saved_model(bundle, signature)(samples)["logits"]
    # Two processes may sum in another order: some units in float16's last place.
    np.testing.assert_allclose(answer, expected, atol=4 * 2.0**-11 * np.abs(expected).max())


def test_what_is_wrong_is_told(program, bundle, samples):
    shape = ",".join(map(str, samples.shape))
    picture = f"serving_default_picture:0={shape}"
    for arguments, numbers, message in (
        (["/nowhere", picture, "x:0"], b"", b"error: /nowhere: "),
        ([str(bundle), f"picture:0={shape}", "x:0"], b"", b"error: picture: the graph has no such tensor"),
        ([str(bundle), picture, "StatefulPartitionedCall:0"], b"1234", b"error: stdin: fewer numbers"),
        ([str(bundle), "serving_default_picture:0", "x:0"], b"", b"give the shape too"),
    ):
        result = run(program, *arguments, numbers=numbers)
        assert result.returncode == 1
        assert message in result.stderr
        assert result.stdout == b""
