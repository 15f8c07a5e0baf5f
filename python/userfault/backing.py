"""`Backing`: the memory behind a lazy array and all its views, and what can be done to its pages."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from userfault import _evict
from userfault._budget import Budget
from userfault._consts import PAGE_SIZE
from userfault._engine import Engine
from userfault._mapping import Mapping, ReadOnly
from userfault._served import Served
from userfault._source import Source
from userfault.errors import ClosedError, ForkedError, LimitError, SourceError, UffdError, UnsupportedError
from userfault.flags import Api, Feature, RegisterMode
from userfault.selection import Pages, merge
from userfault.service import FaultService, Hold, Placement, Readahead
from userfault.uffd import Userfaultfd

_STEP_SECONDS = 0.05
_POLL_SECONDS = 0.001
_PATIENCE_SECONDS = 30.0
_STALLED_SECONDS = 10.0
_MOST_WORKERS = 8
_LONGEST_NAME = 240
_HUGE_PAGES = 512

Progress = Callable[[int, int], object]

_lock = threading.RLock()  # a signal handler may open an array too
_services: dict[str, FaultService] = {}


def _start_anew() -> None:
    """In a fork child: the parent's services serve it nothing, and its lock may be held for ever."""
    global _lock
    _lock = threading.RLock()
    _services.clear()


os.register_at_fork(after_in_child=_start_anew)


def service_for(placement: Placement) -> FaultService:
    """The service of this process's lazy arrays, one for each placement; it stays until the process ends."""
    with _lock:
        service = _services.get(placement)
        if service is None or service.closed or service._engines[0].error:
            try:
                userfaultfd = Userfaultfd("msg")
            except UnsupportedError:
                userfaultfd = Userfaultfd()
            workers = min(_MOST_WORKERS, len(os.sched_getaffinity(0)))
            service = _services[placement] = FaultService(userfaultfd, workers, placement=placement)
        return service


