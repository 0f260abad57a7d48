"""Which instructions for half precision this CPU has, as Linux tells them.

Instructions that multiply count as native, those that only convert (x86: F16C, AVX-NE-CONVERT) don't. Elsewhere than
on Linux no instruction is known, and nothing is taken for native: float32 is right everywhere.

Sources: Intel's and AMD's flags are named in Linux' arch/x86/include/asm/cpufeatures.h, Arm's in
Documentation/arch/arm64/elf_hwcaps.rst.
"""

import dataclasses
import functools
import os
import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
# What multiplies in each dtype.
MULTIPLIES = {
    "float32": ("sse2", "avx", "avx2", "avx512f", "asimd"),
    "float16": ("avx512_fp16", "amx_fp16", "asimdhp", "smef16f32"),
    "bfloat16": ("avx512_bf16", "amx_bf16", "bf16", "svebf16", "smeb16f32"),
}
# What only converts to float32 and back, or only says that there is more.
CONVERTS = ("f16c", "avx_ne_convert", "fphp", "amx_tile", "avx512_vnni", "sve")


@dataclasses.dataclass(frozen=True)
class Processor:
    """A CPU.

    Attributes:
        name: as its maker calls it.
        architecture: as "x86_64" or "aarch64".
        cores: that this process may use.
        instructions: those in `MULTIPLIES` and `CONVERTS` that it has.
    """

    name: str
    architecture: str
    cores: int
    instructions: tuple[str, ...]

    def multiplies(self, dtype: str) -> tuple[str, ...]:
        """Returns the instructions that multiply in a dtype; none: it is emulated."""
        return tuple(name for name in MULTIPLIES[dtype] if name in self.instructions)


def read(cpuinfo: str, architecture: str = "", cores: int = 1) -> Processor:
    """Returns the CPU that a text of Linux' /proc/cpuinfo tells of; an instruction counts that every core has.

    Args:
        cpuinfo: the text.
        architecture: as `platform.machine` gives it.
        cores: that the process may use.
    """
    pairs = [(key.strip().lower(), value.strip()) for key, _, value in (s.partition(":") for s in cpuinfo.splitlines())]
    flags = [set(value.lower().split()) for key, value in pairs if key in ("flags", "features")]
    had = set.intersection(*flags) if flags else set()
    known = dict.fromkeys([*(name for names in MULTIPLIES.values() for name in names), *CONVERTS])
    name = next((value for key, value in pairs if key == "model name"), "") or architecture or "unknown"
    return Processor(name, architecture, cores, tuple(name for name in known if name in had))


@functools.cache
def this() -> Processor:
    """Returns this machine's CPU."""
    try:
        cpuinfo = CPUINFO.read_text(encoding="ascii", errors="replace")
    except OSError:  # not Linux
        cpuinfo = ""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return read(cpuinfo, platform.machine(), cores)
