"""`Chunked`: any bytes of a Python source that is asked for whole chunks only; and the `Cache` in between."""

from __future__ import annotations

import contextlib
import errno
import gc
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator
from functools import partial
from operator import index
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from userfault._consts import PAGE_SIZE
from userfault.errors import SourceError

# What failed as a whole is asked for again page by page: 512 of them lie in the largest request.
FAILED_SECONDS = 0.5

# How long a source may take to let go of its buffer after the call.
KEPT_SECONDS = 0.5


class Sized(Protocol):
    """What knows its size in bytes, as ndarrays and memoryviews do."""

    @property
    def nbytes(self) -> int: ...


K = TypeVar("K", bound=Hashable)
T = TypeVar("T", bound=Sized)


class _Load(Generic[T]):
    """One load of a value: going on, done, or failed."""

    __slots__ = ("done", "error", "traceback", "until", "used", "value")

    value: T

    def __init__(self) -> None:
        self.done = threading.Event()
        self.error: BaseException | None = None
        self.traceback: TracebackType | None = None
        self.until = 0.0
        self.used = 0


class Cache(Generic[T]):
    """What was read lately, by key. It is loaded once, however many threads ask for it at the same time.

    A value whose bytes were all used is let go of at once: each page is asked for once, as a rule.
    Otherwise those that were not asked for the longest go first.

    Args:
        nbytes: bytes that it keeps at the most. A value that is larger reaches those who ask while it is
            loaded, and is not kept. Values that are being loaded are not counted.
    """

    def __init__(self, nbytes: int) -> None:
        self._limit = nbytes
        self._nbytes = 0
        self._lock = threading.Lock()
        self._loading: dict[Hashable, _Load[T]] = {}
        self._kept: OrderedDict[Hashable, _Load[T]] = OrderedDict()
        self._failed: OrderedDict[Hashable, _Load[T]] = OrderedDict()

    def first(self, keys: Iterable[K]) -> K | None:
        """The first that is kept, being loaded, or failed a moment ago: `get` would not load it."""
        with self._lock:
            self._forget_failures()
            return next((k for k in keys if k in self._loading or k in self._kept or k in self._failed), None)

    def get(self, key: Hashable, load: Callable[[], T], used: int) -> T:
        """The value, of which the caller uses so many bytes; `load` makes it where it is not there.

        What `load` raises reaches everybody who waits for it, and who asks within FAILED_SECONDS.
        """
        with self._lock:
            self._forget_failures()
            found = self._loading.get(key) or self._kept.get(key) or self._failed.get(key)
            entry = found or _Load()
            entry.used += used
            if found is None:
                self._loading[key] = entry
            elif key in self._kept:
                self._kept.move_to_end(key)
                if entry.used >= entry.value.nbytes:
                    self._let_go(key)
        try:
            if found is None:
                self._load(key, entry, load)
            entry.done.wait()
            if entry.error is not None:
                # One exception, raised by many: each starts from the traceback that it came with.
                raise entry.error.with_traceback(entry.traceback)
            return entry.value
        finally:
            del entry, found  # the exception refers to this frame: no cycle

    def drop(self, key: Hashable) -> None:
        """Forget the value. Who asks from now on does not get what is being loaded; who waits for it does."""
        with self._lock:
            self._loading.pop(key, None)
            self._failed.pop(key, None)
            if key in self._kept:
                self._let_go(key)

    def _forget_failures(self) -> None:
        while self._failed and next(iter(self._failed.values())).until <= time.monotonic():
            self._failed.popitem(last=False)

    def _load(self, key: Hashable, entry: _Load[T], load: Callable[[], T]) -> None:
        nbytes = 0
        try:
            entry.value = load()
            nbytes = entry.value.nbytes
        except BaseException as error:
            entry.error = error
            entry.traceback = error.__traceback__
        with self._lock:
            if self._loading.get(key) is entry:  # it was not dropped
                del self._loading[key]
                if entry.error is not None:
                    entry.until = time.monotonic() + FAILED_SECONDS
                    self._failed[key] = entry
                elif entry.used < nbytes <= self._limit:
                    self._kept[key] = entry
                    self._nbytes += nbytes
                    while self._nbytes > self._limit:
                        self._let_go(next(iter(self._kept)))
        entry.done.set()
        del entry  # as in get

    def _let_go(self, key: Hashable) -> None:
        self._nbytes -= self._kept.pop(key).value.nbytes


class _Gate:
    """Reads run together, a write runs alone. Neither starves: a write that waits holds the door."""

    def __init__(self) -> None:
        self._door = threading.Lock()
        self._left = threading.Condition()
        self._reads = 0

    @contextlib.contextmanager
    def read(self) -> Iterator[None]:
        with self._door, self._left:
            self._reads += 1
        try:
            yield
        finally:
            with self._left:
                self._reads -= 1
                self._left.notify()

    @contextlib.contextmanager
    def write(self) -> Iterator[None]:
        with self._door:
            with self._left:
                self._left.wait_for(lambda: self._reads == 0)
            yield


