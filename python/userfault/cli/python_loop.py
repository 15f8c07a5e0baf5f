"""The loop that people write today: a Python thread, one record a read(), the standard library alone."""

from __future__ import annotations

import bisect
import ctypes
import fcntl
import mmap
import os
import select
import struct
import threading
from types import TracebackType
from typing import Self

import userfault as uf
from userfault import _consts as c

# (type, address) of a record, and the type that means a page fault.
_RECORDS = {
    uf.Api.V2: (struct.Struct("<QQ"), c.UFFD_PAGEFAULT),
    uf.Api.MSG: (struct.Struct("<B15xQ8x"), c.UFFD_EVENT_PAGEFAULT),
}
_POLL_MS = 100


class PythonLoop:
    """Serves one mapped region from the file at `path`, while it is open.

    Threads that touch the region must not hold the GIL. When the handler fails, `error` says why and
    whoever waits for a page is let go.
    """

    def __init__(self, path: str, length: int) -> None:
        self.faults = 0
        self.error: BaseException | None = None
        self._path = path
        self._stopping = False
        self._userfaultfd = uf.Userfaultfd()
        self.region = self._userfaultfd.map(length)
        self._thread = threading.Thread(target=self._run, name="python-loop", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping = True
        self._thread.join()
        self._userfaultfd.close()

    def _run(self) -> None:
        file = -1
        try:
            file = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            self._serve(file)
        except BaseException as error:
            self.error = error
            # Sleepers wake and read zeros, instead of waiting for ever.
            self.region.unregister()
        finally:
            if file >= 0:
                os.close(file)

    def _serve(self, file: int) -> None:
        page_size, copy_request, wake_request = c.PAGE_SIZE, c.UFFDIO_COPY, c.UFFDIO_WAKE
        record, page_fault = _RECORDS[self._userfaultfd.api]
        copy, wake = struct.Struct("<QQQQq"), struct.Struct("<QQ")
        fd = self._userfaultfd.fileno()
        poller = select.poll()
        poller.register(fd, select.POLLIN)
        starts = [self.region.start]
        staging = mmap.mmap(-1, page_size)
        source = ctypes.addressof(ctypes.c_char.from_buffer(staging))
        while True:
            try:
                message = os.read(fd, record.size)
            except BlockingIOError:
                if not poller.poll(_POLL_MS) and self._stopping:
                    return
                continue
            kind, address = record.unpack(message)
            if kind != page_fault:
                raise RuntimeError(f"a record of type {kind:#x}, which nobody asked for")
            page = address & -page_size
            start = starts[bisect.bisect_right(starts, page) - 1]
            got = os.preadv(file, [staging], page - start)
            if got < page_size:
                staging[got:] = bytes(page_size - got)
            try:
                fcntl.ioctl(fd, copy_request, copy.pack(page, source, page_size, 0, 0))
            except FileExistsError:
                fcntl.ioctl(fd, wake_request, wake.pack(page, page_size))
            self.faults += 1
