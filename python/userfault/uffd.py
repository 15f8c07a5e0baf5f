"""`Userfaultfd`: one descriptor and its regions."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import threading
import time
import weakref
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Self, cast

import numpy as np

from userfault import _ioctl, _mapping
from userfault._children import sharing
from userfault._descriptor import Descriptor
from userfault._engine import Engine
from userfault._errno import error_for
from userfault._regions import RegionTable
from userfault._source import refuse_live_buffers
from userfault.calls import Calls
from userfault.errors import OverlapError, RangeError, UnsupportedError
from userfault.flags import Api, Feature, Ioctl, RegisterMode, RfcBit, names
from userfault.memory import check_memory
from userfault.negotiation import Agreement, Features, negotiate_on
from userfault.opening import open_userfaultfd
from userfault.procmaps import registered
from userfault.region import Region

if TYPE_CHECKING:
    import numpy.typing as npt
    from typing_extensions import Buffer

    from userfault.service import FaultService


_EVENT_SECONDS = 0.2


class Userfaultfd(Calls):
    """A userfaultfd of this process.

    Args:
        api: "auto", "v1", "v2" or "msg": the record format. "auto" is v2 on an RFC kernel, else msg.
        features: what to ask of msg: `Feature` flags, all of which the kernel must have; "all" for every
            reporting feature and event that it has (never SIGBUS or WP_ASYNC); or None for THREAD_ID,
            MOVE and POISON where it has them.

    Raises UnavailableError when no userfaultfd can be opened, UnsupportedError when the kernel lacks what
    was asked for (both say what there is), ValueError for an unknown api.

    Bound to the process that made it: in a fork child, close() and leaving a `with` block do nothing to
    the parent, and other calls raise ForkedError. Sources: userfaultfd(2), ioctl_userfaultfd(2).
    """

    _remote = False  # whether the memory is another process's

    def __init__(self, api: str = "auto", features: Features = None) -> None:
        fd, self.opened_by = open_userfaultfd()
        try:
            agreement, descriptor = negotiate_on(fd, api, features), Descriptor(fd)
        except BaseException:
            os.close(fd)
            raise
        self._begin(agreement, descriptor, RegionTable())

    def _begin(self, agreement: Agreement, descriptor: Descriptor, regions: RegionTable) -> None:
        self.agreement = agreement
        self._descriptor = descriptor
        self._regions = regions
        self._alive: weakref.WeakValueDictionary[int, Region] = weakref.WeakValueDictionary()
        self._buffers: dict[int, memoryview | None] = {}  # the caller's memory, until it is unregistered
        self._for_children: set[int] = set()  # regions that fork children get, whoever serves them
        self._special: dict[int, RegisterMode] = {}  # regions that report more than missing pages
        self._shared: set[int] = set()  # regions of shared memory, into which no page can be moved
        self._inherited: dict[int, list[tuple[int, int]]] = {}  # what fork children get back: start, length
        # Held by whoever changes any of this; never by the engine, which waits for nobody.
        self._lock = threading.RLock()
        self._engine: Engine | None = None
        self._service: FaultService | None = None

    @property
    def api(self) -> Api:
        """The record format agreed on."""
        return self.agreement.api

    @property
    def features(self) -> Feature | RfcBit:
        """The features agreed on; for v1 and v2 the bits that the kernel answered."""
        return self.agreement.features

    @property
    def ioctls(self) -> Ioctl:
        """The ioctls that UFFDIO_API answered."""
        return self.agreement.ioctls

    @property
    def regions(self) -> RegionTable:
        """The registered ranges: as the last event left them, when somebody reads those."""
        if self._engine is not None:
            self._engine.settle()
        return self._regions

    @property
    def closed(self) -> bool:
        return self._descriptor.closed

    def fileno(self) -> int:
        """The descriptor's number, for poll and select. Raises ClosedError or ForkedError."""
        return self._descriptor.check()

    # -- regions ---------------------------------------------------------------------------------

    def map(self, length: int, mode: RegisterMode = RegisterMode.MISSING, *, inherit: bool = False) -> Region:
        """Map `length` bytes of private anonymous memory, 2 MiB-aligned, and register it.

        A fork child does not get the memory (MADV_DONTFORK): it would read zeros where pages are missing.
        With `inherit` it does, where fork events are agreed on, and each fork() waits until its record is
        read: by an `EventReader` in another thread (`take_children`), or by a FaultService.

        Raises RangeError unless the length is whole pages; UnsupportedError for `inherit` without fork
        events; UffdError for want of memory or mappings.
        """
        mode = RegisterMode(mode)
        self._check_inherit(inherit)
        self._check_mode(mode)
        return self._map(length, mode, inherit)

    def _map(self, length: int, mode: RegisterMode, inherit: bool = False) -> Region:
        with self._ours():
            mapping = _mapping.Mapping(length)
            start, length = mapping.start, mapping.length
            number, ioctls = self._register(start, length, mode)
            try:
                mapping.attach(self._descriptor, self.regions, number)
            except BaseException:  # a signal handler may have closed it
                self.regions.remove(start, length)
                raise
            if inherit:
                self._share(number, [(start, length)])
            weakref.finalize(mapping, _forget, weakref.ref(self), number, start, length).atexit = False
            return self._region(number, start, length, mode, ioctls, mapping, True)

    def register(
        self,
        memory: int | Buffer | npt.NDArray[Any],
        length: int | None = None,
        mode: RegisterMode = RegisterMode.MISSING,
        *,
        inherit: bool = False,
    ) -> Region:
        """Register memory of one's own: an address and a length, or a writable buffer.

        It must be whole pages, and live until it is unregistered; a buffer is held until then. Fork children
        do not get it, except with `inherit` (as in `map`). After close() its missing pages fail closed.

        It is private anonymous memory, or shared memory: memfds, MAP_SHARED|MAP_ANONYMOUS, files of a tmpfs
        such as /dev/shm, shmget(2), in a shared or a private mapping. For that the features agreed on must
        have MISSING_SHMEM, MINOR_SHMEM or WP_HUGETLBFS_SHMEM, as the mode asks. A page of shared memory is
        missing when it is not in the page cache: what another mapping or write(2) put there raises no missing
        fault, but a minor one; and a touch through a mapping that is not registered leaves zeros there.
        `move` is refused (EINVAL), though `Region.ioctls` lists it.

        Raises RangeError (misaligned, empty, not mapped), OverlapError (registered here already),
        UnsupportedError (shared memory without the features, which it names; memory of hugetlbfs, of other
        files, of the heap or the stack; and as in `map`), SourceError (it is the memory of a Buffer source),
        TypeError for a read-only buffer, UffdError (EBUSY: registered elsewhere; EPERM: a shared
        mapping of what may not be written; EINVAL: minor faults of anonymous memory). Source:
        ioctl_userfaultfd(2).
        """
        mode = RegisterMode(mode)
        self._check_inherit(inherit)
        self._check_mode(mode)
        view = None
        if isinstance(memory, (int, np.integer)):
            if length is None:
                raise TypeError("an address needs a length")
            start = int(memory)
        else:
            if length is not None:
                raise TypeError("a buffer brings its own length")
            view = memoryview(cast(Any, memory))
            if view.readonly:
                raise TypeError("the buffer is read-only: its pages could not be filled")
            if not view.c_contiguous:
                raise RangeError("the buffer is not contiguous: register whole pages")
            flat = np.frombuffer(view, np.uint8)
            start, length = flat.ctypes.data, flat.nbytes
        length = _ioctl.check_range(start, length)
        with self._ours():
            features = Feature(self.features) if self.api == Api.MSG else Feature(0)
            shared, inherited = check_memory(start, length, mode, features)
            refuse_live_buffers(start, start + length)
            number, ioctls = self._register(start, length, mode, inherited)
            self._buffers[number] = view
            self._inherited[number] = inherited
            if shared:
                self._shared.add(number)
            if inherit:
                self._share(number, inherited)
            return self._region(number, start, length, mode, ioctls, view, False)

    def _check_inherit(self, inherit: bool) -> None:
        if inherit and Feature.EVENT_FORK not in self.agreement.events:
            raise UnsupportedError(
                errno.EOPNOTSUPP,
                "without fork events the children would read zeros: open with Feature.EVENT_FORK, or v2",
            )

    def _check_mode(self, mode: RegisterMode) -> None:
        if self._service is not None and mode != RegisterMode.MISSING:
            raise UnsupportedError(
                errno.EOPNOTSUPP, f"a service serves missing pages only, not {names(mode)}"
            )

    def _share(self, number: int, pieces: list[tuple[int, int]]) -> None:
        """Let fork children have the region."""
        if not self._for_children:
            sharing.append(weakref.ref(self, sharing.remove))
        self._for_children.add(number)
        for piece in pieces:
            _mapping.give_to_children(*piece)

    def _shares(self) -> bool:
        """Whether fork children get any region of this."""
        return not self._for_children.isdisjoint(self.regions.ranges()["id"].tolist())

    def _ours(self) -> threading.RLock:
        """The lock; a fork child, whose copy may be locked for ever, is refused before."""
        self._descriptor.check()
        return self._lock

    def _register(
        self,
        start: int,
        length: int,
        mode: RegisterMode,
        inherited: list[tuple[int, int]] | None = None,
    ) -> tuple[int, Ioctl]:
        """Of memory of the caller's own, `inherited` are the pieces that fork children get so far."""
        with self._descriptor as fd:
            # First into the table, so that no fault of it can come from an unknown address.
            number = self._add(start, length)
            kept = []
            try:
                if inherited is not None:
                    # What is another's already stays as it is, above all out of fork children.
                    if registered(start, start + length):
                        raise error_for("UFFDIO_REGISTER", errno.EBUSY)
                    # Before registering: a fork in between would make a child that reads zeros.
                    kept = inherited
                    _mapping.keep_from_children(start, length)
                ioctls = Ioctl(_ioctl.register(fd, start, length, mode))
            except BaseException:
                self.regions.remove(start, length)
                for piece in kept:
                    _mapping.give_to_children(*piece)
                raise
        if mode != RegisterMode.MISSING:
            self._special[number] = mode
        return number, ioctls

    def _add(self, start: int, length: int) -> int:
        deadline = time.monotonic() + _EVENT_SECONDS
        while True:
            try:
                return self.regions.add(start, length)
            except OverlapError:
                # Unmapped memory may have been given out again before its unmap event was read.
                if Feature.EVENT_UNMAP not in self.agreement.events or time.monotonic() > deadline:
                    raise
                time.sleep(_EVENT_SECONDS / 100)

    def _give_back(self, number: int, start: int, length: int) -> None:
        pieces = self._pieces(number, start, length)
        fd = self._descriptor.hold(even_closed=True)
        try:
            for first, size, _ in pieces:
                _ioctl.unregister(fd, first, size)
                # It wakes who waits for missing pages, not who sleeps in a minor or a write-protect fault.
                _ioctl.wake(fd, first, size)
        finally:
            self._descriptor.release()
        if self._engine is not None:
            self._engine.detach(number, start, length)
        for first, size, _ in pieces:
            self.regions.remove(first, size)
        self._buffers.pop(number, None)
        self._special.pop(number, None)
        self._shared.discard(number)
        self._descriptor.kick()

    def _region(self, number: int, *rest: Any) -> Region:
        region = Region(self, number, *rest)
        self._alive[number] = region
        return region

    def _unregister(self, region: Region) -> None:
        if os.getpid() != self._descriptor.pid:
            self._descriptor.check()
        with self._lock:
            children_pieces = self._children_pieces(region)
            self._give_back(region.id, region.start, region.length)
            if region._mapped:
                region._memory.detach()  # type: ignore[union-attr]
            else:
                for piece in children_pieces:
                    _mapping.give_to_children(*piece)
                self._inherited.pop(region.id)

    def _close_region(self, region: Region) -> None:
        if os.getpid() != self._descriptor.pid:
            return
        with self._lock:
            self._detach(region)
            region._release()

    def _detach(self, region: Region) -> None:
        """Serve it no more; and so fork children may not have it."""
        if self._engine is not None:
            if self._engine.hears_forks and region.id in self._engine.keep:
                for piece in self._children_pieces(region):
                    with contextlib.suppress(OSError):  # unmapped just now
                        _mapping.keep_from_children(*piece)
            self._engine.detach(region.id, region.start, region.length)

    # -- life cycle ------------------------------------------------------------------------------

    def close(self) -> None:
        """Close. Idempotent; in a fork child nothing but the child's copy of the descriptor is closed.

        An open FaultService is closed first. Mapped regions without views are unmapped. While views or
        registered memory remain, a keeper thread holds the descriptor and poisons each missing page that is
        touched, so that nothing waits for ever and nothing reads zeros. Readers wake with ClosedError.
        """
        if os.getpid() != self._descriptor.pid:
            self._descriptor.close()
            return
        with self._lock:
            if self.closed:
                return
            if self._service is not None:
                self._service.close()
            for region in list(self._alive.values()):
                region._release()
            engine = self._ensure_engine(as_keeper=True) if len(self.regions) else self._engine
            self._descriptor.close()
            if engine is None:
                return
            # A reader that was in read() may have taken faults that it can no longer resolve.
            while self._descriptor.reading():
                time.sleep(200e-6)
            if not engine.finished:
                engine.wake_all()
            engine.retire()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # At interpreter exit, what is served stays served until the process is gone.
        if hasattr(self, "_service") and not sys.is_finalizing():
            self.close()

    def _pieces(self, number: int, start: int, length: int) -> list[tuple[int, int, int]]:
        """Where a region, registered at [start, start + length), is now: (start, length, offset in it) of
        each of its pieces, in address order."""
        if not self.agreement.events & (Feature.EVENT_REMAP | Feature.EVENT_UNMAP):
            return [(start, length, 0)] if self.regions.lookup(start) == number else []
        ranges = self.regions.ranges()
        pieces = ranges[ranges["id"] == number]
        return list(zip(*(pieces[name].tolist() for name in ("start", "length", "offset")), strict=True))

    def _children_pieces(self, region: Region) -> list[tuple[int, int]]:
        """(start, length) of what fork children would have of the region, were it not registered."""
        ranges = self._inherited.get(region.id, [(region.start, region.length)])
        found = []
        for start, length, offset in self._pieces(region.id, region.start, region.length):
            for first, size in ranges:
                low = max(offset, first - region.start)
                high = min(offset + length, first - region.start + size)
                if low < high:
                    found.append((start - offset + low, high - low))
        return found

    def _ensure_engine(self, as_keeper: bool) -> Engine:
        engine = self._engine
        if engine is not None and engine.adopt():
            return engine
        is_msg = self.api == Api.MSG
        can_poison = is_msg and Feature.POISON in Feature(self.agreement.available)
        can_move = is_msg and Feature.MOVE in Feature(self.features)
        engine = Engine(self._descriptor, self.regions, self.api, can_poison, can_move, self.agreement.events)
        engine.start(as_keeper, self._buffers)
        self._engine = engine
        return engine

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Userfaultfd cannot be copied or pickled: it is bound to its process")


def _forget(userfaultfd: weakref.ref[Userfaultfd], number: int, start: int, length: int) -> None:
    """A mapping goes, and with it the engine's use of its source."""
    owner = userfaultfd()
    if owner is not None and owner._engine is not None and owner._descriptor.pid == os.getpid():
        owner._engine.detach(number, start, length)
        owner._special.pop(number, None)
