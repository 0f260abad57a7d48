"""Texts of /proc/cpuinfo as machines of all kinds have them; this machine's, read another way."""

import platform
import subprocess
from pathlib import Path

import pytest

from tfhalf import processor

SAPPHIRE_RAPIDS = """processor\t: 0
vendor_id\t: GenuineIntel
model name\t: Intel(R) Xeon(R) Platinum 8480+
flags\t\t: fpu sse sse2 avx f16c avx2 avx512f avx512_vnni avx512_bf16 avx512_fp16 amx_bf16 amx_tile amx_int8
bogomips\t: 4000.00

processor\t: 1
vendor_id\t: GenuineIntel
model name\t: Intel(R) Xeon(R) Platinum 8480+
flags\t\t: fpu sse sse2 avx f16c avx2 avx512f avx512_vnni avx512_bf16 avx512_fp16 amx_bf16 amx_tile amx_int8
"""
ZEN_3 = "model name\t: AMD EPYC with avx512_bf16\nflags\t\t: fpu sse sse2 avx f16c avx2\nbugs\t\t: bf16\n"
GRAVITON_3 = "processor\t: 0\nBogoMIPS\t: 2100.00\nFeatures\t: fp asimd fphp asimdhp sve i8mm svebf16 bf16 dgh\n"
BIG_LITTLE = "Features\t: fp asimd fphp asimdhp bf16\n\nFeatures\t: fp asimd\n"
WITH_NOTHING = "processor\t: 0\nisa\t\t: rv64imafdc\n"


@pytest.mark.parametrize(
    ("cpuinfo", "float16", "bfloat16"),
    [
        (SAPPHIRE_RAPIDS, ("avx512_fp16",), ("avx512_bf16", "amx_bf16")),
        (ZEN_3, (), ()),
        (GRAVITON_3, ("asimdhp",), ("bf16", "svebf16")),
        (BIG_LITTLE, (), ()),  # a thread may run on either core
        (WITH_NOTHING, (), ()),
        ("flags : fpu avx2 amx_fp16 amx_bf16", ("amx_fp16",), ("amx_bf16",)),
        ("", (), ()),
    ],
)
def test_what_multiplies(cpuinfo, float16, bfloat16):
    cpu = processor.read(cpuinfo)
    assert cpu.multiplies("float16") == float16
    assert cpu.multiplies("bfloat16") == bfloat16


def test_name_and_what_only_converts():
    cpu = processor.read(SAPPHIRE_RAPIDS, "x86_64", 112)
    assert (cpu.name, cpu.architecture, cpu.cores) == ("Intel(R) Xeon(R) Platinum 8480+", "x86_64", 112)
    assert {"f16c", "amx_tile", "avx512_vnni"} <= set(cpu.instructions)
    assert processor.read(GRAVITON_3, "aarch64").name == "aarch64"
    assert processor.read("").name == "unknown"


@pytest.mark.skipif(platform.system() != "Linux", reason="lscpu is Linux'")
def test_this_machine_as_lscpu_tells_it():
    told = subprocess.run(["lscpu"], capture_output=True, text=True, check=True, env={"LC_ALL": "C"}).stdout
    facts = {key.strip(): value.split() for key, _, value in (line.partition(":") for line in told.splitlines())}
    cpu = processor.this()
    had = set(facts["Flags"])
    for dtype, names in processor.MULTIPLIES.items():
        assert set(cpu.multiplies(dtype)) == had & set(names)
    assert facts["Architecture"] == [cpu.architecture]
    if "Model name" in facts:
        assert cpu.name.split() == facts["Model name"] or cpu.architecture == "aarch64"
    assert 1 <= cpu.cores <= Path("/proc/cpuinfo").read_text().count("processor\t")