class Backing:
    """A served mapping.

    Args:
        source, offset, nbytes: which bytes of the source it holds.
        mode, page_bytes, readahead, on_error, placement: as for `lazy_array`.
        budget: what it counts in.
        name: for messages.
    """

    def __init__(
        self,
        source: Source,
        offset: int,
        nbytes: int,
        *,
        mode: str,
        page_bytes: int,
        readahead: Readahead,
        budget: Budget | None,
        on_error: str,
        placement: Placement,
        name: str,
    ) -> None:
        self.source = source
        self.offset = offset
        self.nbytes = nbytes
        self.mode = mode
        self.page_bytes = page_bytes
        self.readahead = readahead
        self.budget = budget
        self.on_error = on_error
        self.placement = placement
        self.name = name
        self.patience = _PATIENCE_SECONDS if on_error == "retry" else 0.0
        service = service_for(placement)
        userfaultfd = service._userfaultfd
        tracked = mode != "r"
        if tracked and (
            userfaultfd.api != Api.MSG
            or Feature.PAGEFAULT_FLAG_WP not in Feature(userfaultfd.agreement.available)
        ):
            raise UnsupportedError(
                errno.EOPNOTSUPP,
                f"mode={mode!r} needs write-protect faults (Linux 5.7, api msg): this kernel has none",
            )
        if tracked and service._engines[0].pagemap < 0:
            raise UnsupportedError(errno.EOPNOTSUPP, f"mode={mode!r} needs /proc/self/pagemap: mount /proc")
        # What is filled together lies in the source as page_bytes counts.
        start = offset - offset % page_bytes
        self.first_byte = offset - start
        length = -(-(self.first_byte + max(nbytes, 1)) // PAGE_SIZE) * PAGE_SIZE
        watched = RegisterMode.MISSING | (RegisterMode.WP if tracked else RegisterMode(0))
        region = userfaultfd._map(length, watched)
        self.start = region.start
        self.n_pages = length // PAGE_SIZE
        hold = Hold(
            budget or Budget(None),
            tracked,
            mode == "r+",
            self.first_byte,
            self.first_byte + nbytes,
            self.patience,
            name.encode()[:_LONGEST_NAME],
        )
        self.huge = hold.welcomes_huge_pages
        self._served = service._attach(region, source, readahead, page_bytes, start, hold)
        self._region = region
        self._service = service
        self._pagemap = service._engine_of(region).pagemap
        self._pid = os.getpid()
        self._flushing = threading.RLock()  # a signal handler may flush too
        mapping: Any = region._memory
        # The last view's death ends it, whether it is one of ours or, say, a tensor's.
        self._end = weakref.finalize(
            mapping, _end, service._engine_of(region), self._served, region.id, self.start, length
        )
        self._end.atexit = False
        self._write: weakref.finalize[..., Any] | None = None
        if mode == "r+":
            # Called before that, and by a process that exits.
            self._write = weakref.finalize(mapping, _write_all, self._served, self._flushing, self._pid, name)

    @property
    def memory(self) -> Mapping | ReadOnly:
        """Its bytes, by the buffer protocol; whoever holds them holds the mapping."""
        mapping = self._region._memory
        assert isinstance(mapping, Mapping)
        return ReadOnly(mapping) if self.mode == "r" else mapping

    @property
    def closed(self) -> bool:
        return not self._end.alive

    @property
    def user_mode_only(self) -> bool:
        """Whether system calls on missing pages fail."""
        return self._service._userfaultfd.opened_by == "user-mode-only"

    def check(self) -> None:
        """Raise ForkedError in a fork child, ClosedError when it is closed."""
        if os.getpid() != self._pid:
            raise ForkedError("a fork child does not have the array: open one of its own in the child")
        if self.closed:
            raise ClosedError("the array is closed")

    def resident(self, first: int, end: int) -> npt.NDArray[np.bool_]:
        """Which of the pages [first, end) are there: asks the kernel."""
        self.check()
        self._served.resync(self._pagemap, self.start, first, end)
        return self._served.resident_of(first, end)

    def changed(self, first: int, end: int) -> npt.NDArray[np.bool_]:
        """Which of the pages [first, end) may differ from the source."""
        self.check()
        return self._served.changed_of(first, end)

    def stats(self) -> np.void:
        """The region's counters."""
        self.check()
        return self._served.stats()

    def fill(self, pages: Pages, progress: Progress | None = None) -> None:
        """Have what is missing of the pages. Raises SourceError, LimitError, UffdError, ClosedError."""
        self.check()
        pages = self._whole(pages, self.page_bytes // PAGE_SIZE)
        engine: Engine = self._service._engine_of(self._region)
        total = int((pages[1] - pages[0]).sum())
        limit = self.budget.nbytes if self.budget else None
        if limit is not None and total * PAGE_SIZE > limit:
            raise LimitError(f"{total * PAGE_SIZE} bytes do not fit in the memory_limit of {limit}")
        self._served.take_errors()
        started = last = time.monotonic()
        least = total + 1
        while True:
            firsts, ends = pages[0].copy(), pages[1]
            while len(firsts):
                done, page = engine.fill(self._served, firsts, ends, _STEP_SECONDS)
                firsts, ends = firsts[done:], ends[done:]
                if len(firsts):
                    firsts[0] = page
                if progress is not None:
                    there = total - self._served.missing(*pages)
                    progress(there * PAGE_SIZE, total * PAGE_SIZE)
            missing = self._served.missing(*pages)
            if missing == 0:
                return
            self.check()
            now = time.monotonic()
            if missing < least:
                least, last = missing, now
            failed, refused = self._served.take_errors()
            if failed and now - started >= self.patience:
                raise SourceError(
                    f"{self.name}: its source failed: {os.strerror(failed)}; "
                    f"{missing * PAGE_SIZE} bytes are missing"
                )
            if refused and refused == self._served.write_error:
                raise self._not_written(refused)
            if limit is not None and refused not in (0, errno.EAGAIN, errno.ENOMEM, errno.ENOBUFS):
                raise LimitError(
                    f"{self.name}: its memory_limit of {limit} bytes is full of changes that could not be "
                    f"written back: {os.strerror(refused)}"
                )
            if limit is not None and refused == errno.ENOBUFS:
                raise LimitError(
                    f"{self.name}: its memory_limit of {limit} bytes is full of changed pages that have "
                    "nowhere to go"
                )
            if now - last > _STALLED_SECONDS:
                if limit is not None:
                    raise LimitError(
                        f"{self.name}: what it shares the memory_limit of {limit} bytes with drives "
                        "out what is brought"
                    )
                raise UffdError(
                    refused or errno.EAGAIN, f"{self.name}: {missing * PAGE_SIZE} bytes could not be brought"
                )
            time.sleep(_POLL_SECONDS)

    def _whole(self, pages: Pages, unit: int) -> Pages:
        """The units of so many pages that they lie in."""
        firsts, ends = (bounds.astype(np.int64) for bounds in pages)
        return merge(firsts // unit * unit, np.minimum(-(-ends // unit) * unit, self.n_pages))

    def evict(self, pages: Pages) -> int:
        """Let go of the pages, and first write back what is changed of them; how many bytes."""
        self.check()
        firsts, ends = self._whole(pages, _HUGE_PAGES) if self.huge else pages
        n, error = _evict.evict(self._served, firsts, ends)
        if error:
            raise self._not_written(error)
        return n * PAGE_SIZE

    def flush(self, fsync: bool) -> None:
        """Write back what is changed."""
        self.check()
        if self.mode == "r+":
            error = _write_back(self._served, self._flushing, fsync)
            if error:
                raise self._not_written(error)

    def _not_written(self, error: int) -> OSError:
        return OSError(
            error, f"{self.name}: {os.strerror(error)}: what could not be written back stays in memory"
        )

    def close(self) -> None:
        """Write back, and serve no more."""
        if self.closed or os.getpid() != self._pid:
            return
        self.flush(True)
        try:
            self._region.close()
        finally:
            self._end()
        if self._write is not None:
            self._write.detach()


def _write_back(served: Served, flushing: contextlib.AbstractContextManager[bool], fsync: bool) -> int:
    """0 or errno."""
    with flushing:
        error = _evict.flush(served)
        while not error and _evict.is_writing(served):
            # Evictions: should one fail, its pages are changed again.
            time.sleep(_POLL_SECONDS)
            error = _evict.flush(served)
        return error or (_evict.sync(served) if fsync else 0)


def _write_all(
    served: Served, flushing: contextlib.AbstractContextManager[bool], pid: int, name: str
) -> None:
    """The last view is gone, or the process exits."""
    if os.getpid() == pid:
        error = _write_back(served, flushing, True)
        if error:
            with contextlib.suppress(Exception):
                print(f"userfault: {name}: changes are lost: {os.strerror(error)}", file=sys.stderr)


def _end(engine: Engine, served: Served, number: int, start: int, length: int) -> None:
    """Nobody can see the memory any more, or the array is closed."""
    if engine.pid == os.getpid():
        engine.detach(number, start, length)
        served.leave_budget()
