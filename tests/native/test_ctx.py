"""The first argument of a C function, in each of its forms."""

from __future__ import annotations

import ctypes
import mmap
import sys
from typing import Any

import numpy as np
import pytest

import userfault as uf
from native.forms import by_key
from support import PAGE
from userfault.sources import Native


class Keys(ctypes.Structure):
    _fields_ = (("key", ctypes.c_uint64), ("more", ctypes.c_uint64))


def contexts() -> dict[str, tuple[Any, int]]:
    """ctx in each of its forms, and the key that it holds."""
    array = np.array([11, 12], np.uint64)
    number = ctypes.c_uint64(14)
    return {
        "none": (None, 0),
        "an array": (array, 11),
        "a part of it": (array[1:], 12),
        "bytes": ((13).to_bytes(8, sys.byteorder), 13),
        "an address": (array.ctypes.data + 8, 12),
        "a numpy integer": (np.uint64(array.ctypes.data), 11),
        "a ctypes number": (number, 14),
        "a ctypes pointer": (ctypes.pointer(number), 14),
        "a ctypes void pointer": (ctypes.c_void_p(array.ctypes.data), 11),
        "a NULL pointer": (ctypes.c_void_p(), 0),
        "a ctypes structure": (Keys(15, 16), 15),
        "a ctypes array": ((ctypes.c_uint64 * 2)(17, 18), 17),
        "memory": (memoryview(array)[1:], 12),
    }


@pytest.mark.parametrize("form", contexts())
def test_a_ctx_in_each_of_its_forms(
    u: uf.Userfaultfd, service: uf.FaultService, library: ctypes.CDLL, form: str
) -> None:
    kept = contexts()
    ctx, key = kept[form]
    region = u.map(2 * PAGE)
    service.serve(region, Native(library.fill, ctx))
    assert (region.array == by_key(key, 2 * PAGE)).all()


def test_what_cannot_be_a_ctx(u: uf.Userfaultfd, library: ctypes.CDLL) -> None:
    for wrong in ("text", 1.5, object(), [1]):
        with pytest.raises(TypeError, match="ctx is an address"):
            Native(library.fill, wrong)
    for number in (-1, 2**64):
        with pytest.raises(uf.SourceError, match="no address"):
            Native(library.fill, number)
    with pytest.raises(uf.SourceError, match="contiguous"):
        Native(library.fill, np.zeros((4, 4))[:, ::2])
    lazy = u.map(PAGE)
    with pytest.raises(uf.SourceError, match="registered"):
        Native(library.fill, lazy.array)
    memory = mmap.mmap(-1, PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    source = Native(library.fill, memory)
    with pytest.raises(uf.SourceError, match="ctx of a Native"):
        u.register(memory)
    del source
    u.register(memory).unregister()