class Chunked:
    """Reads and writes of any bytes of a source, which itself is asked for whole chunks only.

    All methods may be called by several threads. The source's reads run together, its writes and flushes
    alone: many stores change a part of a chunk by reading and writing all of it.

    Args:
        source: has `read_into(offset, buffer)`, and may have `write_from(offset, buffer)` and `flush()`.
            What the first two return is None or the number of bytes, which must be all of the buffer's.
        nbytes: bytes of the source.
        chunk_bytes: reads begin at a multiple of it, and end at one or at the source's end.
        cache_bytes: bytes of chunks, of which only a part was asked for, that it keeps at the most.
            Beside these, each thread may be reading one.
        tally: told of each call of the source that did what it was asked: the bytes read and written.
    """

    def __init__(
        self,
        source: Any,
        nbytes: int,
        chunk_bytes: int,
        cache_bytes: int,
        tally: Callable[[int, int], object] | None = None,
    ) -> None:
        if chunk_bytes < 1:
            raise ValueError(f"chunk_bytes is at least 1, not {chunk_bytes}")
        self._source = source
        self._nbytes = nbytes
        # So many small ones at a time that a request has few of them.
        self._chunk_bytes = chunk_bytes * -(-PAGE_SIZE // chunk_bytes)
        self._cache: Cache[npt.NDArray[np.uint8]] = Cache(cache_bytes)
        self._gate = _Gate()
        self._tally = tally

    def read(self, offset: int, buffer: memoryview) -> None:
        """Fill the buffer with the source's bytes from `offset` on.

        Whole chunks that lie side by side are read by one call, into the buffer itself; others are read
        apart, and cached. Threads that read different bytes at the same time read each chunk once: if one
        reads all of it, no other reads any.

        Raises what the source raises; OSError (ENODATA) when it came up short; SourceError when it returns
        anything else, or keeps the buffer; ValueError for bytes outside the source.
        """
        end = self._end(offset, buffer)
        at = offset
        while at < end:
            stop = self._whole(at, end)
            if stop > at:
                self._read_into(at, buffer[at - offset : stop - offset])
            else:
                number, skipped = divmod(at, self._chunk_bytes)
                stop = min(self._stop(at), end)
                chunk = self._cache.get(number, partial(self._chunk, at - skipped), stop - at)
                buffer[at - offset : stop - offset] = chunk.data[skipped : skipped + stop - at]
            at = stop

    def write(self, offset: int, buffer: memoryview) -> None:
        """Have the source write the bytes from `offset` on, by one call; what is read afterwards has them.

        Raises what the source raises; OSError (EIO) when it wrote a part; SourceError and ValueError as
        `read` does.
        """
        end = self._end(offset, buffer)
        with self._gate.write():
            # Reads that follow wait at the gate; one that has left it may not have cached its chunk yet.
            for number in range(offset // self._chunk_bytes, -(-end // self._chunk_bytes)):
                self._cache.drop(number)
            self._call("write_from", offset, buffer.toreadonly(), errno.EIO)
        if self._tally:
            self._tally(0, end - offset)

    def flush(self) -> None:
        """Call the source's flush(), where it has one. Raises what that raises."""
        flush = getattr(self._source, "flush", None)
        if flush is not None:
            with self._gate.write():
                flush()

    def _end(self, offset: int, buffer: memoryview) -> int:
        end = offset + len(buffer)
        if not 0 <= offset <= end <= self._nbytes:
            raise ValueError(f"bytes {offset} to {end} are not within the source's {self._nbytes}")
        return end

    def _stop(self, at: int) -> int:
        """Where the chunk of this byte ends."""
        return min((at // self._chunk_bytes + 1) * self._chunk_bytes, self._nbytes)

    def _whole(self, at: int, end: int) -> int:
        """Up to where there are whole chunks that are not in the cache."""
        number, skipped = divmod(at, self._chunk_bytes)
        after = end // self._chunk_bytes if end < self._nbytes else -(-end // self._chunk_bytes)
        if skipped or number >= after:
            return at
        there = self._cache.first(range(number, after))
        return min((after if there is None else there) * self._chunk_bytes, self._nbytes)

    def _chunk(self, offset: int) -> npt.NDArray[np.uint8]:
        chunk = np.empty(self._stop(offset) - offset, np.uint8)
        self._read_into(offset, chunk.data)
        return chunk

    def _read_into(self, offset: int, lent: memoryview) -> None:
        with self._gate.read():
            self._call("read_into", offset, lent, errno.ENODATA)
        if self._tally:
            self._tally(len(lent), 0)

    def _call(self, method: str, offset: int, buffer: memoryview, if_short: int) -> None:
        """Let the source have the buffer for one call, and see that all of it was read or written."""
        name = f"{type(self._source).__name__}.{method}"
        asked = len(buffer)
        # All that is made from what it gets refers to this array: slices and arrays are no exports of a view.
        array = np.frombuffer(buffer, np.uint8)
        lent = array.data
        try:
            answer = getattr(self._source, method)(offset, lent)
        finally:
            with contextlib.suppress(BufferError):  # what exports it refers to the array too
                lent.release()
        kept = weakref.ref(array)
        del array, lent
        if kept() is not None and _stays(kept):
            raise SourceError(
                f"{name} keeps its buffer, or an array or a slice of it: the memory is used for others after "
                "the call; copy what is to stay"
            )
        if answer is None:
            return
        try:
            done = index(answer)
        except TypeError:
            done = -1
        if 0 <= done < asked:
            raise OSError(if_short, f"{name} came up short: {done} of {asked} bytes from {offset}")
        if done != asked:
            raise SourceError(f"{name} returned {answer!r} for {asked} bytes: return how many, or None")


def _stays(kept: weakref.ref[Any]) -> bool:
    """Whether it stays for KEPT_SECONDS."""
    ends = time.monotonic() + KEPT_SECONDS
    pause = 10e-6
    while kept() is not None and time.monotonic() < ends:
        time.sleep(pause)  # a thread of a pool lets go of its task a moment after that is done
        pause *= 2
        if pause > 1e-3:
            gc.collect()  # an exception that was caught may hold its frame, which holds the exception
    return kept() is not None
