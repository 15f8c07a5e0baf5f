"""rivals.c, compiled with the system's C compiler when first used."""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("rivals.c")


BUILT = "BENCH_RIVALS"  # an environment variable: where they lie compiled already


def build(folder: Path) -> Path:
    """Compile them. Raises FileNotFoundError without a `cc`, CalledProcessError when it fails."""
    built = folder / "rivals.so"
    command = ["cc", "-O3", "-shared", "-fPIC", "-pthread", "-o", str(built), str(SOURCE)]
    subprocess.run(command, check=True, timeout=60)
    return built


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled rivals; raises what `build` raises."""
    if BUILT in os.environ:
        rivals = ctypes.CDLL(os.environ[BUILT])
    else:
        with tempfile.TemporaryDirectory() as folder:
            rivals = ctypes.CDLL(str(build(Path(folder))))  # stays mapped when the file is gone
    rivals.read_loop.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_long]
    rivals.crowd_start.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_long]
    rivals.crowd_join.argtypes = [ctypes.c_void_p, ctypes.c_long, ctypes.c_long]
    rivals.touch_again.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_long, ctypes.c_long]
    for function in (rivals.read_loop, rivals.crowd_start, rivals.crowd_join, rivals.touch_again):
        function.restype = ctypes.c_long
    return rivals
