"""For events.py: threads that fork, move, drop and unmap served memory, and compare every byte of it.

Each moves its memory about in a range of addresses of its own: the kernel does not say in which order two
threads moved theirs, when one took the place that the other had just left.
"""

from __future__ import annotations

import ctypes
import os
import random
import threading
import time
from collections.abc import Callable

import numpy as np

import rivals
import userfault as uf
from serve_contenders import FAR

KINDS = ("forks", "remaps", "removes", "unmaps")
PAGES = 64  # of a region
LIFE = 32  # operations on it, until it is unmapped
_MADV_DONTNEED = 4
_MAYMOVE_FIXED = 3
_READ_WRITE, _PRIVATE_ANONYMOUS_FIXED = 3, 0x100022
_LENGTH = PAGES * uf.PAGE_SIZE
_PLACES = 16  # of a thread

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = _libc.mremap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def _called(result: int | None) -> int:
    """What a function of the C library answered. Raises OSError."""
    if result in (None, -1, ctypes.c_void_p(-1).value):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return int(result or 0)


class Storm:
    """Threads, each with a region and a source of its own, all of one service."""

    def __init__(self, userfaultfd: uf.Userfaultfd, service: uf.FaultService, threads: int) -> None:
        self.userfaultfd, self.service = userfaultfd, service
        self.pages = self.wrong = 0
        self._lock = threading.Lock()
        self._until = 0.0
        self._errors: list[BaseException] = []
        rivals.serve_library()  # not compiled in the midst of it
        self._threads = [threading.Thread(target=self._work, args=(number,)) for number in range(threads)]

    def run(self, seconds: float, tell: Callable[[float], None]) -> float:
        """Until so many seconds are over, which `tell` is told; the seconds that it took."""
        start = time.monotonic()
        self._until = start + seconds
        for thread in self._threads:
            thread.start()
        while any(thread.is_alive() for thread in self._threads):
            tell(max(0.0, self._until - time.monotonic()))
            time.sleep(min(1.0, seconds / 4))
        if self._errors:
            raise self._errors[0]
        return time.monotonic() - start

    def _work(self, number: int) -> None:
        choose = random.Random(number)
        data = np.random.default_rng(number).integers(1, 256, _LENGTH, dtype=np.uint8)
        try:
            while time.monotonic() < self._until and not self._errors:
                self._one_life(number, choose, data)
        except BaseException as error:
            self._errors.append(error)

    def _one_life(self, number: int, choose: random.Random, data: np.ndarray) -> None:
        places = [FAR + (number * _PLACES + i) * 2 * _LENGTH for i in range(_PLACES)]
        start = choose.choice(places)
        _called(_libc.mmap(start, _LENGTH, _READ_WRITE, _PRIVATE_ANONYMOUS_FIXED, -1, 0))
        region = self.userfaultfd.register(start, _LENGTH)
        self.service.serve(region, uf.sources.Buffer(data), readahead=choose.choice((0, 7, "adaptive")))
        for _ in range(LIFE):
            kind = choose.choice(("forks", "remaps", "removes"))
            if kind == "remaps":
                to = choose.choice([place for place in places if place != start])
                start = _called(_libc.mremap(start, _LENGTH, _LENGTH, _MAYMOVE_FIXED, to))
            elif kind == "removes":
                first = choose.randrange(PAGES)
                length = choose.randint(1, PAGES - first) * uf.PAGE_SIZE
                _called(_libc.madvise(start + first * uf.PAGE_SIZE, length, _MADV_DONTNEED))
            else:
                self._fork(start, data)
            if choose.random() < 0.5:
                self._compare(start, 0, PAGES, data)
        middle = choose.randint(1, PAGES - 1)
        _called(_libc.munmap(start, middle * uf.PAGE_SIZE))
        self._compare(start, middle, PAGES, data)
        _called(_libc.munmap(start + middle * uf.PAGE_SIZE, (PAGES - middle) * uf.PAGE_SIZE))
        region.close()

    def _fork(self, start: int, data: np.ndarray) -> None:
        pid = os.fork()
        if pid == 0:
            os._exit(rivals.serve_library().differ(start, data.ctypes.data, _LENGTH))
        self._count(PAGES, os.waitpid(pid, 0)[1] != 0)

    def _compare(self, start: int, first: int, end: int, data: np.ndarray) -> None:
        skipped, length = first * uf.PAGE_SIZE, (end - first) * uf.PAGE_SIZE
        wrong = rivals.serve_library().differ(start + skipped, data.ctypes.data + skipped, length)
        self._count(end - first, wrong)

    def _count(self, pages: int, wrong: int) -> None:
        with self._lock:
            self.pages += pages
            self.wrong += bool(wrong)
