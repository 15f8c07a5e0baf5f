"""`Region`: a registered range of memory, as `Userfaultfd.map` and `.register` return it."""

from __future__ import annotations

import ctypes
import errno
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import numpy.typing as npt

from userfault.errors import ClosedError, UnsupportedError
from userfault.flags import Ioctl, RegisterMode, names

if TYPE_CHECKING:
    from userfault._mapping import Mapping
    from userfault.uffd import Userfaultfd


class Region:
    """A registered range.

    Attributes:
        id: its number in `Userfaultfd.regions`.
        start, length: address and size in bytes, as it was registered (`Userfaultfd.regions` says where it
            is now, if it was moved since).
        mode: which faults are reported.
        ioctls: the ioctls that the kernel granted for it (UFFDIO_REGISTER).
    """

    def __init__(
        self,
        userfaultfd: Userfaultfd,
        number: int,
        start: int,
        length: int,
        mode: RegisterMode,
        ioctls: Ioctl,
        memory: Mapping | memoryview | None,
        mapped: bool,
    ) -> None:
        self.id = number
        self.start = start
        self.length = length
        self.mode = mode
        self.ioctls = ioctls
        self._userfaultfd = userfaultfd
        self._memory = memory
        self._mapped = mapped
        self._array: npt.NDArray[np.uint8] | None = None
        self._closed = False

    @property
    def array(self) -> npt.NDArray[np.uint8]:
        """The memory as uint8, shape (length,). Mapped memory lives as long as any view of it.

        Raises ClosedError; UnsupportedError for memory of a fork child.
        """
        if self._closed:
            raise ClosedError("the region is closed")
        if self._userfaultfd._remote:
            raise UnsupportedError(errno.EOPNOTSUPP, "this is memory of a fork child, not of this process")
        if self._array is None:
            memory: Any = self._memory
            if memory is None:
                memory = (ctypes.c_ubyte * self.length).from_address(self.start)
            self._array = np.frombuffer(memory, np.uint8)
        return self._array

    @property
    def registered(self) -> bool:
        """Whether the region is still registered, and not closed."""
        return not self._closed and bool(self._userfaultfd._pieces(self.id, self.start, self.length))

    def unregister(self) -> None:
        """Make it ordinary memory again: from now on, pages that were never filled read as zeros.

        Memory that was registered, not mapped, may be unregistered also after close(). Raises ClosedError
        when it is not registered any more, ForkedError in a fork child.
        """
        if not self._userfaultfd._pieces(self.id, self.start, self.length):
            raise ClosedError("the region is not registered any more")
        self._userfaultfd._unregister(self)

    def close(self) -> None:
        """Let go of the memory, served no more. Idempotent; nothing happens in a fork child.

        Mapped memory is unmapped with the last view of it. As long as views live, and for memory that was
        registered, which belongs to the caller, its missing pages fail closed (touching one raises SIGBUS)
        once a service has been open or the userfaultfd is closed; until then its faults go to whoever
        reads the userfaultfd.
        """
        if not self._closed:
            self._closed = True
            self._userfaultfd._close_region(self)

    def _release(self) -> None:
        """Drop our own hold on mapped memory: without views it is unmapped here and now."""
        self._closed = True
        if self._mapped:
            self._array = None
            self._memory = None

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Region cannot be copied or pickled: copy its array")

    def __repr__(self) -> str:
        return f"<Region {self.id} [{self.start:#x}, +{self.length:#x}) {names(self.mode)}>"
