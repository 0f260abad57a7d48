"""What is told of machines of all kinds; what TensorFlow makes of a graph; rates against a clock of our own."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow as tf

from tests.conftest import ROOT
from tests.test_processor import GRAVITON_3, SAPPHIRE_RAPIDS, WITH_NOTHING, ZEN_3
from tfhalf import hardware, processor
from tfhalf.hardware import CONVOLUTION, FILTER_GRADIENT, OURS, PRODUCT, STOCK, Accelerator, Hardware, Rate

EVERYTHING = (PRODUCT, CONVOLUTION, FILTER_GRADIENT)


def machine(cpuinfo, onednn=("float32",), accelerators=(), rates=()):
    used = {dtype: EVERYTHING if dtype in onednn else () for dtype in hardware.DTYPES}
    return Hardware(processor.read(cpuinfo, "x86_64", 8), tuple(accelerators), {"TensorFlow": "2"}, used, tuple(rates))


def rated(**speeds):
    """Rates of products and convolutions by dtype, of both kinds of kernels."""
    both = {"float32": (STOCK,), "float16": (STOCK, OURS), "bfloat16": (STOCK, OURS)}
    return [Rate(kind, d, by, speed, 3) for d, speed in speeds.items() for by in both[d] for kind in EVERYTHING]


def test_advice_for_a_cpu_without_half():
    (first, *others) = hardware.advise(machine(ZEN_3, onednn=[], rates=rated(float32=100, float16=90, bfloat16=80)))
    assert "This CPU has no half arithmetic (it converts float16 in hardware, F16C): mixed_float16 saves" in first
    assert "isn't faster" in first
    assert "TF_ENABLE_ONEDNN_OPTS=1" in others[0]
    assert any("float16 reaches of float32's rate: matrix product 0.90" in line for line in others)
    assert "F16C" not in hardware.advise(machine(WITH_NOTHING))[0]


def test_advice_for_cpus_with_half():
    lines = hardware.advise(machine(SAPPHIRE_RAPIDS, onednn=hardware.DTYPES))
    assert any("multiplies bfloat16 (avx512_bf16, amx_bf16), TensorFlow uses" in line for line in lines)
    assert any("multiplies float16 (avx512_fp16), TensorFlow uses" in line for line in lines)
    assert not any("no half arithmetic" in line or "ONEDNN" in line for line in lines)
    lines = hardware.advise(machine(GRAVITON_3, onednn=["float32"]))
    assert any("multiplies bfloat16 (bf16, svebf16), but TensorFlow doesn't use" in line for line in lines)


def test_what_was_measured_outweighs_what_is_known():
    lines = hardware.advise(machine(WITH_NOTHING, rates=rated(float32=100, float16=90, bfloat16=150)))
    assert not any("no half arithmetic" in line for line in lines)
    assert any("bfloat16 reaches of float32's rate: matrix product 1.50" in line for line in lines)


def test_a_slow_filter_gradient_is_told():
    rates = [Rate(FILTER_GRADIENT, "float16", STOCK, 5.0, 3), Rate(FILTER_GRADIENT, "float16", OURS, 40.0, 3)]
    assert any("reaches 5 GFLOP/s, tfhalf's 40" in line for line in hardware.advise(machine(ZEN_3, rates=rates)))


@pytest.mark.parametrize(
    ("accelerator", "native", "words"),
    [
        (Accelerator("GPU", "Tesla P100", (6, 0)), ("", ""), "has no tensor cores"),
        (Accelerator("GPU", "Tesla T4", (7, 5)), ("Tesla T4", ""), "float16, but not bfloat16: use mixed_float16"),
        (Accelerator("GPU", "A100", (8, 0)), ("A100", "A100"), "float16 and bfloat16; .* multiples of 8"),
        (Accelerator("GPU", "H100", (10, 0)), ("H100", "H100"), "float16 and bfloat16"),
        (Accelerator("GPU", "an AMD", None), ("", ""), "isn't known; measure"),
        (Accelerator("TPU", "TPU:0"), ("", "TPU:0"), "use mixed_bfloat16"),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_accelerators(accelerator, native, words):
    found = machine(SAPPHIRE_RAPIDS, accelerators=[accelerator])
    assert tuple(found.native.values()) == native  # the CPU's instructions don't count beside it
    lines = hardware.advise(found)
    assert len(lines) == 2
    assert re.search(words, lines[0])
    assert accelerator.name in str(found)


def test_page_and_json():
    found = machine(ZEN_3, rates=[*rated(float32=123.4, float16=56.7), Rate("memory", "float32", STOCK, 9.5, 3)])
    page = str(found)
    assert "AMD EPYC with avx512_bf16, x86_64, 8 cores" in page
    (row,) = [line for line in page.splitlines() if line.startswith("3x3 convolution, TensorFlow")]
    assert row.split()[-3:] == ["123.4", "56.7", "-"]
    assert "memory, GB/s" in page
    assert max(map(len, page.splitlines())) < 120
    assert json.loads(json.dumps(found.to_json()))["rates"][0]["giga"] == 123.4


@pytest.mark.soak  # of "1" tests/apps/test_doctor.py sees it
@pytest.mark.parametrize("setting", ["0", "1"])
def test_onednn_as_tensorflow_itself_says(setting):
    """TensorFlow tells its log when oneDNN is on."""
    script = "from tfhalf import hardware; print(hardware.inspect_hardware(0).onednn['float32'])"
    environment = os.environ | {"TF_ENABLE_ONEDNN_OPTS": setting, "TF_CPP_MIN_LOG_LEVEL": "0", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, cwd=ROOT, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert ("oneDNN custom operations are on" in result.stderr) is ("matrix product" in result.stdout)
    assert (setting == "1") is (result.stdout.strip() == str(EVERYTHING))


@pytest.mark.slow
def test_rates_agree_with_a_clock():
    start = time.perf_counter()
    found = hardware.inspect_hardware(0.5)
    assert time.perf_counter() - start < 60
    kinds = {(one.operation, one.dtype, one.by) for one in found.rates}
    assert len(kinds) == len(found.rates) == 3 * (4 + 3) - 3
    x = tf.random.normal([1024, 1024])
    product = tf.function(tf.matmul)
    product(x, x)
    seconds = []
    for _ in range(9):
        start = time.perf_counter()
        product(x, x)
        seconds.append(time.perf_counter() - start)
    # Others compute on this machine too: the right order of magnitude is what can be asked for.
    assert found.rate(PRODUCT, "float32", STOCK) == pytest.approx(2 * 1024**3 / np.median(seconds) / 1e9, rel=0.8)
    assert all(0.01 < one.giga < 1e6 for one in found.rates)


def test_only_looked_at():
    found = hardware.inspect_hardware(0)
    assert found.rates == ()
    assert "GFLOP" not in str(found)
    assert found == dataclasses.replace(found)
    with pytest.raises(ValueError, match="seconds must be 0 or more, got -1"):
        hardware.inspect_hardware(-1)
