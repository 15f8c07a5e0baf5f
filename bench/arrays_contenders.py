"""Who reads the arrays of arrays.py: lazy arrays, numpy's own ways, and pread(2)."""

from __future__ import annotations

import ctypes
import functools
import os
import struct
import subprocess
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

import userfault as uf
from userfault.cli import machine

SOURCE = Path(__file__).with_name("arrays_rivals.c")
MIB = 1 << 20
HUGE = 2 << 20
CHUNK = 64 << 10
BLOCK = 16 << 20  # of a file, read or written at a time
LEVEL = 1  # of zlib

Array = npt.NDArray[Any]
Offsets = npt.NDArray[np.uint64]
Open = Callable[[], AbstractContextManager[Array]]
"""A new array, of which nothing is in memory yet if it is lazy; closed when the context ends."""


# -- C ---------------------------------------------------------------------------------------------------


@functools.cache
def library() -> ctypes.CDLL:
    """arrays_rivals.c, compiled now. Raises FileNotFoundError without a `cc`, CalledProcessError."""
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "arrays_rivals.so"
        command = ["cc", "-O3", "-shared", "-fPIC", "-o", str(built), str(SOURCE)]
        # Without zlib's development package there is no libz.so.
        for zlib_is in ("-lz", "-l:libz.so.1"):
            done = subprocess.run([*command, zlib_is], capture_output=True, text=True, timeout=60)
            if done.returncode == 0:
                break
        else:
            raise RuntimeError(f"arrays_rivals.c does not compile: {done.stderr.strip()}")
        rivals = ctypes.CDLL(str(built))
    pointer, u64 = ctypes.c_void_p, ctypes.c_uint64
    for function, first in ((rivals.copy_pages, pointer), (rivals.pread_pages, ctypes.c_int)):
        function.restype, function.argtypes = ctypes.c_long, [first, pointer, ctypes.c_long]
    rivals.inflate_chunks.restype = ctypes.c_int
    rivals.inflate_chunks.argtypes = [pointer, u64, pointer, ctypes.c_size_t]
    return rivals


