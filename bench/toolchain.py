"""The versions on which an instruction count depends."""

from __future__ import annotations

import platform
import re
import subprocess
from pathlib import Path

import numpy as np

import userfault._reader

Toolchain = dict[str, str]


def first_line(*command: str) -> str:
    """What a program says its version is."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    return done.stdout.partition("\n")[0].strip()


def extension() -> Toolchain:
    """By what the compiled modules were made, as they say themselves."""
    cython = type(userfault._reader.as_v2).__module__.removeprefix("_cython_").replace("_", ".")
    found = re.search(rb"GCC: \(.*?\) [\d.]+", Path(userfault._reader.__file__).read_bytes())
    return {"cython": cython, "compiler": found[0].decode() if found else "unknown"}


def common() -> Toolchain:
    """What matters wherever instructions are counted."""
    return {
        "machine": platform.machine(),
        "python": platform.python_version(),
        "python_compiler": platform.python_compiler(),
        "libc": " ".join(platform.libc_ver()),
        "numpy": np.__version__,
        "cc": first_line("cc", "--version"),
        **extension(),
    }


def callgrind() -> Toolchain:
    """Below valgrind, libc and numpy choose their code by what the processor has."""
    flags = Path("/proc/cpuinfo").read_text().split()
    simd = next((name for name in ("avx2", "avx", "sse4_2") if name in flags), "none")
    return common() | {"valgrind": first_line("valgrind", "--version"), "simd": simd}


def lab(kernel: str) -> Toolchain:
    """The kernel's release names its source, its configuration and its compiler."""
    return common() | {"qemu": first_line("qemu-system-x86_64", "--version"), "kernel": kernel}
