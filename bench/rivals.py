"""rivals.c and serve_rivals.c, compiled with the system's C compiler when first used."""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("rivals.c")
SERVE_SOURCE = Path(__file__).with_name("serve_rivals.c")


BUILT = "BENCH_RIVALS"  # an environment variable: where those of rivals.c lie compiled already


def build(folder: Path, source: Path = SOURCE) -> Path:
    """Compile them. Raises FileNotFoundError without a `cc`, CalledProcessError when it fails."""
    built = folder / source.with_suffix(".so").name
    command = ["cc", "-O3", "-shared", "-fPIC", "-pthread", "-o", str(built), str(source)]
    subprocess.run(command, check=True, timeout=60)
    return built


def _built_now(source: Path) -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        return ctypes.CDLL(str(build(Path(folder), source)))  # stays mapped when the file is gone


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled rivals; raises what `build` raises."""
    rivals = ctypes.CDLL(os.environ[BUILT]) if BUILT in os.environ else _built_now(SOURCE)
    rivals.read_loop.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_long]
    rivals.crowd_start.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_long]
    rivals.crowd_join.argtypes = [ctypes.c_void_p, ctypes.c_long, ctypes.c_long]
    rivals.touch_again.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_long, ctypes.c_long]
    for function in (rivals.read_loop, rivals.crowd_start, rivals.crowd_join, rivals.touch_again):
        function.restype = ctypes.c_long
    return rivals


@functools.cache
def serve_library() -> ctypes.CDLL:
    """The compiled handlers and touching threads; raises what `build` raises."""
    rivals = _built_now(SERVE_SOURCE)
    pointer, long, cpu = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
    signatures: list[tuple[Any, Any, list[Any]]] = [
        (rivals.handler_start, pointer, [ctypes.c_int, pointer, pointer, long, cpu]),
        (rivals.handler_stop, None, [pointer]),
        (rivals.sigbus_start, cpu, [ctypes.c_int, pointer, pointer]),
        (rivals.sigbus_stop, None, []),
        (rivals.touch_all, long, [pointer, pointer, pointer, long, long, cpu, long, pointer]),
        (rivals.writers_start, pointer, [pointer, pointer, pointer, long, long]),
        (rivals.writers_join, None, [pointer, long, pointer]),
        (rivals.differ, long, [pointer, pointer, ctypes.c_size_t]),
        (rivals.copy_into_huge, long, [pointer, ctypes.c_size_t]),
    ]
    for function, result, arguments in signatures:
        function.restype, function.argtypes = result, arguments
    return rivals
