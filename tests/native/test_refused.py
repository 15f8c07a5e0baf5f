"""What cannot be the function of a page source, and how the refusal helps."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import userfault as uf
from native.forms import EXPECTED, PROTOTYPE, in_python
from userfault.sources import Native, Source


@pytest.mark.parametrize(
    "function",
    [in_python, lambda *arguments: 0, print, np.add, Source, [].append],
    ids=["function", "lambda", "builtin", "ufunc", "class", "method"],
)
def test_a_python_function_is_refused(function: Callable[..., object]) -> None:
    with pytest.raises(uf.SourceError, match=r"needs the GIL, which the thread .* Compile .*numba\.cfunc"):
        Native(function)


def test_a_ctypes_callback_is_refused() -> None:
    callback = PROTOTYPE(in_python)
    cast = ctypes.cast(callback, PROTOTYPE)
    for disguise in (callback, cast, ctypes.cast(cast, ctypes.CFUNCTYPE(ctypes.c_int))):
        with pytest.raises(uf.SourceError, match=r"callback of a Python function: .*GIL"):
            Native(disguise)
    with pytest.raises(uf.SourceError, match=r"use ctypes\.CDLL"):
        Native(ctypes.PyDLL(None).getpid)


@pytest.mark.parametrize(
    ("result", "arguments"),
    [
        (ctypes.c_long, None),
        (None, None),
        (in_python, None),
        (ctypes.c_int, []),
        (ctypes.c_int, [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_void_p]),
        (ctypes.c_int, [ctypes.c_void_p, ctypes.c_uint32, ctypes.c_void_p, ctypes.c_size_t]),
        (ctypes.c_int, [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t]),
        (ctypes.c_int, [ctypes.py_object, ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t]),
        (ctypes.c_int, [ctypes.c_void_p, ctypes.c_double, ctypes.c_void_p, ctypes.c_size_t]),
        (ctypes.c_uint, [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t]),
    ],
)
def test_another_signature_of_ctypes_is_refused(
    library_path: Path, result: object, arguments: list[type] | None
) -> None:
    function = ctypes.CDLL(str(library_path)).fill
    function.restype = result
    if arguments is not None:
        function.argtypes = arguments
    with pytest.raises(uf.SourceError, match=EXPECTED):
        Native(function)


def test_pointers_of_every_type_are_pointers(library_path: Path) -> None:
    function = ctypes.CDLL(str(library_path)).fill
    for pointer in (ctypes.POINTER(ctypes.c_uint64), ctypes.c_char_p, ctypes.POINTER(ctypes.c_ubyte)):
        function.argtypes = [pointer, ctypes.c_uint64, pointer, ctypes.c_size_t]
        Native(function)


def test_what_else_is_refused(library: ctypes.CDLL) -> None:
    for null in (0, PROTOTYPE()):
        with pytest.raises(uf.SourceError, match="NULL"):
            Native(null)
    for number in (-1, 2**64):
        with pytest.raises(uf.SourceError, match="no address"):
            Native(number)
    data = np.zeros(1, np.uint64)
    for address in (data.ctypes.data, 8, 2**64 - 1):
        with pytest.raises(uf.SourceError, match=f"no code at {address:#x}"):
            Native(address)
    for wrong in ("fill", None, 1.5, b"fill", library):
        with pytest.raises(TypeError, match="need a C function"):
            Native(wrong)
    for n_bytes in (-1, 2**64):
        with pytest.raises(uf.SourceError, match=f"cannot have {n_bytes} bytes"):
            Native(library.fill, None, n_bytes)
    with pytest.raises(TypeError):
        Native(library.fill, None, 1.5)  # type: ignore[arg-type]
    assert Native(library.fill).nbytes == 2**64 - 1
    assert Native(library.fill, None, 0).nbytes == 0
