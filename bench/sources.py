"""Where the records come from: a pipe, or a userfaultfd with a crowd of threads asleep in its faults."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

import rivals
import userfault as uf
from userfault import _consts as c

PATIENCE = 30  # seconds until a crowd that does not fault, or does not end, is an error


def page_faults(api: str, addresses: npt.NDArray[np.uint64]) -> npt.NDArray[np.void]:
    """Page-fault records of a wire."""
    records = np.zeros(addresses.size, c.DTYPES[api])
    if api == "msg":
        records["event"] = c.UFFD_EVENT_PAGEFAULT
        records["address"] = addresses
    else:
        records["arg"] = addresses
        if api == "v2":
            records["type"] = c.UFFD_PAGEFAULT
    return records


class Pipe:
    """A non-blocking pipe that `refill` fills with records for `calls` reads of `batch` records."""

    SIZE = 1 << 20  # the most that fs.pipe-max-size allows by default
    MOST_CALLS = 4096

    def __init__(self, api: str, batch: int) -> None:
        self.api = api
        self.fd, self._writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        size = fcntl.fcntl(self._writer, fcntl.F_SETPIPE_SZ, self.SIZE)
        self.calls = min(self.MOST_CALLS, size // (batch * c.DTYPES[api].itemsize))
        self.addresses = np.arange(1, self.calls * batch + 1, dtype=np.uint64) * np.uint64(uf.PAGE_SIZE)
        self._bytes = page_faults(api, self.addresses).tobytes()

    def refill(self) -> None:
        written = os.write(self._writer, self._bytes)
        if written != len(self._bytes):
            raise RuntimeError(f"the pipe took {written} of {len(self._bytes)} bytes: it was not empty")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self.fd)
        os.close(self._writer)


class Crowd:
    """A userfaultfd in whose region each of `threads` threads touches a page of its own.

    `refill` makes all of them fault, again if need be, and returns once every fault is pending.
    """

    def __init__(self, threads: int = 1024, api: str = "auto") -> None:
        self.uffd = uf.Userfaultfd(api)
        self.api = str(self.uffd.api)
        self.fd = self.uffd.fileno()
        self.region = self.uffd.map(threads * uf.PAGE_SIZE)
        self.addresses = self.region.start + np.arange(threads, dtype=np.uint64) * np.uint64(uf.PAGE_SIZE)
        self._handles = np.zeros(threads, np.uint64)
        self._started = rivals.library().crowd_start(
            self._handles.ctypes.data, self.region.start, uf.PAGE_SIZE, threads
        )
        if self._started < threads:
            self.close()
            raise RuntimeError(f"only {self._started} of {threads} threads could be started (ulimit -u)")

    def refill(self) -> None:
        self.uffd.wake(self.region.start, self.region.length)
        deadline = time.monotonic() + PATIENCE
        while (pending := self._pending()) < self._started:
            if time.monotonic() > deadline:
                raise TimeoutError(f"only {pending} of {self._started} threads fault")
            time.sleep(1e-3)

    def _pending(self) -> int:
        """Faults that nobody has read yet, as the kernel counts them."""
        info = Path(f"/proc/self/fdinfo/{self.fd}").read_text()
        return int(info.split("pending:")[1].split()[0])

    def close(self) -> None:
        """Fill the pages, wait for the threads, and close the userfaultfd."""
        self.uffd.zeropage(self.region.start, self.region.length)
        ended = rivals.library().crowd_join(self._handles.ctypes.data, self._started, PATIENCE)
        if ended < self._started:
            raise TimeoutError(f"only {ended} of {self._started} threads ended")
        self.uffd.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
