"""The same faults, in the same order, served by a `FaultService` and by the Python loop in turn."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

import userfault as uf
from userfault.cli.python_loop import PythonLoop
from userfault.negotiation import Agreement

Bytes = npt.NDArray[np.uint8]
Offsets = npt.NDArray[np.uint64]
Advance = Callable[[str, int], None]
"""Called with "file", "userfault", "loop" or "check", and how many more pages are done."""

_CHUNK = 1024 * uf.PAGE_SIZE
_PART = 256  # pages: long against the start of its threads
_MAX_PARTS = 64
_STUCK_SECONDS = 60


class DemoError(Exception):
    """What the demo promised did not come true; the text says what."""


@dataclass(frozen=True)
class Race:
    """What was measured. The times exclude mapping, the start of threads, and checking."""

    agreement: Agreement
    opened_by: str
    pages: int
    threads: int
    parts: int
    stats: Any  # FaultService.stats()
    seconds: float
    verified_bytes: int
    loop_faults: int
    loop_seconds: float
    loop_verified_bytes: int

    @property
    def faults(self) -> int:
        return int(self.stats["records"] - self.stats["unknown"])

    @property
    def ratio(self) -> float:
        """How many times as long the Python loop takes."""
        return self.loop_seconds / self.seconds


def run(path: str, length: int, threads: int, advance: Advance) -> Race:
    """Map `length` bytes twice, touch every page of both from `threads` threads, check every byte of both.

    Random order; the two take turns, part by part, and take turns at going first.
    Raises DemoError; UnavailableError and other errors of the library; OSError.
    """
    pages = length // uf.PAGE_SIZE
    order = np.random.default_rng().permutation(pages).astype(np.uint64) * np.uint64(uf.PAGE_SIZE)
    parts = max(2, min(_MAX_PARTS, pages // _PART) & ~1)  # even: each goes first equally often
    # In a virtual machine, memory that the host has yet to hand out is ten times slower: have it now.
    np.ones(2 * length, np.uint8)
    seconds = {"userfault": 0.0, "loop": 0.0}
    with uf.Userfaultfd() as u, uf.FaultService(u) as service, PythonLoop(path, length) as loop:
        region = u.map(length)
        service.serve(region, uf.sources.File(path), readahead=0)  # the loop fills one page a fault
        turns = [("userfault", region.array), ("loop", loop.region.array)]
        for part in np.array_split(order, parts):
            for name, array in turns:
                seconds[name] += _touch(array, part, threads)
                if loop.error is not None:
                    raise DemoError(f"the Python loop failed: {loop.error}")
                advance(name, len(part))
            turns.reverse()
        verified = verify(region.array, path, advance)
        service.close()  # the last fault's thread goes on a moment before the engine has counted it
        return Race(
            agreement=u.agreement,
            opened_by=u.opened_by,
            pages=pages,
            threads=threads,
            parts=parts,
            stats=service.stats(),
            seconds=seconds["userfault"],
            verified_bytes=verified,
            loop_faults=loop.faults,
            loop_seconds=seconds["loop"],
            loop_verified_bytes=verify(loop.region.array, path, advance),
        )


def _touch(array: Bytes, offsets: Offsets, threads: int) -> float:
    """Touch the offsets from `threads` threads at once: seconds from the first start to the last end."""
    barrier = threading.Barrier(threads)
    starts, ends = [0.0] * threads, [0.0] * threads

    def toucher(number: int) -> None:
        mine = np.ascontiguousarray(offsets[number::threads])
        with contextlib.suppress(threading.BrokenBarrierError):
            barrier.wait()
            starts[number] = time.perf_counter()
            uf.touch(array, mine)
            ends[number] = time.perf_counter()

    running = [threading.Thread(target=toucher, args=(number,), daemon=True) for number in range(threads)]
    try:
        _start(running)
        _join(running)
    except BaseException:
        # A service that closes under a toucher fails its page with a signal: first let them come to an end.
        barrier.abort()
        _join([thread for thread in running if thread.ident])
        raise
    return max(ends) - min(starts)


def _start(threads: list[threading.Thread]) -> None:
    try:
        for thread in threads:
            thread.start()
    except RuntimeError as error:
        remedy = "choose fewer --threads, or raise RLIMIT_NPROC (ulimit -u) or the container's pids limit"
        raise DemoError(f"{error}: {remedy}") from error


def _join(threads: list[threading.Thread]) -> None:
    """Wait for all; end the process when one does not come back: it can be neither woken nor joined."""
    deadline = time.monotonic() + _STUCK_SECONDS
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
        if thread.is_alive():
            message = f"userfault: no end after {_STUCK_SECONDS} s: a page is not being served"
            print(message, file=sys.stderr, flush=True)
            os._exit(1)


def verify(array: Bytes, path: str, advance: Advance) -> int:
    """Compare every byte with the file, read anew, and with zeros past its end: the bytes compared.

    Raises DemoError at the first difference.
    """
    done = 0
    with open(path, "rb") as file:
        while done < len(array):
            length = min(_CHUNK, len(array) - done)
            expected = np.frombuffer(file.read(length).ljust(length, b"\0"), np.uint8)
            wrong = np.flatnonzero(array[done : done + len(expected)] != expected)
            if len(wrong):
                at = int(wrong[0])
                raise DemoError(
                    f"byte {done + at} is {array[done + at]:#04x}, and should be {expected[at]:#04x}: "
                    "the file changed meanwhile, or this is a bug"
                )
            done += len(expected)
            advance("check", len(expected) // uf.PAGE_SIZE)
    return done
