"""`FaultService`: engine threads that serve a userfaultfd's regions, and what they have to report."""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Callable
from operator import index
from types import TracebackType
from typing import Any, Literal, NamedTuple, NoReturn, Self

import numpy as np
import numpy.typing as npt

from userfault import _mapping
from userfault._budget import Budget
from userfault._consts import PAGE_SIZE
from userfault._engine import PLACEMENTS, STAGES, Engine
from userfault._errno import error_for
from userfault._native import Native
from userfault._served import Served
from userfault._source import Source
from userfault.errors import BusyError, ClosedError, ForkedError, RangeError, SourceError, UnsupportedError
from userfault.flags import Api, Feature, names
from userfault.pager import Pager
from userfault.procmaps import first_present
from userfault.region import Region
from userfault.stats import total
from userfault.uffd import Userfaultfd

_HUGE = 2 << 20
_HUGE_IN_LIMIT = 16  # huge pages that a memory limit holds, at the least
_ADAPTIVE = -1
_MOST_SHARDS = 64
_POLL_SECONDS = 0.005
_RETRY_SECONDS = 0.1
_STALLED_SECONDS = 10.0

Placement = Literal["spin", "any", "pair"]
Serving = Literal["threads", "inline"]
SERVINGS = ("threads", "inline")
Readahead = int | Literal["adaptive"]


class Failure(NamedTuple):
    """A page that failed closed: its address, its region's id (-1: of none), the offset in it, and why."""

    address: int
    region: int
    offset: int
    errno: int
    why: str


class Hold(NamedTuple):
    """What a lazy array has beside a region: see `Served.hold_to`."""

    budget: Budget
    written: bool
    written_back: bool
    first_byte: int
    end_byte: int
    patience: float
    name: bytes

    @property
    def welcomes_huge_pages(self) -> bool:
        """A huge page comes by a move, which cannot protect it, and goes as a whole."""
        limit = self.budget.nbytes
        return not self.written and (limit is None or limit >= _HUGE_IN_LIMIT * _HUGE)


