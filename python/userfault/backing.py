"""`Backing`: the memory behind a lazy array and all its views, and what can be done to its pages."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
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
from userfault.negotiation import DEFAULT
from userfault.pager import Pager
from userfault.selection import Pages, merge, parts_of
from userfault.service import FaultService, Hold, Placement, Readahead, Serving
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
_services: dict[tuple[Serving, Placement], FaultService] = {}


def _start_anew() -> None:
    """In a fork child: the parent's services serve it nothing, and its lock may be held for ever."""
    global _lock
    _lock = threading.RLock()
    _services.clear()


os.register_at_fork(after_in_child=_start_anew)


def service_for(serving: Serving, placement: Placement) -> FaultService:
    """The service of this process's lazy arrays, one for each way; it stays until the process ends."""
    with _lock:
        service = _services.get((serving, placement))
        if service is None or service.closed or service._engines[0].error:
            workers = min(_MOST_WORKERS, len(os.sched_getaffinity(0)))
            service = _services[serving, placement] = _new_service(workers, serving, placement)
        return service


def _new_service(workers: int, serving: Serving, placement: Placement) -> FaultService:
    if serving == "inline":
        with Userfaultfd("msg") as has:
            usual = DEFAULT & Feature(has.agreement.available)
        return FaultService(Userfaultfd("msg", usual | Feature.SIGBUS), mode="inline")
    try:
        userfaultfd = Userfaultfd("msg")
    except UnsupportedError:
        userfaultfd = Userfaultfd()
    return FaultService(userfaultfd, workers, placement=placement)


class Backing:
    """A served mapping.

    Args:
        source, offset, nbytes: which bytes of the source it holds.
        mode, page_bytes, readahead, on_error, serving, placement: as for `lazy_array`.
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
        serving: Serving,
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
        self.serving = serving
        self.placement = placement
        self.name = name
        pager = source if isinstance(source, Pager) else None
        self._pager = pager if pager and pager._of_array else None
        self.patience = _PATIENCE_SECONDS if on_error == "retry" else 0.0
        # What waits for one pager must not hold up the pages of another.
        self.fillers = pager.workers if pager else 1
        service = _new_service(self.fillers, serving, placement) if pager else service_for(serving, placement)
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
            name.encode(errors="backslashreplace")[:_LONGEST_NAME],
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
            mapping,
            _end,
            service._engine_of(region),
            self._served,
            region.id,
            self.start,
            length,
            service if pager else None,
            self._pager,
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
        """Whether the kernel delivers no faults of system calls."""
        return self._service._userfaultfd.opened_by == "user-mode-only"

    @property
    def fails_system_calls(self) -> bool:
        """Whether system calls on missing pages fail with EFAULT."""
        return self.serving == "inline" or self.user_mode_only

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
            for _ in self._visits(engine, pages):
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
                    f"{self.name}: its source failed: {self._words(failed, pages)}; "
                    f"{missing * PAGE_SIZE} bytes are missing"
                )
            if refused and refused == self._served.write_error:
                raise self._not_written(refused)
            if limit is not None and refused not in (0, errno.EAGAIN, errno.ENOMEM, errno.ENOBUFS):
                raise LimitError(
                    f"{self.name}: its memory_limit of {limit} bytes is full of changes that could not be "
                    f"written back: {self.source.explain(refused)}"
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

    def _words(self, error: int, pages: Pages) -> str:
        """Why the source did not give the first of the pages that is missing."""
        for first, end in zip(*(bounds.tolist() for bounds in pages), strict=True):
            there = self._served.resident_of(first, end)
            if not there.all():
                at = self.offset - self.first_byte + (first + int(there.argmin())) * PAGE_SIZE
                return self.source.explain(error, at)
        return self.source.explain(error)

    def _visits(self, engine: Engine, pages: Pages) -> Iterator[None]:
        """Ask once for all that is missing of the pages, in as many threads as the source can use; comes up
        for air some 20 times a second."""
        if self.fillers == 1:
            yield from self._visit(engine, pages)
            return
        unit = self.page_bytes // PAGE_SIZE
        step = -(-_HUGE_PAGES // unit) * unit
        most = len(pages[0]) + int((pages[1] - pages[0]).sum()) // step
        parts = parts_of(pages, step)
        taking = threading.Lock()
        ending = False
        errors: list[BaseException] = []

        def ask() -> None:
            while not ending:
                with taking:
                    part = next(parts, None)
                if part is None:
                    return
                try:
                    for _ in self._visit(engine, part):
                        if ending:
                            return
                except BaseException as error:
                    errors.append(error)
                    return

        # Not a pool's threads, which would be waited for also by whoever interrupts this, or exits.
        asking = [threading.Thread(target=ask, daemon=True) for _ in range(min(self.fillers, most))]
        for thread in asking:
            thread.start()
        try:
            for thread in asking:
                while thread.is_alive():
                    thread.join(_STEP_SECONDS)
                    yield
        finally:
            ending = True
        if errors:
            raise errors[0]

    def _visit(self, engine: Engine, pages: Pages) -> Iterator[None]:
        firsts, ends = pages[0].copy(), pages[1]
        while len(firsts):
            done, page = engine.fill(self._served, firsts, ends, _STEP_SECONDS)
            firsts, ends = firsts[done:], ends[done:]
            if len(firsts):
                firsts[0] = page
            yield

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
            error, lost = _write_back(self._served, self._flushing, fsync)
            if error and lost:
                raise OSError(
                    error, f"{self.name}: {self.source.explain(error)}: what was written may be lost"
                )
            if error:
                raise self._not_written(error)

    def _not_written(self, error: int) -> OSError:
        return OSError(
            error,
            f"{self.name}: {self.source.explain(error)}: what could not be written back stays in memory",
        )

    def close(self) -> None:
        """Write back, and serve no more."""
        if self.closed or os.getpid() != self._pid:
            return
        self.flush(True)
        if self._pager is not None:
            self._pager.close()  # a worker may wait for it
        try:
            self._region.close()
        finally:
            self._end()
        if self._write is not None:
            self._write.detach()


def _write_back(
    served: Served, flushing: contextlib.AbstractContextManager[bool], fsync: bool
) -> tuple[int, bool]:
    """0 or errno, and whether that is of making durable what was written."""
    with flushing:
        error = _evict.flush(served)
        while not error and _evict.is_writing(served):
            # Evictions: should one fail, its pages are changed again.
            time.sleep(_POLL_SECONDS)
            error = _evict.flush(served)
        if error or not fsync:
            return error, False
        return _evict.sync(served), True


def _write_all(
    served: Served, flushing: contextlib.AbstractContextManager[bool], pid: int, name: str
) -> None:
    """The last view is gone, or the process exits."""
    if os.getpid() == pid:
        error, _ = _write_back(served, flushing, True)
        if error:
            with contextlib.suppress(Exception):
                why = served.source.explain(error)
                print(f"userfault: {name}: changes are lost: {why}", file=sys.stderr)


def _end(
    engine: Engine,
    served: Served,
    number: int,
    start: int,
    length: int,
    service: FaultService | None,
    pager: Pager | None,
) -> None:
    """Nobody can see the memory any more, or the array is closed; service and pager are its alone."""
    if engine.pid == os.getpid():
        if pager is not None:
            pager.close()  # a worker may wait for it
        engine.detach(number, start, length)
        served.leave_budget()
        if service is not None:
            service.close()
