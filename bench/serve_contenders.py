"""Who serves the faults of serve.py: ours, handlers in C, and the loop that people write in Python."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import select
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

import rivals
import userfault as uf
from userfault import _consts as c
from userfault.cli.python_loop import PythonLoop
from userfault.negotiation import DEFAULT, Features
from userfault.service import Serving

BACKINGS = ("memory", "file")
CPU = max(os.sched_getaffinity(0))  # where those who share a CPU are pinned
SIGBUS = DEFAULT & (uf.probe().features or uf.Feature(0)) | uf.Feature.SIGBUS
FAR = 1 << 44  # addresses that Linux gives to nobody unasked
PATIENCE = 60  # seconds until touching threads that do not end are an error

Bytes = npt.NDArray[np.uint8]
Offsets = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Data:
    """Random bytes, in memory and, the same ones, in a file that the page cache holds."""

    memory: Bytes
    mapped: Bytes  # the file
    path: str

    def source(self, backing: str) -> uf.sources.Source:
        return uf.sources.Buffer(self.memory) if backing == "memory" else uf.sources.File(self.path)

    def address(self, backing: str) -> int:
        """Where a handler in C copies from: UFFDIO_COPY out of the mapped file spares it a pread()."""
        return (self.memory if backing == "memory" else self.mapped).ctypes.data

    def check(self, region: uf.Region) -> None:
        """Compare every byte of a region whose pages are all there. Raises RuntimeError."""
        if rivals.serve_library().differ(region.start, self.memory.ctypes.data, region.length):
            raise RuntimeError("a byte of the region is wrong")


@contextmanager
def random_data(nbytes: int) -> Iterator[Data]:
    memory = np.frombuffer(np.random.default_rng(0).bytes(nbytes), np.uint8)
    with tempfile.NamedTemporaryFile(prefix="userfault-bench-") as file:
        file.write(memory.data)
        file.flush()
        os.fsync(file.fileno())  # so that no write-back disturbs what is measured
        shared = mmap.mmap(file.fileno(), nbytes, mmap.MAP_SHARED | mmap.MAP_POPULATE, mmap.PROT_READ)
        yield Data(memory, np.frombuffer(shared, np.uint8), file.name)


Open = Callable[[Data, str, int], AbstractContextManager[uf.Region]]
"""Called with the data, its backing, and a length: a new region of that length, served while it is open."""


@dataclass(frozen=True)
class Contender:
    open: Open
    cpu: int = -1  # where the touching threads are pinned; -1: nowhere


def handler(records: int, cpu: int = -1) -> Open:
    """A thread in C: poll(), read() of up to so many records, one UFFDIO_COPY for each."""

    @contextmanager
    def opened(data: Data, backing: str, length: int) -> Iterator[uf.Region]:
        library = rivals.serve_library()
        with uf.Userfaultfd("msg") as u:
            region = u.map(length)
            started = library.handler_start(u.fileno(), region.start, data.address(backing), records, cpu)
            if not started:
                raise RuntimeError("no thread to be had for a handler (ulimit -u)")
            try:
                yield region
            finally:
                library.handler_stop(started)

    return opened


@contextmanager
def sigbus_handler(data: Data, backing: str, length: int) -> Iterator[uf.Region]:
    """A handler of SIGBUS in C, in the thread that touches the page: one UFFDIO_COPY."""
    library = rivals.serve_library()
    with uf.Userfaultfd("msg", SIGBUS) as u:
        region = u.map(length)
        if library.sigbus_start(u.fileno(), region.start, data.address(backing)):
            raise RuntimeError("no handler of SIGBUS to be had")
        try:
            yield region
        finally:
            library.sigbus_stop()


@contextmanager
def served(
    data: Data,
    backing: str,
    length: int,
    placement: str = "spin",
    ranges: int = 1,
    features: Features = None,
    mode: Serving = "threads",
    **options: Any,
) -> Iterator[tuple[uf.FaultService, uf.Region]]:
    """Ours, with options of `FaultService.serve`, and so many ranges in the table of regions."""
    features = SIGBUS if mode == "inline" else features
    with uf.Userfaultfd("msg", features) as u, uf.FaultService(u, placement=placement, mode=mode) as svc:
        region = u.map(length)
        svc.serve(region, data.source(backing), **options)
        more = np.arange(ranges - 1, dtype=np.uint64) * np.uint64(2 * uf.PAGE_SIZE) + np.uint64(FAR)
        u.regions.add_many(more, np.full(more.size, uf.PAGE_SIZE, np.uint64))
        try:
            yield svc, region
        finally:
            if more.size:
                u.regions.remove(FAR, more.size * 2 * uf.PAGE_SIZE)


def service(**options: Any) -> Open:
    """A contender of ours, with options of `served`."""

    @contextmanager
    def opened(data: Data, backing: str, length: int) -> Iterator[uf.Region]:
        with served(data, backing, length, **options) as (_, region):
            yield region

    return opened


class MemoryLoop(PythonLoop):
    """The Python loop for bytes in memory: it copies from where they are, and has no file to read."""

    def __init__(self, data: Bytes, length: int) -> None:
        super().__init__(os.devnull, length)
        self._source = data.ctypes.data

    def _serve(self, file: int) -> None:
        page_size, copy_request, wake_request = c.PAGE_SIZE, c.UFFDIO_COPY, c.UFFDIO_WAKE
        record, copy, wake = struct.Struct("<B15xQ8x"), struct.Struct("<QQQQq"), struct.Struct("<QQ")
        fd, start, source = self._userfaultfd.fileno(), self.region.start, self._source
        poller = select.poll()
        poller.register(fd, select.POLLIN)
        while True:
            try:
                message = os.read(fd, record.size)
            except BlockingIOError:
                if not poller.poll(100) and self._stopping:
                    return
                continue
            kind, address = record.unpack(message)
            if kind != c.UFFD_EVENT_PAGEFAULT:
                raise RuntimeError(f"a record of type {kind:#x}, which nobody asked for")
            page = address & -page_size
            try:
                fcntl.ioctl(fd, copy_request, copy.pack(page, source + page - start, page_size, 0, 0))
            except FileExistsError:
                fcntl.ioctl(fd, wake_request, wake.pack(page, page_size))


@contextmanager
def python_loop(data: Data, backing: str, length: int) -> Iterator[uf.Region]:
    loop = MemoryLoop(data.memory, length) if backing == "memory" else PythonLoop(data.path, length)
    with loop:
        yield loop.region
    if loop.error is not None:
        raise loop.error


ONE, MANY, PINNED, PYTHON = "(a) C", "(b) C", "(b) pinned", "(c) Python"
OURS, PAGE, PAIR = "ours", "ours, 1 page", "pair, 1 page"
IN_C, INLINE, INLINE_PAGE = "(d) SIGBUS", "inline", "inline, 1 page"
CONTENDERS = {
    ONE: Contender(handler(1)),
    MANY: Contender(handler(256)),
    PINNED: Contender(handler(256, CPU), CPU),
    PYTHON: Contender(python_loop),
    OURS: Contender(service()),
    PAGE: Contender(service(readahead=0)),
    PAIR: Contender(service(placement="pair", readahead=0)),
}
INLINE_CONTENDERS = {
    MANY: CONTENDERS[MANY],
    PINNED: CONTENDERS[PINNED],
    IN_C: Contender(sigbus_handler),
    PAGE: CONTENDERS[PAGE],
    INLINE: Contender(service(mode="inline")),
    INLINE_PAGE: Contender(service(mode="inline", readahead=0)),
}


def touch(region: uf.Region, offsets: Offsets, expected: Bytes, threads: int, cpu: int = -1) -> float:
    """Touch the offsets from so many threads in C: seconds from the first start to the last end.

    Thread i has every offset from the i-th on in steps of `threads`. Raises RuntimeError for a wrong byte.
    """
    wrong = ctypes.c_long()
    took: int = rivals.serve_library().touch_all(
        region.start,
        offsets.ctypes.data,
        expected.ctypes.data,
        offsets.size,
        threads,
        cpu,
        PATIENCE,
        ctypes.byref(wrong),
    )
    if took == -1:
        raise RuntimeError(f"{threads} threads could not be started (ulimit -u)")
    if took < 0:
        # A thread that sleeps in a fault can be neither woken nor joined.
        print(f"a page was not served within {PATIENCE} s", file=sys.stderr, flush=True)
        os._exit(1)
    if wrong.value:
        raise RuntimeError(f"{wrong.value} of {offsets.size} bytes were wrong")
    return took * 1e-9