# -- The data --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """A file of float64 that the page cache holds, and what they add up to."""

    path: str
    nbytes: int
    total: float

    @property
    def shape(self) -> tuple[int]:
        return (self.nbytes // 8,)

    def lazy(self, **options: Any) -> uf.LazyArray:
        return uf.lazy_array(self.path, self.shape, np.float64, **options)

    def memmap(self) -> AbstractContextManager[Array]:
        return nullcontext(np.memmap(self.path, np.float64, "r"))

    def read(self) -> AbstractContextManager[Array]:
        return nullcontext(np.fromfile(self.path, np.float64))


@contextmanager
def file_of_floats(nbytes: int) -> Iterator[Data]:
    """Whole numbers below a million, which add up exactly in any order."""
    rng = np.random.default_rng(0)
    total = 0.0
    with tempfile.NamedTemporaryFile(prefix="userfault-bench-") as file:
        for at in range(0, nbytes, BLOCK):
            block = rng.integers(0, 1_000_000, min(BLOCK, nbytes - at) // 8).astype(np.float64)
            total += float(block.sum())
            file.write(block.data)
        file.flush()
        os.fsync(file.fileno())  # so that no write-back disturbs what is measured
        np.fromfile(file.name, np.uint8)
        yield Data(file.name, nbytes, total)


class _Chunks(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("starts", ctypes.c_void_p),
        ("chunk", ctypes.c_uint64),
        ("nbytes", ctypes.c_uint64),
    )


class Compressed:
    """Float64 in chunks that zlib compressed one by one, in memory."""

    def __init__(self, nbytes: int, chunk: int = CHUNK) -> None:
        rng = np.random.default_rng(1)
        data = rng.integers(0, 1_000, nbytes // 8).astype(np.float64)
        view = data.view(np.uint8)
        self.nbytes, self.chunk, self.total = nbytes, chunk, float(data.sum())
        self.pieces = [zlib.compress(view[at : at + chunk], LEVEL) for at in range(0, nbytes, chunk)]
        self._joined = np.frombuffer(b"".join(self.pieces), np.uint8)
        self.starts = np.cumsum([0, *map(len, self.pieces)]).astype(np.uint64)
        self.ctx = _Chunks(self._joined.ctypes.data, self.starts.ctypes.data, chunk, nbytes)

    def lazy(self, **options: Any) -> uf.LazyArray:
        source = uf.sources.Native(library().inflate_chunks, self.ctx, self.nbytes)
        return uf.lazy_array(source, self.nbytes // 8, np.float64, page_bytes=self.chunk, **options)

    def by_python(self) -> AbstractContextManager[Array]:
        """Everything decompressed by Python's zlib into one array."""
        array = np.empty(self.nbytes // 8)
        view = array.view(np.uint8)
        for number, piece in enumerate(self.pieces):
            part = np.frombuffer(zlib.decompress(piece, bufsize=self.chunk), np.uint8)
            view[number * self.chunk : number * self.chunk + part.size] = part
        return nullcontext(array)

    def by_c(self) -> AbstractContextManager[Array]:
        """Everything decompressed by the fill function that serves the lazy array."""
        array = np.empty(self.nbytes // 8)
        if library().inflate_chunks(ctypes.byref(self.ctx), 0, array.ctypes.data, array.nbytes):
            raise RuntimeError("a chunk could not be decompressed")
        return nullcontext(array)


# -- What they do ----------------------------------------------------------------------------------------


def summed(open_array: Open, total: float) -> float:
    """Seconds from opening to the sum of all elements."""
    start = time.perf_counter()
    with open_array() as array:
        found = array.sum()
        took = time.perf_counter() - start
    check(found == total)
    return took


def summed_in_blocks(open_array: Open, total: float) -> float:
    """The same, block by block."""
    start = time.perf_counter()
    with open_array() as array:
        step = BLOCK // array.itemsize
        found = sum(float(array[at : at + step].sum()) for at in range(0, array.size, step))
        took = time.perf_counter() - start
    check(found == total)
    return took


def first_element(open_array: Open, expected: float) -> float:
    """Seconds from opening to the first element."""
    start = time.perf_counter()
    with open_array() as array:
        found = array[0]
        took = time.perf_counter() - start
    check(found == expected)
    return took


def gathered(
    open_array: Open, indices: npt.NDArray[np.intp], expected: Array, prefetch: bool = False
) -> float:
    """Seconds from opening to the elements of these indices."""
    start = time.perf_counter()
    with open_array() as array:
        if prefetch:
            array.prefetch(indices)  # type: ignore[attr-defined]
        found = array[indices]
        took = time.perf_counter() - start
    check(np.array_equal(found, expected))
    return took


def opened(open_array: Open) -> float:
    """Seconds until it is open: of numpy.fromfile, until all is read."""
    start = time.perf_counter()
    with open_array():
        return time.perf_counter() - start


def at_random(array: Array, offsets: Offsets, threads: int = 1) -> float:
    """Seconds in which so many threads touch a byte at each offset, each thread its share of them."""
    memory = array.view(np.uint8)
    return by_threads(functools.partial(uf.touch, memory), offsets, threads)[0]


def by_threads(read: Callable[[Offsets], int], offsets: Offsets, threads: int) -> tuple[float, int]:
    """Seconds in which so many threads read at the offsets, and the sum of what they found."""
    shares = [np.ascontiguousarray(offsets[i::threads]) for i in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        start = time.perf_counter()
        found = sum(pool.map(read, shares))
        return time.perf_counter() - start, found


def copy_pages(array: Array, offsets: Offsets) -> int:
    found: int = library().copy_pages(array.ctypes.data, offsets.ctypes.data, offsets.size)
    return found


def pread_pages(file: int, offsets: Offsets) -> int:
    found: int = library().pread_pages(file, offsets.ctypes.data, offsets.size)
    return found


def os_pread_pages(file: int, offsets: Offsets) -> int:
    first = struct.Struct("d").unpack_from
    return int(sum(first(os.pread(file, uf.PAGE_SIZE, offset))[0] for offset in offsets.tolist()))


def check(right: bool) -> None:
    if not right:
        raise RuntimeError("wrong bytes came")


# -- How much is in memory -------------------------------------------------------------------------------


class Peak:
    """By how much the process's anonymous memory grows at the most while it is open: `nbytes`, sampled."""

    def __init__(self) -> None:
        self.nbytes = self._before = 0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._sample)

    @classmethod
    def of(cls, work: Callable[[], object]) -> int:
        """Of some work."""
        with cls() as peak:
            work()
        return peak.nbytes

    def _sample(self) -> None:
        while not self._stopping.wait(1e-3):
            self.nbytes = max(self.nbytes, resident() - self._before)

    def __enter__(self) -> Self:
        self._before = resident()
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stopping.set()
        self._thread.join()


def resident() -> int:
    """Bytes of the process's anonymous memory."""
    return int(machine.fields("/proc/self/status")["RssAnon"].removesuffix(" kB")) << 10
