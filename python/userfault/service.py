"""`FaultService`: an engine thread that serves a userfaultfd's regions, and what it has to report."""

from __future__ import annotations

import errno
import os
import sys
from types import TracebackType
from typing import Any, NamedTuple, NoReturn, Self

import numpy as np
import numpy.typing as npt

from userfault._engine import STAGES
from userfault._source import Source
from userfault.errors import BusyError, ClosedError, RangeError, SourceError, UnsupportedError
from userfault.flags import Api, Feature, names
from userfault.procmaps import first_present
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

    def __init__(self, userfaultfd: Userfaultfd, workers: int = 1) -> None:
        if not isinstance(userfaultfd, Userfaultfd):
            raise TypeError(f"need a Userfaultfd, not {type(userfaultfd).__name__}")
        if workers != 1:
            raise ValueError(f"this version has one engine thread, not workers={workers!r}")
        with userfaultfd._ours():
            if userfaultfd._service is not None:
                raise BusyError("another FaultService is open on this userfaultfd")
            wrong = Feature(userfaultfd.features) & (_EVENTS | Feature.SIGBUS)
            if userfaultfd.api == Api.MSG and wrong:
                raise UnsupportedError(
                    errno.EOPNOTSUPP, f"a FaultService does not follow {names(wrong)}: open without these"
                )
            held = set(userfaultfd.regions.ranges()["id"].tolist())
            for number, mode in userfaultfd._special.items():
                if number in held:
                    raise UnsupportedError(
                        errno.EOPNOTSUPP,
                        f"a service serves missing pages only: unregister region {number} ({names(mode)})",
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
        fewer pages than the region, or is no Source, or the region is served already, or it is memory that
        has pages already, which would keep what they hold; RangeError for another userfaultfd's region;
        ClosedError, ForkedError; UffdError when the engine has failed.
        """
        if not isinstance(region, Region):
            raise TypeError(f"need a Region, not {type(region).__name__}")
        if not isinstance(source, Source):
            why = ""
            if callable(source):
                why = "Python code needs the GIL, which the thread that touches the page may hold; "
            raise SourceError(
                f"{type(source).__name__} is not a page source: {why}"
                "use userfault.sources.Zero, Buffer or File"
            )
        if region._userfaultfd is not self._userfaultfd:
            raise RangeError(f"{region!r} is not registered with this service's userfaultfd")
        with self._userfaultfd._ours():
            if self.closed:
                raise ClosedError("the service is closed")
            if not region.registered:
                raise RangeError(f"{region!r} is no longer registered")
            if not region._mapped and (page := first_present(region.start, region.length)) is not None:
                raise SourceError(
                    f"{region!r} has a page at {page:#x} already, which would keep what it holds: "
                    "serve memory that was never touched"
                )
            self._engine.attach(region.id, region.start, region.length, source)

    def stats(self) -> np.void:
        """The counters so far: a scalar of this structured dtype.

        `reads` (system calls that returned records), `records`, `duplicates` (faults of a page that was in
        the batch already), `runs` (of neighbouring pages, filled together), `pages` and `bytes` (filled),
        `ioctls`, `existing` (pages somebody else had brought), `forgotten` (no longer registered),
        `parked` (to be retried), `failed` (closed), `unprotected` (write-protect faults, which are let
        through), `unknown` (records that are not page faults), and
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
        if os.getpid() != self._userfaultfd._descriptor.pid:
            return
        with self._userfaultfd._lock:
            if not self.closed:
                # Last of all the mark: an interrupted close is completed by the next.
                self._engine.detach_all()
                self._engine.retire()
                self._userfaultfd._service = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a FaultService cannot be copied or pickled: it is a running thread")

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
