"""`lazy_array`: numpy arrays whose pages arrive from a source when they are touched."""

from __future__ import annotations

import errno
import math
import os
import warnings
from collections.abc import Callable
from operator import index
from types import TracebackType
from typing import Any, Literal, NoReturn, Self, SupportsIndex, Unpack, cast

import numpy as np
import numpy.typing as npt
from numpy.lib.array_utils import byte_bounds

from userfault._budget import Budget
from userfault._consts import PAGE_SIZE
from userfault._source import File, Source, Zero
from userfault.backing import Backing, Progress
from userfault.blocks import as_dask
from userfault.errors import ClosedError, SourceError, UnsupportedError
from userfault.pager import Pager, PagerOptions, PythonSource, Recipe, is_python_source, reopen
from userfault.selection import pages_of
from userfault.service import SERVINGS, Placement, Readahead, Serving, check_serving, check_signal_safe

Mode = Literal["r", "c", "r+"]
_MODES = ("r", "c", "r+")
_ON_ERROR = ("poison", "retry")
_UNITS_IN_LIMIT = 16
_HUGE = 2 << 20


class LazyArray(np.ndarray[Any, np.dtype[Any]]):
    """An ndarray whose pages arrive from a source when they are touched; made by `lazy_array`.

    Its views share its memory and have its methods, as those of numpy.memmap do. What is computed from it,
    copies and what an array of indices selects are ordinary arrays in memory. The memory lives as long as any
    view of it, in whichever library.
    """

    _backing: Backing | None = None
    __array_priority__ = -100.0  # what it is combined with decides what comes out

    def __new__(cls, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError("make a LazyArray with userfault.lazy_array(source, shape, dtype)")

    def __array_finalize__(self, obj: Any) -> None:
        backing = getattr(obj, "_backing", None)
        if backing is not None and (self.size == 0 or np.may_share_memory(self, obj)):
            self._backing = backing

    def __array_wrap__(self, array: Any, context: Any = None, return_scalar: bool = False) -> Any:
        array = super().__array_wrap__(array, context)
        if self is array or type(self) is not LazyArray:
            return array
        return array[()] if return_scalar else array.view(np.ndarray)

    def __getitem__(self, key: Any) -> Any:
        found = super().__getitem__(key)
        if type(found) is LazyArray and found._backing is None:
            return found.view(np.ndarray)
        return found

    def _lazy(self) -> Backing:
        if self._backing is None:
            raise ClosedError("this is an ordinary array in memory: it was copied from a lazy one")
        return self._backing

    def _span(self) -> tuple[int, int]:
        """The pages from its first element's to its last's."""
        low, high = byte_bounds(self)
        start = self._lazy().start
        first = (low - start) // PAGE_SIZE
        return first, -(-(high - start) // PAGE_SIZE) if self.nbytes else first

    @property
    def resident(self) -> npt.NDArray[np.bool_]:
        """Which pages are in memory: one bool for each page from the first element's to the last's.

        Raises ClosedError, ForkedError.
        """
        return self._lazy().resident(*self._span())

    @property
    def dirty(self) -> npt.NDArray[np.bool_]:
        """Which pages were changed since they came or were written back: one bool a page, as in `resident`.

        Raises ClosedError, ForkedError.
        """
        return self._lazy().changed(*self._span())

    @property
    def mode(self) -> str:
        """ "r", "c" or "r+"."""
        return self._lazy().mode

    @property
    def closed(self) -> bool:
        """Whether the array was closed."""
        return self._lazy().closed

    def stats(self) -> np.void:
        """What was counted so far, for the whole array: `FaultService.stats` of a region, and `changed`
        (first writes to a page), `written` (pages written back) and `evicted` (pages let go of)."""
        return self._lazy().stats()

    def prefetch(self, key: Any = ..., progress: Progress | bool = False) -> None:
        """Bring the pages of the elements self[key], in this thread and without the GIL.

        Args:
            key: what may stand between brackets: slices, integers, arrays of them, masks, tuples of these.
            progress: called with the bytes that are there and those that were asked for, some 20 times a
                second; True: a progress bar on stderr (needs the extra `cli`).

        Raises SourceError when the source fails (what it did not give stays missing), LimitError for more
        than the memory limit, IndexError, ClosedError, ForkedError.
        """
        backing = self._lazy()
        pages = pages_of(self, backing.start, key)
        if progress is True:
            with _bar(backing.name) as show:
                backing.fill(pages, show)
        else:
            backing.fill(pages, progress or None)

    def materialize(self, progress: Progress | bool = False) -> None:
        """Bring everything that is missing of it: `prefetch` of all its elements."""
        self.prefetch(..., progress)

    def evict(self, key: Any = ...) -> int:
        """Let go of the pages of the elements self[key], which come again when touched; how many bytes.

        Whole pages go (where it may be mapped huge, whole huge pages), also those that others share. Changed
        pages are written back first in mode "r+", and stay in mode "c". Raises OSError when the source
        cannot be written to (those pages stay), IndexError, ClosedError, ForkedError.
        """
        backing = self._lazy()
        return backing.evict(pages_of(self, backing.start, key))

    def flush(self, fsync: bool = True) -> None:
        """In mode "r+" write back all changes of the whole array, durably unless `fsync` is False.

        What is written to while it runs is written back now or by the next. Raises OSError when the source
        cannot be written to: those pages stay changed. ClosedError, ForkedError.
        """
        self._lazy().flush(fsync)

    def to_dask(self, chunks: Any = "auto") -> Any:
        """A dask array over this one, of which nothing is brought before it is computed.

        A block's bytes come when its task runs; in threads they are this array's own memory. A task in
        another process opens the array anew: what that needs, and when it is refused, is as for pickle.
        `chunks`: as for dask.array.from_array. Raises ModuleNotFoundError without dask, ClosedError,
        ForkedError.
        """
        return as_dask(self, chunks)

    def close(self) -> None:
        """Write changes back (mode "r+"), and serve the array and all its views no more.

        Idempotent. The memory goes with the last view. Until then what is missing of it raises SIGBUS when
        touched, and what is changed is lost. Does nothing in a fork child. Raises OSError as `flush`: then
        it is not closed.
        """
        self._lazy().close()

    def tofile(self, fid: Any, sep: str = "", format: str = "%s") -> None:
        """ndarray.tofile. Raises UnsupportedError when it would fail with EFAULT: see `lazy_array`."""
        backing = self._backing
        if backing is not None and backing.fails_system_calls and not self.resident.all():
            why = 'with serving="inline"' if backing.serving == "inline" else "here"
            raise UnsupportedError(
                errno.EFAULT, f"system calls cannot read missing pages {why}: materialize() the array first"
            )
        super().tofile(fid, sep, format)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        backing = self._backing
        if backing is None:
            return repr(self.view(np.ndarray))
        closed = ", closed" if backing.closed else ""
        kind = f"shape={self.shape} dtype={self.dtype} mode={backing.mode!r}"
        return f"<LazyArray {kind} of {backing.source!r}{closed}>"

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        """A recipe for opening it anew: what is changed in mode "r+" is written back, in mode "c" refused."""
        backing = self._backing
        if backing is None:
            return super().__reduce_ex__(protocol)
        backing.flush(True)
        if backing.mode == "c" and backing.changed(0, backing.n_pages).any():
            raise TypeError("the array has changes that are this process's own: pickle numpy.array(a)")
        how = {
            "mode": backing.mode,
            "page_bytes": backing.page_bytes,
            "readahead": backing.readahead,
            "memory_limit": backing.budget.nbytes if backing.budget else None,
            "on_error": backing.on_error,
            "serving": backing.serving,
            "placement": backing.placement,
        }
        at = self.__array_interface__["data"][0] - backing.start - backing.first_byte
        place = (backing.offset, backing.nbytes, at, self.shape, self.strides, self.dtype)
        source = backing.source
        # A pager of its own, also beside other arrays of the same one: it ends with the array.
        return _reopen, (source._recipe if isinstance(source, Pager) else source, *place, how)


def lazy_array(
    source: Source | PythonSource | Callable[[], PythonSource] | str | os.PathLike[str],
    shape: SupportsIndex | tuple[SupportsIndex, ...] | None = None,
    dtype: npt.DTypeLike = np.uint8,
    order: Literal["C", "F"] = "C",
    *,
    mode: Mode = "r",
    offset: int = 0,
    page_bytes: int | None = None,
    readahead: Readahead = "adaptive",
    memory_limit: int | Budget | None = None,
    on_error: Literal["poison", "retry"] = "poison",
    serving: Serving = "threads",
    placement: Placement = "spin",
    **pager: Unpack[PagerOptions],
) -> LazyArray:
    """An ndarray whose pages arrive from a source when they are touched.

    Args:
        source: one of `userfault.sources`; or a path: `File(path)`, writable for mode "r+"; or what `Pager`
            takes, an object with `nbytes` and `read_into` or a function that returns one: its Pager, which
            `pager` are the arguments of, ends with the array.
        shape, dtype, order, offset: which bytes of the source it is, as for numpy.memmap; without a shape it
            has one dimension and all that the source has from `offset` on.
        mode: "r": read-only. "c": changes are private to this process and lost with the array. "r+": changes
            are written back by `flush`, by eviction, by `close` and by the last view's end (also at the exit
            of the interpreter, not at os._exit or a crash).
        page_bytes, readahead: as for `FaultService.serve`; page_bytes count from the source's first byte.
            Where a part of a unit is there already, only the rest is asked for. By default one page, or what
            fits the chunks of a Pager.
        memory_limit: how many bytes of it may be in memory (1 MiB and 16 times page_bytes at the least), or a
            `Budget` that it shares with others. Beyond it the oldest pages go, but for those that come back
            again and again.
        on_error: what happens to a page that the source does not give: "poison": touching it raises SIGBUS,
            and one line on stderr says why. "retry": it is asked for again for 30 s, and poisoned then.
        serving, placement: as `mode` and `placement` of `FaultService`. "inline": the thread that touches a
            page brings it, which is the fastest for a few elements here and there. Then system calls on
            missing pages fail with EFAULT ("Bad address"): `prefetch` what they read, and do not have them
            write into the array. A Budget is for arrays of one serving. See docs/inline.md.

    Where only user-mode faults are delivered (see `userfault doctor`), system calls on missing pages fail
    with EFAULT ("Bad address"), which a RuntimeWarning says: `prefetch` what they read.

    A fork child does not have the array: touching it raises SIGSEGV there. Raises ValueError for the
    arguments, SourceError for a source that is too short or cannot be written to, UnsupportedError when the
    kernel has no write-protect faults for "c" and "r+", UnavailableError without a userfaultfd, OSError for
    the path.
    """
    if mode not in _MODES:
        raise ValueError(f"mode is one of {', '.join(_MODES)}, not {mode!r}")
    if on_error not in _ON_ERROR:
        raise ValueError(f"on_error is one of {', '.join(_ON_ERROR)}, not {on_error!r}")
    if serving not in SERVINGS:
        raise ValueError(f"serving is one of {', '.join(SERVINGS)}, not {serving!r}")
    if serving == "inline" and placement != "spin":
        raise ValueError('placement is for serving="threads": inline nobody else serves')
    if order not in ("C", "F"):
        raise ValueError(f'order is "C" or "F", not {order!r}')
    dtype = np.dtype(dtype)
    if dtype.hasobject:
        raise ValueError(f"{dtype} holds Python objects, not bytes")
    if memory_limit is not None and not isinstance(memory_limit, Budget):
        memory_limit = Budget(memory_limit)
    limit = memory_limit.nbytes if memory_limit else None
    if isinstance(source, (str, os.PathLike)):
        source = File(source, writable=mode == "r+")
    elif not isinstance(source, Source) and is_python_source(source):
        source = Pager(source, **pager)
        source._of_array = True
    elif pager:
        raise TypeError(f"{', '.join(pager)}: for sources in Python only, not {source!r}")
    if page_bytes is None:
        page_bytes = _page_bytes(source, limit)
    check_serving(source, readahead, page_bytes)
    assert isinstance(source, Source)
    if serving == "inline":
        check_signal_safe(source)
    if memory_limit is not None and memory_limit.serving not in (None, serving):
        # Who makes room writes back what others have changed, by their sources.
        raise ValueError(f"the memory_limit is of arrays served by mode {memory_limit.serving!r}")
    if not 0 <= index(offset) <= source.nbytes:
        raise ValueError(f"offset {offset} is outside {source!r} of {source.nbytes} bytes")
    shape = _shape(source, shape, dtype, offset)
    nbytes = math.prod(shape) * dtype.itemsize
    if mode == "r+" and nbytes and not source.writable:
        remedy = "File(path, writable=True)" if isinstance(source, File) else "one that has a write function"
        raise SourceError(f'{source!r} cannot be written to: mode="r+" needs {remedy}')
    if nbytes > source.nbytes - offset:
        raise SourceError(
            f"{source!r} has {source.nbytes - offset} bytes from {offset} on; "
            f"shape {shape} of {dtype} needs {nbytes}"
        )
    if limit is not None and limit < _UNITS_IN_LIMIT * page_bytes:
        raise ValueError(
            f"the memory_limit of {limit} is less than {_UNITS_IN_LIMIT} times page_bytes: {page_bytes}"
        )
    if memory_limit is not None:
        memory_limit.serving = serving
    if nbytes == 0:
        source, offset = Zero(), 0  # one page that nobody can see
    name = f"lazy array {dtype} {shape} of {source!r}"
    backing = Backing(
        source,
        offset,
        nbytes,
        mode=mode,
        page_bytes=page_bytes,
        readahead=readahead,
        budget=memory_limit,
        on_error=on_error,
        serving=serving,
        placement=placement,
        name=name,
    )
    if backing.user_mode_only and serving == "threads":
        warnings.warn(
            "system calls on missing pages fail with EFAULT here: prefetch() or materialize() what they "
            "read, or give access to /dev/userfaultfd",
            RuntimeWarning,
            stacklevel=2,
        )
    return _array(backing, shape, dtype, offset=backing.first_byte, order=order)


def _page_bytes(source: object, limit: int | None) -> int:
    """The default: what a source of chunks is best asked for at once."""
    if not isinstance(source, Pager):
        return PAGE_SIZE
    most = source.chunk_bytes if limit is None else min(source.chunk_bytes, limit // _UNITS_IN_LIMIT)
    if most == source.chunk_bytes and most % PAGE_SIZE == 0:
        return most
    # Pages lie in two chunks: the less is asked for, the less often the other chunk is needed too.
    most = min(most // 4, _HUGE) if source.chunk_bytes % PAGE_SIZE else most
    return max(PAGE_SIZE, 1 << (most.bit_length() - 1)) if most else PAGE_SIZE


def _shape(
    source: Source, shape: SupportsIndex | tuple[SupportsIndex, ...] | None, dtype: np.dtype[Any], offset: int
) -> tuple[int, ...]:
    if shape is None:
        left = source.nbytes - offset
        if dtype.itemsize == 0 or left % dtype.itemsize or left > np.iinfo(np.intp).max:
            raise ValueError(f"{left} bytes of {source!r} are no whole number of {dtype}: give a shape")
        return (left // dtype.itemsize,)
    sizes = tuple(map(index, shape if isinstance(shape, tuple | list) else (shape,)))
    if any(size < 0 for size in sizes):
        raise ValueError(f"negative dimensions are not allowed: {sizes}")
    return sizes


def _array(backing: Backing, shape: tuple[int, ...], dtype: np.dtype[Any], **layout: Any) -> LazyArray:
    array: LazyArray = np.ndarray.__new__(
        cast(Any, LazyArray), shape, dtype, cast(Any, backing.memory), **layout
    )
    array._backing = backing
    return array


def _reopen(
    source: Source | Recipe,
    offset: int,
    nbytes: int,
    at: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    dtype: np.dtype[Any],
    how: dict[str, Any],
) -> LazyArray:
    """What a pickled LazyArray is made by."""
    if isinstance(source, tuple):
        source = reopen(*source)
        source._of_array = True
    whole = lazy_array(source, nbytes, np.uint8, offset=offset, **how)
    backing = whole._lazy()
    return _array(backing, shape, dtype, offset=backing.first_byte + at, strides=strides)


class _bar:
    """A progress bar on stderr."""

    def __init__(self, name: str) -> None:
        try:
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
        except ModuleNotFoundError:
            raise ModuleNotFoundError("progress=True needs rich: pip install 'userfault[cli]'") from None
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=Console(stderr=True))
        self._task = self._progress.add_task(name, total=None)

    def __enter__(self) -> Progress:
        self._progress.start()
        return lambda there, total: self._progress.update(self._task, completed=there, total=total)

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
