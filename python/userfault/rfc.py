"""`RfcModel`: the kernel's side of RFC v1 and v2, modelled in user space over a pipe.

No released kernel speaks these formats. This is a model and not a kernel: it has no memory and no
faulting threads, only the API call, the queue of records and read(). Written from "[PATCH 2/3] uffd:
Introduce the v2 API" (linux-kernel, 18 March 2015; functions are named below), from patch 3/3 of that
series for the fork record, and from fs/userfaultfd.c for the lines that patch 2/3 shows no text of.
"""

from __future__ import annotations

import errno
import os
import select
import struct
from types import TracebackType
from typing import Self

from userfault import _consts as c
from userfault.flags import Ioctl, RfcBit

_API = struct.Struct("<QQQ")  # struct uffdio_api {api, bits, ioctls}
_V1 = struct.Struct("<Q")  # a bare address
_V2 = struct.Struct("<QQ")  # struct uffd_v2_msg {type, arg}
_IOCTLS = Ioctl.REGISTER | Ioctl.UNREGISTER | Ioctl.API  # UFFD_API_IOCTLS


def _error(number: int, what: str) -> OSError:
    return OSError(number, f"{what}: {os.strerror(number)}")


class RfcModel:
    """A userfaultfd of an RFC kernel, its records in a pipe.

    `fileno()` is the non-blocking read end, so that readers, poll and select work on it; what a pipe
    answers differently (read() and poll() before the API call, buffers below one record) is in `read`
    and `poll`. At most 64 KiB of records can be pending: more raises BlockingIOError.

    Args:
        fork: whether patch 3/3, which adds the fork record, is applied.
    """

    def __init__(self, fork: bool = False) -> None:
        self._fork = fork
        self._record: struct.Struct | None = None  # None: UFFD_STATE_WAIT_API
        self._read_end, self._write_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._closed = False

    def fileno(self) -> int:
        """The read end's number."""
        return self._read_end

    # -- the API call ------------------------------------------------------------------------------

    def api_struct(self, argument: bytes) -> tuple[int, bytes]:
        """UFFDIO_API on the 24 bytes of struct uffdio_api: (0 or errno, the 24 bytes afterwards).

        userfaultfd_api(): only `api` is read. 0xAA answers bits UFFD_API_BITS; 0xAB turns on LONGMSG and
        adds UFFD_API_V2_BITS; any other zeroes the struct and is EINVAL, and leaves the state as it was. A
        call after a successful one is EINVAL, the struct untouched (as in Linux 4.3; later ones zero it).
        """
        api, _, _ = _API.unpack(argument)
        if self._record is not None:
            return errno.EINVAL, argument
        bits = RfcBit.WRITE
        if api == c.UFFD_API:
            self._record = _V1
        elif api == c.UFFD_API_V2:
            self._record = _V2
            bits |= RfcBit.PAGEFAULT | (RfcBit.FORK if self._fork else RfcBit(0))
        else:
            return errno.EINVAL, bytes(_API.size)
        return 0, _API.pack(api, bits, _IOCTLS)

    def api(self, api: int, features: int) -> tuple[int, int]:
        """UFFDIO_API: (bits, ioctls); `features` is not read. Raises OSError(EINVAL) as `api_struct` says."""
        error, answer = self.api_struct(_API.pack(api, features, 0))
        if error:
            raise _error(error, f"UFFDIO_API {api:#x}")
        _, bits, ioctls = _API.unpack(answer)
        return bits, ioctls

    def _running(self, what: str) -> struct.Struct:
        if self._record is None:
            raise _error(errno.EINVAL, f"{what} before the API call")
        return self._record

    # -- what happens to the memory ----------------------------------------------------------------

    def fault(self, address: int, write: bool = False, wp: bool = False) -> None:
        """A page fault at `address`: its page, with UFFD_BIT_WRITE and UFFD_BIT_WP. Raises as `put`."""
        bits = (c.UFFD_BIT_WRITE if write else 0) | (c.UFFD_BIT_WP if wp else 0)
        self.put(c.UFFD_PAGEFAULT, address & -c.PAGE_SIZE | bits)

    def fork(self) -> RfcModel:
        """A fork: the child's userfaultfd, which speaks v2 already; the record's arg is its number.

        The kernel installs that descriptor in the process that reads the record; here it is the caller's to
        close. Raises ValueError where patch 3/3 is not applied, and on v1, where the child is detached
        without a record; OSError(EINVAL) before the API call.
        """
        if not self._fork or self._running("fork") is _V1:
            raise ValueError("no fork record without patch 3/3, and none on v1")
        child = RfcModel(fork=True)
        child._record = _V2
        self.put(c.UFFD_FORK, child.fileno())
        return child

    def put(self, kind: int, arg: int) -> None:
        """Queue a record of type `kind`; one that the RFC gives no number is for tests of readers.

        Raises ValueError for anything but a page fault on v1 (BUG_ON there); OSError(EINVAL) before the
        API call, when no memory can be registered.
        """
        if self._running("a record") is _V2:
            os.write(self._write_end, _V2.pack(kind, arg))
        elif kind == c.UFFD_PAGEFAULT:
            os.write(self._write_end, _V1.pack(arg))
        else:
            raise ValueError(f"v1 has no record of type {kind:#x}")

    # -- read and poll -----------------------------------------------------------------------------

    def read(self, count: int, nonblock: bool, writable: int | None = None) -> bytes:
        """read(2) into `count` bytes, of which the first `writable` can be written (None: all).

        userfaultfd_read(): as many whole records as fit, oldest first; blocks only for the very first,
        unless `nonblock`. Raises OSError: EINVAL before the API call or when `count` is below one record,
        EAGAIN with nothing pending, and where the memory cannot be written EFAULT on v1, EINVAL on v2, the
        record being consumed. An error after at least one record returns what was filled.
        """
        size = self._running("read").size
        filled = b""
        try:
            while True:
                if count - len(filled) < size:
                    raise _error(errno.EINVAL, f"a buffer below the record's {size} bytes")
                record = self._next(size, wait=not (nonblock or filled))
                if writable is not None and writable - len(filled) < size:
                    raise _error(errno.EFAULT if self._record is _V1 else errno.EINVAL, "a bad user buffer")
                filled += record
        except OSError:
            if not filled:
                raise
            return filled

    def _next(self, size: int, wait: bool) -> bytes:
        """userfaultfd_ctx_read(): take one record off the queue."""
        while True:
            try:
                return os.read(self._read_end, size)
            except BlockingIOError:
                if not wait:
                    raise
            self._pending(None)

    def _pending(self, milliseconds: float | None) -> bool:
        poller = select.poll()
        poller.register(self._read_end, select.POLLIN)
        return bool(poller.poll(milliseconds))

    def poll(self) -> int:
        """userfaultfd_poll(): POLLERR before the API call; then POLLIN while a record is pending, or 0."""
        if self._record is None:
            return select.POLLERR
        return select.POLLIN if self._pending(0) else 0

    # -- life cycle --------------------------------------------------------------------------------

    def close(self) -> None:
        """Close the pipe. Idempotent."""
        if not self._closed:
            self._closed = True
            os.close(self._read_end)
            os.close(self._write_end)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
