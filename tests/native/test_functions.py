"""C functions as page sources: what they are called with, what they answer, and what lives as long."""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import time
import weakref
from pathlib import Path

import numpy as np
import pytest

import userfault as uf
from native.forms import ODD_BYTES, PROTOTYPE, by_key, fills_every_byte, touch_all, with_types
from support import PAGE, Child
from userfault.sources import Native


@pytest.mark.parametrize("form", ["ctypes", "ctypes with its types", "an address", "a numpy integer"])
def test_every_byte_of_a_c_function(
    u: uf.Userfaultfd, service: uf.FaultService, library: ctypes.CDLL, form: str
) -> None:
    key = np.array([0xFEDC_BA98_7654_3210], np.uint64)
    address = ctypes.cast(library.fill, ctypes.c_void_p).value
    function = {
        "ctypes": library.fill,
        "ctypes with its types": with_types(library),
        "an address": address,
        "a numpy integer": np.uintp(address),
    }[form]
    fills_every_byte(u, service, Native(function, key, ODD_BYTES), int(key[0]))


@pytest.mark.parametrize("n_bytes", [64 * PAGE, 63 * PAGE + 1, ODD_BYTES])
def test_a_c_function_is_asked_for_whole_pages(
    u: uf.Userfaultfd, service: uf.FaultService, library: ctypes.CDLL, n_bytes: int
) -> None:
    calls = np.zeros(1 + 2 * 1024, np.uint64)
    region = u.map(64 * PAGE)
    service.serve(region, Native(library.record, calls, n_bytes))
    touch_all(region, threads=16)
    assert (region.array[:n_bytes] == by_key(0, n_bytes)).all()
    n = int(calls[0])
    assert 0 < n <= 1024
    offsets, lengths = calls[1:].astype(np.int64).reshape(-1, 2)[:n].T
    ends = offsets + lengths
    assert not (offsets % PAGE).any()
    assert (lengths > 0).all()
    assert ((lengths % PAGE == 0) | (ends == n_bytes)).all()
    assert (ends <= n_bytes).all()
    assert ends.max() == n_bytes
    assert lengths.sum() >= n_bytes


@pytest.mark.parametrize("result", [-errno.EIO, -errno.ENOSPC, 1, 4096], ids="{}".format)
def test_a_page_that_a_c_function_cannot_fill_fails_closed(
    needs_privilege: None,
    u: uf.Userfaultfd,
    service: uf.FaultService,
    library: ctypes.CDLL,
    result: int,
) -> None:
    failure = np.array([5 * PAGE, result], np.int64)
    region = u.map(8 * PAGE)
    service.serve(region, Native(library.fail, failure, region.length))
    expected = by_key(0, region.length)
    read, write = os.pipe()
    for page in (4, 5, 6, 7):
        part = slice(page * PAGE, (page + 1) * PAGE)
        if page == 5:
            # A system call fails with EFAULT where a plain touch would be SIGBUS.
            with pytest.raises(OSError, match="Bad address"):
                os.write(write, region.array[part])
        else:
            assert (region.array[part] == expected[part]).all()
    os.close(read)
    os.close(write)
    deadline = time.monotonic() + 30
    while not service.failures() and time.monotonic() < deadline:
        time.sleep(0.001)
    (failed,) = service.failures()
    assert (failed.region, failed.offset) == (region.id, 5 * PAGE)
    assert failed.address == region.start + 5 * PAGE
    assert "its source failed" in failed.why
    if result < 0:
        assert failed.errno == -result
        assert os.strerror(-result) in failed.why


def test_a_page_that_failed_kills_its_toucher(wire: str, child: Child, library_path: Path) -> None:
    done = child(f"""
        library = ctypes.CDLL({str(library_path)!r})
        u = uf.Userfaultfd(WIRE)
        region = u.map(8 * PAGE)
        service = uf.FaultService(u)
        failure = np.array([5 * PAGE, {-errno.EIO}], np.int64)
        service.serve(region, uf.sources.Native(library.fail, failure))
        print("before", region.array[0], flush=True)
        print("still here", region.array[5 * PAGE], flush=True)
        """)
    assert done.stdout == "before 0\n", done.stderr
    assert done.returncode < 0


def test_the_toucher_of_a_c_functions_page_may_hold_the_gil(
    wire: str, child: Child, library_path: Path
) -> None:
    done = child(f"""
        library = ctypes.CDLL({str(library_path)!r})
        with uf.Userfaultfd(WIRE) as u, uf.FaultService(u) as service:
            for source in uf.sources.Native(library.fill), uf.sources.Pattern(), uf.sources.Constant(3):
                region = u.map(64 * PAGE)
                service.serve(region, source)
                a = region.array
                b = bytes(a[PAGE:PAGE + 8]) + bytes(a[5 * PAGE:6 * PAGE])
                assert a[4 * PAGE:].any()
        print("good")
        """)
    assert done.stdout == "good\n", done.stderr


def test_the_function_and_its_ctx_live_as_long_as_the_source(
    u: uf.Userfaultfd, service: uf.FaultService, library: ctypes.CDLL
) -> None:
    key = np.array([77], np.uint64)
    function = PROTOTYPE(ctypes.cast(library.fill, ctypes.c_void_p).value)
    held = weakref.ref(key), weakref.ref(function)
    region = u.map(16 * PAGE)
    service.serve(region, Native(function, key, region.length))
    del key, function
    gc.collect()
    junk = [np.array([1], np.uint64) for _ in range(10_000)]
    assert all(one() is not None for one in held)
    touch_all(region)
    assert (region.array == by_key(77, region.length)).all()
    del junk
    region.unregister()
    gc.collect()
    assert all(one() is None for one in held)


def test_a_library_stays_loaded_as_long_as_a_source_uses_it(
    wire: str, child: Child, library_path: Path
) -> None:
    """cffi unloads a library when its object goes, which a function pointer does not hold."""
    done = child(f"""
        import _ctypes
        path = {str(library_path)!r}
        def loaded():
            return any(path in line for line in open("/proc/self/maps"))
        library = ctypes.CDLL(path)
        source = uf.sources.Native(library.fill)
        address = ctypes.cast(library.fill, ctypes.c_void_p).value
        _ctypes.dlclose(library._handle)
        assert loaded()
        with uf.Userfaultfd(WIRE) as u, uf.FaultService(u) as service:
            region = u.map(16 * PAGE)
            service.serve(region, source)
            assert region.array.any()
        del source, region, service, u
        gc.collect()
        assert not loaded()
        try:
            uf.sources.Native(address)
        except uf.SourceError as error:
            print(str(error).partition(":")[0] == f"no code at {{address:#x}}")
        """)
    assert done.stdout == "True\n", done.stderr


def test_nothing_of_others_is_imported(needs_uffd: None, child: Child, library_path: Path) -> None:
    done = child(f"""
        library = ctypes.CDLL({str(library_path)!r})
        uf.sources.Native(library.fill, np.zeros(1))
        try:
            uf.sources.Native(print)
        except uf.SourceError:
            print(sorted({{"scipy", "numba", "cffi", "_cffi_backend"}} & set(sys.modules)))
        """)
    assert done.stdout == "[]\n", done.stderr