class FaultService:
    """Serves the missing pages of a `Userfaultfd`'s regions while it is open.

    Threads of its own read, fill and resolve without the GIL, so that plain Python code may touch the
    memory. While it is open, and as long as registered memory remains, the descriptor's records are the
    engine's: `EventReader.read` raises BusyError.

    What no source serves fails closed: touching it raises SIGBUS (SIGSEGV before Linux 6.6). After close()
    that is every page that is still missing.

    It follows the events that the userfaultfd hears. With fork events (Feature.EVENT_FORK, and always on v2)
    fork children get the regions that it serves, and are served themselves, as are theirs, until they exit;
    without, they do not have them (SIGSEGV). Remap: a region is served where it is now, and what it grew by
    reads as zeros. Remove: dropped pages are filled again. Unmap: it is trimmed or split.

    Args:
        userfaultfd: whose regions to serve.
        workers: threads for each descriptor, beside the one that reads, that fill from sources which may
            wait (a file outside the page cache, a native function) and help with reading ahead. One is
            started when it is first needed, several at once.
        shards: descriptors. A descriptor has one queue of faults and one thread that reads them, which is
            too little for many processors: `map` spreads regions over the shards, the userfaultfd being
            the first and the others the service's own, which end with it.
        placement: "spin": the reading thread waits awake for up to 200 µs while faults keep coming.
            "any": it never does. "pair": it shares a processor with the thread that keeps faulting,
            whose affinity it leases meanwhile: the fastest for one such thread (needs Feature.THREAD_ID).
        mode: "threads": as said above. "inline": each fault is served by the thread that took it, in the
            handler of SIGBUS, which saves two switches of threads: for a userfaultfd with Feature.SIGBUS and
            without events, and sources that are `signal_safe`. System calls on missing pages fail with EFAULT
            then: `materialize` what they use. docs/inline.md says what else to know. workers, shards and
            placement are of mode "threads".

    Raises BusyError when another service is open on it, ClosedError, ForkedError, and UnsupportedError for
    features that do not fit the mode, for regions that report more than missing pages, for "pair" without
    thread ids, for SIGBUS blocked in this thread (mode "inline"), and for the userfaultfd of a fork child,
    which its parent's service follows; ValueError for the other arguments.
    """

    def __init__(
        self,
        userfaultfd: Userfaultfd,
        workers: int = 1,
        *,
        shards: int = 1,
        placement: Placement = "spin",
        mode: Serving = "threads",
    ) -> None:
        if not isinstance(userfaultfd, Userfaultfd):
            raise TypeError(f"need a Userfaultfd, not {type(userfaultfd).__name__}")
        for name, value, most in (("workers", workers, 64), ("shards", shards, _MOST_SHARDS)):
            if not 1 <= index(value) <= most:
                raise ValueError(f"{name} is from 1 to {most}, not {value}")
        if placement not in PLACEMENTS:
            raise ValueError(f"placement is one of {', '.join(PLACEMENTS)}, not {placement!r}")
        if mode not in SERVINGS:
            raise ValueError(f"mode is one of {', '.join(SERVINGS)}, not {mode!r}")
        if mode == "inline" and (workers, shards, placement) != (1, 1, "spin"):
            raise ValueError('workers, shards and placement are of mode="threads": inline nobody else serves')
        self._mode = mode
        self._workers = workers
        self._placement = PLACEMENTS.index(placement)
        with userfaultfd._ours():
            if userfaultfd._service is not None:
                raise BusyError("another FaultService is open on this userfaultfd")
            _check_features(userfaultfd, placement, mode)
            features = Feature(userfaultfd.features) if userfaultfd.api == Api.MSG else None
            self._userfaultfd = userfaultfd
            self._shards = [userfaultfd]
            try:
                for _ in range(1, shards):
                    self._shards.append(Userfaultfd(userfaultfd.api, features))
                self._engines = [shard._ensure_engine(as_keeper=False) for shard in self._shards]
                for engine in self._engines:
                    engine.employ(workers if workers > 1 else 0, self._placement)
                    if mode == "inline":
                        engine.serve_inline()
            except BaseException:
                self._end(self._shards)
                raise
            for shard in self._shards:
                shard._service = self

    @property
    def closed(self) -> bool:
        return self._userfaultfd._service is not self

    @property
    def children(self) -> int:
        """How many fork children are followed; one that has exited counts for up to a second more."""
        for engine in self._engines:
            engine.settle()  # fork() returns when its record is read, and before it is heeded
        return sum(engine.children for engine in self._engines)

    def map(self, length: int) -> Region:
        """`Userfaultfd.map` on the shard with the fewest bytes. Without shards it is just that."""
        with self._userfaultfd._ours():
            if self.closed:
                raise ClosedError("the service is closed")
            if len(self._shards) == 1:
                return self._userfaultfd.map(length)
            sizes = [int(shard.regions.ranges()["length"].sum()) for shard in self._shards]
            return self._shards[int(np.argmin(sizes))].map(length)

    def serve(
        self,
        region: Region,
        source: Source,
        *,
        readahead: Readahead = "adaptive",
        page_bytes: int = PAGE_SIZE,
    ) -> None:
        """Fill the region's pages from the source, each when it is first touched.

        Args:
            readahead: pages to fill past each fault ahead of need; "adaptive": as many as a sequential
                stream of faults has come so far, up to 16 MiB, and none for random ones.
            page_bytes: what is filled together, a multiple of the page size, as it lies in the source
                (offset 0 of the region is its offset 0): a chunk, a record. From 2 MiB on the region is
                mapped huge where the kernel can (UFFDIO_MOVE, Linux 6.8).

        The source's last, partial page is filled up with zeros. Raises SourceError when the source has
        fewer pages than the region, or is no Source, or (mode "inline") not `signal_safe`, or the region is
        served already, or it is memory that has pages already, which would keep what they hold; RangeError
        for another userfaultfd's region; UnsupportedError (mode "inline") for SIGBUS blocked in this thread;
        ValueError for the other arguments; ClosedError, ForkedError; UffdError when the engine has failed.
        """
        self._engine_of(region)
        check_serving(source, readahead, page_bytes)
        self._attach(region, source, readahead, page_bytes)

    def _attach(
        self,
        region: Region,
        source: Source,
        readahead: Readahead,
        page_bytes: int,
        start: int = 0,
        hold: Hold | None = None,
    ) -> Served:
        """Serve the region from the source's byte `start` on."""
        engine = self._engine_of(region)
        if self._mode == "inline":
            check_signal_safe(source)
            engine.serve_inline()  # somebody may have taken SIGBUS since
        pages = region.length // PAGE_SIZE
        ahead = _ADAPTIVE if readahead == "adaptive" else min(index(readahead), pages)
        unit = min(page_bytes // PAGE_SIZE, pages)
        with region._userfaultfd._ours():
            if self.closed:
                raise ClosedError("the service is closed")
            if not region.registered:
                raise RangeError(f"{region!r} is no longer registered")
            if not region._mapped and (page := first_present(region.start, region.length)) is not None:
                raise SourceError(
                    f"{region!r} has a page at {page:#x} already, which would keep what it holds: "
                    "serve memory that was never touched"
                )
            huge = (
                engine.can_move
                and region.id not in region._userfaultfd._shared
                and (ahead == _ADAPTIVE or max(ahead, unit) * PAGE_SIZE >= _HUGE)
                and (hold is None or hold.welcomes_huge_pages)
                and _mapping.allow_huge_pages(region.start, region.length)
            )
            served = Served(source, region.id, pages, unit, ahead, huge, start)
            if hold is not None:
                served.hold_to(
                    hold.budget, region.start, region._userfaultfd.fileno(), engine.pagemap, *hold[1:]
                )
            if served.may_wait:
                engine.employ(self._workers, self._placement)
            engine.attach(region.start, region.length, served)
            if engine.hears_forks:
                for piece in region._userfaultfd._children_pieces(region):
                    _mapping.give_to_children(*piece)
            return served

    def materialize(
        self, region: Region, progress: Callable[[int, int], object] | None = None, *, wait: bool = True
    ) -> None:
        """Fill everything that is missing of the region, at the speed of a copy, without the GIL.

        Args:
            progress: called with the bytes that are there and the bytes of the region, every few ms.
            wait: until all is there; False leaves it to the engine, behind the faults.

        Raises SourceError when its source does not give a page (it stays missing, and fails closed when
        touched), UffdError when the kernel refuses for 10 s, ClosedError when
        the region or the service is closed, ForkedError. Pages that failed closed before stay so.
        """
        served = self._served(region)
        self._resync(region, served)
        served.take_errors()
        most, last, failed, refused = -1, time.monotonic(), 0, 0
        self._order(region)
        while wait:
            there = coming = total = 0
            for _, length, offset in self._pieces(region):
                pages, asked = served.count(offset // PAGE_SIZE, (offset + length) // PAGE_SIZE)
                there += pages * PAGE_SIZE
                coming += asked
                total += length
            if progress is not None:
                progress(there, total)
            if there == total:
                return
            errors = served.take_errors()
            failed, refused = errors[0] or failed, errors[1] or refused
            if there > most or coming:
                most, last = max(there, most), time.monotonic()
            elif failed:
                raise SourceError(
                    f"{region!r}: its source failed: {served.source.explain(failed)}; "
                    f"{total - there} bytes are missing"
                )
            waited = time.monotonic() - last
            if refused and waited > _STALLED_SECONDS:
                raise error_for("filling the region", refused)
            if waited > _RETRY_SECONDS:
                self._order(region)
            time.sleep(_POLL_SECONDS)
            if self._served(region) is not served:
                raise ClosedError(f"{region!r} was given up and is served anew")

    def resident(self, region: Region) -> npt.NDArray[np.bool_]:
        """Which pages of the region are there (or have failed closed): one bool a page.

        Asks the kernel, so that pages which madvise(MADV_DONTNEED) dropped are seen.
        """
        served = self._served(region)
        held = self._resync(region, served)
        return served.resident & held

    def stats(self, region: Region | None = None) -> np.void:
        """The counters so far: a structured scalar, of the service or of one region.

        Of the service: `reads` (system calls that returned records), `records`, `duplicates` (faults of a
        page that was in the batch already), `coming` (faults of a page that a worker was bringing), `runs`
        (of neighbouring pages, filled together), `pages` and `bytes` (filled), `ahead` (pages filled that
        no fault had asked for), `moved` (pages that came as part of a huge page), `ioctls`, `existing`
        (pages somebody else had brought), `forgotten` (no longer registered), `parked` (to be retried),
        `failed` (closed), `unprotected` (write-protect faults, which are let through), `unknown` (records
        that nobody knows), `handed` (runs that workers were asked for), `forks`, `remaps`, `removes` and
        `unmaps` (events, of fork children too), `errors` (shape (134,): how often the kernel answered that
        errno), and `latency`, shape (496,) of `from_ns` and `count`:
        nanoseconds from read to resolved, eight buckets an octave; without the faults of pages that were
        `coming`. A parked fault counts anew in `records` of its region each time it is tried.

        Of a region: what of these is its own, and `latency`, shape (48,): faults resolved in less than 2^i
        nanoseconds and not in less than 2^(i-1).
        """
        if region is not None:
            return self._served(region).stats()
        return total([engine.stats() for engine in self._engines])

    def failures(self) -> list[Failure]:
        """The last pages (up to 1,024 a shard) that failed closed, oldest first. Raises ForkedError."""
        self._check_process()
        return [
            Failure(address, region, offset, error, _why(error, stage))
            for engine in self._engines
            for address, region, offset, error, stage in engine.failed().tolist()
        ]

    def unknown(self) -> npt.NDArray[np.void]:
        """The last records (up to 256 a shard) that were neither faults nor known events, as they came."""
        return np.concatenate([engine.unknown() for engine in self._engines])

    def close(self) -> None:
        """Stop serving. Idempotent; does nothing in a fork child.

        When it returns no source is in use. A keeper goes on while registered memory remains; the service's
        own shards are closed.
        """
        if os.getpid() != self._userfaultfd._descriptor.pid:
            return
        with self._userfaultfd._lock:
            if not self.closed:
                # Last of all the mark: an interrupted close is completed by the next.
                self._end(self._shards)
                self._userfaultfd._service = None

    def _end(self, shards: list[Userfaultfd]) -> None:
        for shard in shards:
            if shard._engine is not None:
                for region in list(shard._alive.values()):
                    shard._detach(region)
                shard._engine.detach_all()
                shard._engine.retire()
        for shard in shards[1:]:
            shard._service = None
            shard.close()

    def _check_process(self) -> None:
        """In a fork child the engine's locks may be held by threads that are not there."""
        if os.getpid() != self._userfaultfd._descriptor.pid:
            raise ForkedError("the service belongs to the parent: make one of your own in the child")

    def _engine_of(self, region: Region) -> Engine:
        if not isinstance(region, Region):
            raise TypeError(f"need a Region, not {type(region).__name__}")
        for shard, engine in zip(self._shards, self._engines, strict=True):
            if region._userfaultfd is shard:
                return engine
        raise RangeError(f"{region!r} is not registered with this service's userfaultfd")

    def _served(self, region: Region) -> Served:
        self._check_process()
        served = self._engine_of(region).keep.get(region.id)
        if served is None:
            raise ClosedError(f"{region!r} is not served")
        return served

    def _order(self, region: Region) -> None:
        engine = self._engine_of(region)
        for start, length, _ in self._pieces(region):
            while not engine.order(start, length, region.id):
                time.sleep(_POLL_SECONDS)

    def _pieces(self, region: Region) -> list[tuple[int, int, int]]:
        """(start, length, offset) of what there is of the region, as far as it was when it was served."""
        pieces = region._userfaultfd._pieces(region.id, region.start, region.length)
        return [
            (start, min(length, region.length - offset), offset)
            for start, length, offset in pieces
            if offset < region.length
        ]

    def _resync(self, region: Region, served: Served) -> npt.NDArray[np.bool_]:
        """Ask the kernel which pages are there; which of them are still part of the region."""
        held = np.zeros(region.length // PAGE_SIZE, np.bool_)
        pagemap = self._engine_of(region).pagemap
        for start, length, offset in self._pieces(region):
            first, end = offset // PAGE_SIZE, (offset + length) // PAGE_SIZE
            served.resync(pagemap, start - offset, first, end)
            held[first:end] = True
        return held

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a FaultService cannot be copied or pickled: it is a running thread")

    def __del__(self) -> None:
        if hasattr(self, "_engines") and not sys.is_finalizing():
            self.close()


def check_serving(source: Any, readahead: Readahead, page_bytes: int) -> None:
    """Refuse what `FaultService.serve` says that it does."""
    if not isinstance(source, Source):
        why = ""
        if callable(source):
            why = "Python code needs the GIL, which the thread that touches the page may hold; "
        raise SourceError(
            f"{type(source).__name__} is not a page source: {why}"
            "use one of userfault.sources: Zero, Buffer, File, Native for a C function, Pager for Python"
        )
    if isinstance(source, Pager):
        source.check()
    if index(page_bytes) < 1 or page_bytes % PAGE_SIZE:
        raise ValueError(f"page_bytes is a multiple of {PAGE_SIZE}, not {page_bytes}")
    if readahead != "adaptive" and (isinstance(readahead, str) or index(readahead) < 0):
        raise ValueError(f'readahead is "adaptive" or a number of pages, not {readahead!r}')


def check_signal_safe(source: Source) -> None:
    """Refuse a source that cannot fill in a signal handler."""
    if not source.signal_safe:
        remedy = "serve it by threads"
        if isinstance(source, Native):
            remedy = (
                "if its function takes no lock and allocates nothing, say so: Native(…, signal_safe=True)"
            )
        raise SourceError(
            f"{source!r} cannot be served inline: it may wait for a lock that the thread which touches the "
            f"page holds; {remedy}"
        )


def _check_features(userfaultfd: Userfaultfd, placement: str, serving: str) -> None:
    """Raise UnsupportedError for what a service does not follow, or lacks."""
    features = Feature(userfaultfd.features) if userfaultfd.api == Api.MSG else Feature(0)
    if serving == "inline" and Feature.SIGBUS not in features:
        raise UnsupportedError(
            errno.EOPNOTSUPP,
            'mode="inline" needs Userfaultfd("msg", Feature.SIGBUS | …): each fault must raise SIGBUS',
        )
    if serving == "inline" and userfaultfd.agreement.events:
        raise UnsupportedError(
            errno.EOPNOTSUPP,
            f'mode="inline" follows no events: open without {names(userfaultfd.agreement.events)}',
        )
    if serving == "threads" and Feature.SIGBUS in features:
        raise UnsupportedError(
            errno.EOPNOTSUPP,
            'with Feature.SIGBUS no fault is ever reported: open without it, or use mode="inline"',
        )
    if placement == "pair" and Feature.THREAD_ID not in features:
        raise UnsupportedError(
            errno.EOPNOTSUPP,
            'placement="pair" must know which thread faults: open with api="msg" and Feature.THREAD_ID',
        )
    held = set(userfaultfd.regions.ranges()["id"].tolist())
    for number, mode in userfaultfd._special.items():
        if number in held:
            raise UnsupportedError(
                errno.EOPNOTSUPP,
                f"a service serves missing pages only: unregister region {number} ({names(mode)})",
            )


def _why(error: int, stage: int) -> str:
    return STAGES[stage] + (f": {os.strerror(error)}" if error else "")
