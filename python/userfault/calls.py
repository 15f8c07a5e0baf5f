"""`Calls`: the ioctls that resolve faults, as methods."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import numpy as np

from userfault import _consts as c
from userfault import _ioctl
from userfault._descriptor import Descriptor

if TYPE_CHECKING:
    import numpy.typing as npt
    from typing_extensions import Buffer


class Calls:
    """The ioctls of a userfaultfd, on whose memory they act.

    Each returns the bytes completed where the kernel says so, and raises RangeError for a range that is
    not whole pages, ClosedError, ForkedError, or UffdError: PageExistsError (EEXIST), ChangingError
    (EAGAIN), NotRegisteredError (ENOENT), ProcessGoneError (ESRCH), whose `done` says how far it came.
    Source: ioctl_userfaultfd(2).
    """

    _descriptor: Descriptor

    def copy(
        self,
        dst: int,
        buffer: Buffer | npt.NDArray[Any],
        *,
        wake: bool = True,
        write_protect: bool = False,
    ) -> int:
        """Fill missing pages from `dst` on with the buffer's bytes (whole pages), and wake their faulters."""
        view = memoryview(cast(Any, buffer))
        if "O" in view.format:
            raise TypeError("the buffer holds Python objects, not bytes")
        flat = np.frombuffer(view, np.uint8)
        mode = (0 if wake else c.UFFDIO_MODE_DONTWAKE) | (c.UFFDIO_COPY_MODE_WP if write_protect else 0)
        with self._descriptor as fd:
            return _ioctl.copy(fd, dst, flat.ctypes.data, flat.nbytes, mode)

    def zeropage(self, start: int, length: int, *, wake: bool = True) -> int:
        """Fill missing pages with zeros, and wake their faulters."""
        with self._descriptor as fd:
            return _ioctl.zeropage(fd, start, length, 0 if wake else c.UFFDIO_MODE_DONTWAKE)

    def wake(self, start: int, length: int) -> None:
        """Wake every thread that sleeps in the range; what is still missing faults again."""
        with self._descriptor as fd:
            _ioctl.wake(fd, start, length)

    def continue_(self, start: int, length: int, *, wake: bool = True, write_protect: bool = False) -> int:
        """Map pages that are in the page cache already (minor faults)."""
        mode = (0 if wake else c.UFFDIO_MODE_DONTWAKE) | (c.UFFDIO_CONTINUE_MODE_WP if write_protect else 0)
        with self._descriptor as fd:
            return _ioctl.continue_(fd, start, length, mode)

    def writeprotect(self, start: int, length: int, *, protect: bool = True, wake: bool = True) -> None:
        """Arm write protection, or with protect=False lift it and wake the writers that sleep there."""
        mode = c.UFFDIO_WRITEPROTECT_MODE_WP if protect else 0
        # Arming wakes nobody, and the kernel refuses DONTWAKE with it.
        mode |= 0 if wake or protect else c.UFFDIO_WRITEPROTECT_MODE_DONTWAKE
        with self._descriptor as fd:
            _ioctl.writeprotect(fd, start, length, mode)

    def poison(self, start: int, length: int, *, wake: bool = True) -> int:
        """Make missing pages raise SIGBUS when touched (Linux 6.6)."""
        with self._descriptor as fd:
            return _ioctl.poison(fd, start, length, 0 if wake else c.UFFDIO_MODE_DONTWAKE)

    def move(self, dst: int, src: int, length: int, *, wake: bool = True, allow_holes: bool = False) -> int:
        """Move pages of this process from `src`, which loses them, to `dst` without copying (Linux 6.8)."""
        mode = 0 if wake else c.UFFDIO_MODE_DONTWAKE
        mode |= c.UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES if allow_holes else 0
        with self._descriptor as fd:
            return _ioctl.move(fd, dst, src, length, mode)
