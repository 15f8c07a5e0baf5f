"""`FaultService`: an engine thread that serves a userfaultfd's regions, and what it has to report."""

from __future__ import annotations

import errno
import os
import sys
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from userfault._consts import PAGE_SIZE
from userfault._engine import STAGES
from userfault._source import Source
from userfault.errors import BusyError, ClosedError, ForkedError, RangeError, SourceError, UnsupportedError
from userfault.flags import Api, Feature, RegisterMode, names
from userfault.region import Region
from userfault.uffd import Userfaultfd

_EVENTS = Feature.EVENT_FORK | Feature.EVENT_REMAP | Feature.EVENT_REMOVE | Feature.EVENT_UNMAP


class Failure(NamedTuple):
    """A page that failed closed: its address, its region's id (-1: of none), the offset in it, and why."""

    address: int
    region: int
    offset: int
    errno: int
    why: str


class FaultService:
    """Serves the missing pages of a `Userfaultfd`'s regions while it is open.

    One thread reads, fills and resolves without the GIL, so that plain Python code may touch the memory.
    While it is open, and as long as registered memory remains, the descriptor's records are the engine's:
    `EventReader.read` raises BusyError.

    What no source serves fails closed: touching it raises SIGBUS (SIGSEGV before Linux 6.6). After close()
    that is every page that is still missing.

    Raises BusyError when another service is open on it, ClosedError, ForkedError, and UnsupportedError for
    features that it cannot follow yet (fork, remap, remove and unmap events; SIGBUS) and for regions
    that report more than missing pages.
    """

    def __init__(self, userfaultfd: Userfaultfd) -> None:
        userfaultfd.fileno()
        if userfaultfd._service is not None:
            raise BusyError("another FaultService is open on this userfaultfd")
        wrong = Feature(userfaultfd.features) & (_EVENTS | Feature.SIGBUS)
        if userfaultfd.api == Api.MSG and wrong:
            raise UnsupportedError(
                errno.EOPNOTSUPP, f"a FaultService does not follow {names(wrong)}: open without these"
            )
        for region in list(userfaultfd._alive.values()):
            if region.mode != RegisterMode.MISSING:
                raise UnsupportedError(
                    errno.EOPNOTSUPP, f"a FaultService serves missing pages only: unregister {region!r} first"
                )
        self._userfaultfd = userfaultfd
        self._engine = userfaultfd._ensure_engine(as_keeper=False)
        userfaultfd._service = self

    @property
    def closed(self) -> bool:
        return self._userfaultfd._service is not self

    def serve(self, region: Region, source: Source) -> None:
        """Fill the region's pages from the source, each when it is first touched.

        The source's last, partial page is filled up with zeros. Raises SourceError when the source has
        fewer pages than the region, or is no Source, or the region is served already; RangeError for
        another userfaultfd's region; ClosedError, ForkedError.
        """
        if os.getpid() != self._userfaultfd._descriptor.pid:
            raise ForkedError("this service belongs to another process; open one in the child")
        if self.closed:
            raise ClosedError("the service is closed")
        if not isinstance(source, Source):
            why = (
                "Python code would need the GIL, which the thread that touches the page may hold: "
                if (callable(source))
                else ""
            )
            raise SourceError(
                f"{type(source).__name__} is not a page source: {why}"
                "use userfault.sources.Zero, Buffer or File"
            )
        if region._userfaultfd is not self._userfaultfd or not region.registered:
            raise RangeError(f"{region!r} is not, or no longer, registered with this service's userfaultfd")
        if region.id in self._engine.keep:
            raise SourceError(f"{region!r} is served already")
        if source.nbytes <= region.length - PAGE_SIZE:
            raise SourceError(
                f"the source has {source.nbytes} bytes, the region {region.length}: "
                "map no more than the source fills"
            )
        self._engine.attach(region.id, region.start, region.length, source)

    def stats(self) -> np.void:
        """The counters so far: a scalar of this structured dtype.

        `reads` (system calls that returned records), `records`, `duplicates` (faults of a page that was in
        the batch already), `runs` (of neighbouring pages, filled together), `pages` and `bytes` (filled),
        `ioctls`, `existing` (pages somebody else had brought), `forgotten` (no longer registered),
        `parked` (to be retried), `failed` (closed), `unknown` (records that are not page faults), and
        `latency`, shape (496,) of `from_ns` and `count`: nanoseconds from read to resolved, eight buckets
        an octave.
        """
        return self._engine.stats()

    def failures(self) -> list[Failure]:
        """The last pages (up to 1,024) that failed closed, oldest first."""
        return [
            Failure(address, region, offset, error, _why(error, stage))
            for address, region, offset, error, stage in self._engine.failed().tolist()
        ]

    def unknown(self) -> npt.NDArray[np.void]:
        """The last records (up to 256) that were not page faults, as they came."""
        return self._engine.unknown()

    def close(self) -> None:
        """Stop serving. Idempotent; does nothing in a fork child.

        When it returns no source is in use. A keeper goes on while registered memory remains.
        """
        if self.closed or os.getpid() != self._userfaultfd._descriptor.pid:
            return
        self._userfaultfd._service = None
        self._engine.detach_all()
        self._engine.retire()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_engine") and not sys.is_finalizing():
            self.close()


def _why(error: int, stage: int) -> str:
    return STAGES[stage] + (f": {os.strerror(error)}" if error else "")


def latency_percentile(stats: Any, percent: float) -> float:
    """Nanoseconds within which `percent` % of the faults of `FaultService.stats()` were resolved.

    Exact to the bucket, an eighth of an octave; its upper end is returned. NaN when nothing was served.
    """
    if not 0 <= percent <= 100:
        raise ValueError(f"a percentage is between 0 and 100, not {percent}")
    latency = stats["latency"]
    reached = np.cumsum(latency["count"])
    if reached[-1] == 0:
        return float("nan")
    bucket = int(np.searchsorted(reached, max(1, np.ceil(reached[-1] * percent / 100))))
    return float(latency["from_ns"][min(bucket + 1, len(latency) - 1)])
