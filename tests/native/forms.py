"""The forms in which Python has a C function."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np

import userfault as uf
from support import PAGE, touching
from userfault.sources import Source

PROTOTYPE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t)
DECLARATION = "int fill(void *ctx, uint64_t offset, void *dst, size_t length);"
ODD_BYTES = 63 * PAGE + 100
EXPECTED = r"'int \(void \*ctx, uint64_t offset, void \*dst, size_t length\)'"


def by_key(key: int, n_bytes: int) -> np.ndarray:
    """What fill() of native/fill.c and native/client.pyx gives."""
    offsets = np.arange(n_bytes, dtype=np.uint64)
    return ((np.uint64(key) + offsets * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(56)).astype(np.uint8)


def touch_all(region: uf.Region, threads: int = 4) -> None:
    pages = np.random.default_rng(6).permutation(region.length // PAGE)
    touchers = [touching(region, pages[i::threads]) for i in range(threads)]
    for toucher in touchers:
        toucher.join(60)
        assert not toucher.is_alive()


def fills_every_byte(u: uf.Userfaultfd, service: uf.FaultService, source: Source, key: int) -> None:
    """A source of fill(), of ODD_BYTES."""
    assert source.nbytes == ODD_BYTES
    region = u.map(64 * PAGE)
    service.serve(region, source)
    touch_all(region)
    assert (region.array[:ODD_BYTES] == by_key(key, ODD_BYTES)).all()
    assert not region.array[ODD_BYTES:].any()
    assert not service.failures()


def code_address() -> int:
    """Of some C function, never to be called."""
    address = ctypes.cast(ctypes.CDLL(None).getpid, ctypes.c_void_p).value
    assert address is not None
    return address


def with_types(library: ctypes.CDLL) -> Any:
    return ctypes.cast(library.fill, PROTOTYPE)


def by_abi(path: Path, declaration: str = DECLARATION) -> Any:
    """fill() as a cffi function pointer, in ABI mode. The pointer does not keep the library loaded."""
    import cffi

    ffi = cffi.FFI()
    ffi.cdef(declaration)
    return ffi.dlopen(str(path)).fill


def low_level(function: Any, *user_data: Any) -> Any:
    import scipy

    return scipy.LowLevelCallable(function, *user_data)


def in_python(*arguments: object) -> int:
    return 0
