"""C functions from cffi, numba, scipy and Cython."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import userfault as uf
from native.forms import (
    DECLARATION,
    EXPECTED,
    ODD_BYTES,
    PROTOTYPE,
    by_abi,
    by_key,
    code_address,
    fills_every_byte,
    in_python,
    low_level,
    with_types,
)
from support import PAGE, Child
from userfault.sources import Native, Source

# How a source of fill() with a ctx is made in each form; `get` gets fixtures.
FORMS: dict[str, Callable[[Callable[[str], Any], np.ndarray, int], Source]] = {
    "cffi by ABI": lambda get, key, n: Native(by_abi(get("held_path")), key, n),
    "cffi by API": lambda get, key, n: Native(
        get("cffi_module").ffi.addressof(get("cffi_module").lib, "fill"), key, n
    ),
    "numba": lambda get, key, n: Native(get("cfunc"), key, n),
    "numba by ctypes": lambda get, key, n: Native(get("cfunc").ctypes, key, n),
    "LowLevelCallable of ctypes": lambda get, key, n: Native(
        low_level(with_types(get("library")), ctypes.c_void_p(key.ctypes.data)), nbytes=n
    ),
    "LowLevelCallable of numba": lambda get, key, n: Native(low_level(get("cfunc").ctypes), key, n),
    "LowLevelCallable of cffi": lambda get, key, n: Native(low_level(by_abi(get("held_path"))), key, n),
    "LowLevelCallable of Cython": lambda get, key, n: Native(
        low_level(get("client").__pyx_capi__["fill"], ctypes.c_void_p(1)), key, n
    ),
    "a capsule": lambda get, key, n: Native(get("client").__pyx_capi__["fill"], key, n),
    "cimported": lambda get, key, n: get("client").Keyed(int(key[0])).source(n),
}


@pytest.fixture(scope="session")
def held_path(library: ctypes.CDLL, library_path: Path) -> Path:
    """The library, which ctypes keeps loaded."""
    return library_path


@pytest.mark.parametrize("form", FORMS)
def test_every_byte_of_a_c_function(
    u: uf.Userfaultfd, service: uf.FaultService, request: pytest.FixtureRequest, form: str
) -> None:
    key = np.array([0xFEDC_BA98_7654_3210], np.uint64)
    fills_every_byte(u, service, FORMS[form](request.getfixturevalue, key, ODD_BYTES), int(key[0]))


def test_a_library_that_cffi_opened_stays_loaded(needs_uffd: None, child: Child, library_path: Path) -> None:
    done = child(f"""
        import cffi
        def made():
            ffi = cffi.FFI()
            ffi.cdef({DECLARATION!r})
            return uf.sources.Native(ffi.dlopen({str(library_path)!r}).fill)
        source = made()
        gc.collect()
        with uf.Userfaultfd() as u, uf.FaultService(u) as service:
            region = u.map(16 * PAGE)
            service.serve(region, source)
            assert region.array.any()
        print("good")
        """)
    assert done.stdout == "good\n", done.stderr


def test_a_ctx_of_cffi(u: uf.Userfaultfd, service: uf.FaultService, library: ctypes.CDLL) -> None:
    import cffi

    region = u.map(PAGE)
    service.serve(region, Native(library.fill, cffi.FFI().new("uint64_t *", 21)))
    gc.collect()
    assert (region.array == by_key(21, PAGE)).all()


def test_the_ctx_of_a_low_level_callable(
    u: uf.Userfaultfd, service: uf.FaultService, library: ctypes.CDLL
) -> None:
    """Its user_data, unless another ctx is given."""
    user_data = ctypes.cast(ctypes.pointer(ctypes.c_uint64(31)), ctypes.c_void_p)
    function = low_level(with_types(library), user_data)
    del user_data
    gc.collect()
    for ctx, key in ((None, 31), (ctypes.c_uint64(32), 32)):
        region = u.map(PAGE)
        service.serve(region, Native(function, ctx))
        assert (region.array == by_key(key, PAGE)).all()


def test_a_python_function_behind_cffi_is_refused(cffi_module: ModuleType) -> None:
    import cffi

    ffi = cffi.FFI()
    callback = ffi.callback("int(void *, uint64_t, void *, size_t)", in_python)
    with pytest.raises(uf.SourceError, match=r"Python function: .*GIL"):
        Native(callback)
    with pytest.raises(uf.SourceError, match=r"ffi\.addressof\(lib, 'fill'\)"):
        Native(cffi_module.lib.fill)


@pytest.mark.parametrize(
    "declaration",
    [
        "long fill(void *, uint64_t, void *, size_t);",
        "void fill(void *, uint64_t, void *, size_t);",
        "int fill(void *, int64_t, void *, size_t);",
        "int fill(void *, uint64_t, void *, unsigned int);",
        "int fill(void *, uint64_t, void *);",
        "int fill(void *, uint64_t, void *, size_t, ...);",
        "int fill(void);",
        "extern int *fill;",
    ],
)
def test_another_signature_of_cffi_is_refused(held_path: Path, declaration: str) -> None:
    function = by_abi(held_path, declaration)
    with pytest.raises(uf.SourceError, match=EXPECTED):
        Native(function)


def test_other_names_of_the_same_types_of_cffi(held_path: Path) -> None:
    for declaration in (
        "int32_t fill(const char *, unsigned long long, uint8_t *, size_t);",
        "typedef uint64_t place; int fill(struct key *, place, void *, unsigned long);",
    ):
        Native(by_abi(held_path, declaration))


def test_another_signature_of_numba_is_refused() -> None:
    import numba
    from numba import types

    for signature in (
        types.int64(types.voidptr, types.uint64, types.voidptr, types.size_t),
        types.int32(types.voidptr, types.int64, types.voidptr, types.size_t),
        types.int32(types.voidptr, types.uint64, types.uint64, types.size_t),
        types.int32(types.float64, types.uint64, types.voidptr, types.size_t),
    ):
        with pytest.raises(uf.SourceError, match=EXPECTED):
            Native(numba.cfunc(signature)(lambda ctx, offset, dst, length: 0))
    with pytest.raises(uf.SourceError, match=r"Python function: .*numba\.cfunc"):
        Native(numba.njit(in_python))


def test_another_signature_of_a_capsule_is_refused(client: ModuleType) -> None:
    with pytest.raises(uf.SourceError, match=EXPECTED):
        Native(client.__pyx_capi__["other"])
    with pytest.raises(uf.SourceError, match=EXPECTED):
        Native(low_level(client.__pyx_capi__["other"]))
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    with pytest.raises(uf.SourceError, match="has no name"):
        Native(new(code_address(), None, None))
    with pytest.raises(uf.SourceError, match=r"'datetime.datetime_CAPI'"):
        Native(__import__("_datetime").datetime_CAPI)


def test_a_python_function_behind_a_low_level_callable_is_refused() -> None:
    with pytest.raises(uf.SourceError, match=r"Python function: .*GIL"):
        Native(low_level(PROTOTYPE(in_python)))
