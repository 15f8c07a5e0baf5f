"""What is compiled for the tests of C functions."""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from native.forms import DECLARATION
from support import LAB

# Compiling and importing these takes too long on the lab's emulated processor.
collect_ignore = ["test_cimport.py", "test_forms.py"] if LAB else []

NATIVE = Path(__file__).parent


@pytest.fixture(scope="session")
def library_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    built = tmp_path_factory.mktemp("native") / "fill.so"
    command = ["cc", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o", built, NATIVE / "fill.c"]
    subprocess.run(command, check=True, timeout=300)
    return built


@pytest.fixture(scope="session")
def library(library_path: Path) -> ctypes.CDLL:
    """fill.c, loaded for good: ctypes never unloads."""
    return ctypes.CDLL(str(library_path))


def imported(name: str, folder: Path) -> ModuleType:
    (built,) = folder.glob(f"{name}*.so")
    spec = importlib.util.spec_from_file_location(name, built)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def client(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """native/client.pyx, which cimports the package."""
    folder = tmp_path_factory.mktemp("client")
    shutil.copy(NATIVE / "client.pyx", folder)
    command = [sys.executable, "-m", "Cython.Build.Cythonize", "-q", "-i", "client.pyx"]
    subprocess.run(command, cwd=folder, check=True, timeout=300)
    return imported("client", folder)


@pytest.fixture(scope="session")
def cffi_module(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """native/fill.c in cffi's API mode."""
    import cffi

    folder = tmp_path_factory.mktemp("cffi")
    ffi = cffi.FFI()
    ffi.cdef(DECLARATION)
    ffi.set_source("by_cffi", (NATIVE / "fill.c").read_text())
    ffi.compile(tmpdir=str(folder))
    return imported("by_cffi", folder)


@pytest.fixture(scope="session")
def cfunc() -> Any:
    """The same fill() by numba."""
    import numba
    from numba import types

    step, top = np.uint64(0x9E3779B97F4A7C15), np.uint64(56)

    @numba.cfunc(types.int32(types.CPointer(types.uint64), types.uint64, types.voidptr, types.size_t))
    def fill(ctx, offset, dst, length):  # type: ignore[no-untyped-def]
        key = numba.carray(ctx, 1)[0]
        to = numba.carray(dst, length, numba.uint8)
        for i in range(length):
            to[i] = (key + (offset + np.uint64(i)) * step) >> top
        return 0

    return fill
