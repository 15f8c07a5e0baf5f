"""`take_children`: the fork children whose userfaultfds an `EventReader` has brought."""

from __future__ import annotations

import errno
import os
import time
import weakref
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from userfault import _ioctl
from userfault._children import batch_of, fail_closed
from userfault._descriptor import Descriptor
from userfault._engine import Engine
from userfault._regions import RegionTable
from userfault.errors import UnsupportedError
from userfault.flags import RegisterMode
from userfault.negotiation import Agreement
from userfault.region import Region
from userfault.uffd import Userfaultfd

if TYPE_CHECKING:
    import numpy.typing as npt
    from typing_extensions import Buffer


def take_children(records: npt.NDArray[np.void]) -> list[Userfaultfd]:
    """The fork children of a batch that `EventReader.read` returned, in the order of their fork records.

    Each is a `Userfaultfd` of the child's memory, with its parent's api and features; `regions` holds what
    the child has of its parent's regions, under the same ids. Its ioctls act on the child, an `EventReader`
    of it reads the child's faults and events, and `register(address, length)` takes more of its memory.
    What needs the memory in this process raises UnsupportedError: map(), buffers, arrays, move(), and a
    FaultService, of which the parent's follows the children by itself.

    Each child is handed out once, and then the caller's to close. Those that nobody takes are closed with
    the array (and its views), or at the reader's next read() or close(). Whatever of a child's regions is
    missing when its userfaultfd is closed fails closed (SIGBUS); before Linux 6.6, and for a child read
    from a bare descriptor, whose regions nobody knows, it reads as zeros.

    Raises RecordError for anything but an array of records. Source: userfaultfd(2), UFFD_EVENT_FORK.
    """
    batch = batch_of(records)
    return [] if batch is None else list[Userfaultfd](batch.take(ChildUserfaultfd))


def _not_here(what: str) -> UnsupportedError:
    return UnsupportedError(
        errno.EOPNOTSUPP, f"{what}: its memory is that of a fork child, not of this process"
    )


class ChildUserfaultfd(Userfaultfd):
    """The userfaultfd of a fork child's memory, as `take_children` hands it out."""

    _remote = True

    def __init__(self, fd: int, agreement: Agreement, regions: RegionTable) -> None:
        self.opened_by = "fork"
        self._begin(agreement, Descriptor(fd), regions)
        # At the interpreter's end, too: the child may live on.
        self._ending = weakref.finalize(self, _end, self._descriptor, regions, str(agreement.api))

    def map(
        self, length: int, mode: RegisterMode = RegisterMode.MISSING, *, inherit: bool = False
    ) -> NoReturn:
        raise _not_here("map() would have to map it there")

    def register(
        self,
        memory: int | Buffer | npt.NDArray[Any],
        length: int | None = None,
        mode: RegisterMode = RegisterMode.MISSING,
        *,
        inherit: bool = True,
    ) -> Region:
        """Register memory of the child: an address there and a length. The child's own children inherit it.

        Raises RangeError (misaligned, empty), OverlapError, UnsupportedError for a buffer, UffdError (the
        kernel refuses the memory).
        """
        if not isinstance(memory, (int, np.integer)) or length is None:
            raise _not_here("register(address, length) takes two numbers here")
        mode = RegisterMode(mode)
        start, length = int(memory), _ioctl.check_range(memory, length)
        with self._ours():
            number, ioctls = self._register(start, length, mode)
            return self._region(number, start, length, mode, ioctls, None, False)

    def _unregister(self, region: Region) -> None:
        with self._ours():
            self._give_back(region.id, region.start, region.length)

    def move(
        self, dst: int, src: int, length: int, *, wake: bool = True, allow_holes: bool = False
    ) -> NoReturn:
        raise _not_here("no page can be moved into it (UFFDIO_MOVE)")

    def _ensure_engine(self, as_keeper: bool) -> Engine:
        raise _not_here("a FaultService serves its own process, and follows its fork children by itself")

    def close(self) -> None:
        """Close; what the child misses fails closed before. Idempotent; nothing happens in a fork child."""
        if os.getpid() == self._descriptor.pid:
            with self._lock:
                self._ending()


def _end(descriptor: Descriptor, regions: RegionTable, api: str) -> None:
    if os.getpid() != descriptor.pid:
        return
    with descriptor as fd:
        descriptor.close()
        while descriptor.reading():
            time.sleep(200e-6)
        fail_closed(fd, regions, api)
