"""`Pager`: a page source in Python, in a process of its own."""

from __future__ import annotations

import fcntl
import importlib
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from operator import index
from typing import Any, Protocol, Self, TypedDict

from userfault._pager import Remote, memory_bytes
from userfault.errors import ForkedError, SourceError

_MOST_WORKERS = 64
_START = (
    "import json,os,sys;"
    "config=os.fdopen(int(sys.argv[2]),'rb');"
    "config.seek(0);"
    "about=json.loads(config.readline());"
    "sys.path[:]=about['path'];"
    "from userfault.paging import main;"
    "main(config,about,int(sys.argv[1]))"
)


class PythonSource(Protocol):
    """What `Pager` needs of a source; see there."""

    @property
    def nbytes(self) -> int: ...

    def read_into(self, offset: int, buffer: memoryview) -> int | None: ...


Recipe = tuple[bytes, str, int, int | None, int, int]


class PagerOptions(TypedDict, total=False):
    """The arguments of `Pager` beside the source."""

    workers: int
    chunk_bytes: int | None
    cache_bytes: int
    restarts: int


class Pager(Remote):
    """A page source that Python code fills, in a helper process: the pager.

    Python in this process cannot: it needs the GIL, which the thread that touches the page may hold. The
    pager is another Python, started anew and not forked, which is handed the pickled source. Threads of this
    process ask it for bytes and copy them into place; the pager itself has no access to this process's
    memory, but for the pages that bytes are handed over in.

    Args:
        source: an object with `nbytes` and `read_into(offset, buffer)`, which fills all of the buffer, a
            memoryview of bytes that is its own until it returns; returns None, or how many bytes it filled,
            of which fewer are an error. Or a function without arguments, which returns one. It is pickled: by
            cloudpickle where that is installed, else its class or function must be one that the pager can
            import, not one of a script or notebook.
        workers: how many requests are under way at the same time, each in a thread of the pager.
        chunk_bytes: it is asked for whole chunks of so many bytes, the last of which may be short, and
            for each of them once, however many of its pages are missing; by default what its attribute
            `chunk_bytes` says, or 64 KiB.
        cache_bytes: of chunks of which a part was asked for, that the pager keeps at the most; or as many
            chunks as there are workers, if that is more.
        restarts: a pager that dies is started anew, and asked again for what it owes. After so many starts in
            a row that gave no page, touching what is missing raises SIGBUS.

    With a method `write_from(offset, buffer)` it can be written to, in runs of pages, whatever the chunks;
    one at a time, while nothing is read. If that does not make the bytes durable, it has a method `flush()`.
    All its methods may be called by several threads. The pager holds no descriptors but standard output and
    error, and the standard input is empty; it ignores Control-C, and ends with this process, however that
    ends. It waits for the source as long as that takes, and a write waits for the reads under way: so a read
    that does not return holds up flush(), and in mode "r+" close() and the exit. Give a source time limits.

    Raises SourceError when the source cannot be made, in its own words, TypeError for what is no source,
    ValueError for the numbers, OSError.
    """

    def __init__(
        self,
        source: PythonSource | Callable[[], PythonSource],
        *,
        workers: int = 8,
        chunk_bytes: int | None = None,
        cache_bytes: int = 256 << 20,
        restarts: int = 5,
    ) -> None:
        if not is_python_source(source):
            raise TypeError(
                f"{type(source).__name__} is not a page source: it needs nbytes and "
                "read_into(offset, buffer), or to be a function that returns what has them"
            )
        self._start(_pickled(source), _name(source), workers, chunk_bytes, cache_bytes, restarts)

    def _start(
        self,
        pickled: bytes,
        name: str,
        workers: int,
        chunk_bytes: int | None,
        cache_bytes: int,
        restarts: int,
    ) -> None:
        if not 1 <= index(workers) <= _MOST_WORKERS:
            raise ValueError(f"workers is from 1 to {_MOST_WORKERS}, not {workers}")
        if chunk_bytes is not None and index(chunk_bytes) < 1:
            raise ValueError(f"chunk_bytes is at least 1, not {chunk_bytes}")
        if index(cache_bytes) < 0 or index(restarts) < 1:
            raise ValueError(f"cache_bytes is at least 0 and restarts 1, not {cache_bytes} and {restarts}")
        if not sys.executable:
            raise SourceError("sys.executable is not set: a pager needs a Python to run")
        self._recipe = (pickled, name, workers, chunk_bytes, cache_bytes, restarts)
        self._pid = os.getpid()
        self._of_array = False  # it was made for one array, and ends with that
        self.workers = workers
        about = {
            "path": [os.path.abspath(entry) for entry in sys.path],
            "parent": os.getpid(),
            "slots": workers,
            "chunk_bytes": chunk_bytes,
            "cache_bytes": cache_bytes,
        }
        memory = _memory("userfault pager", memory_bytes(workers))
        try:
            config = _memory("userfault pager's source", 0)
        except BaseException:
            os.close(memory)
            raise
        with os.fdopen(os.dup(config), "wb") as file:
            file.write(json.dumps(about).encode() + b"\n")
            file.write(pickled)
        command = [sys.executable, *subprocess._args_from_interpreter_flags(), "-u", "-P", "-c", _START]  # type: ignore[attr-defined]
        super().__init__(
            [*map(os.fsencode, command), b"%d" % memory, b"%d" % config],
            [b"%s=%s" % item for item in os.environb.items()],
            memory,
            config,
            workers,
            restarts,
        )

    def check(self) -> None:
        """Raise ForkedError in a fork child, SourceError when it answers no more."""
        if os.getpid() != self._pid:
            raise ForkedError("a fork child does not have the pager: make one of its own in the child")
        if self.closed:
            raise SourceError(f"{self!r} is closed, or was given up: make another")

    def __repr__(self) -> str:
        return f"Pager({self._recipe[1]})"

    def __reduce__(self) -> Any:
        return reopen, self._recipe

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def is_python_source(source: object) -> bool:
    """Whether a Pager can be made of it."""
    return (hasattr(source, "nbytes") and callable(getattr(source, "read_into", None))) or callable(source)


def reopen(pickled: bytes, name: str, *numbers: Any) -> Pager:
    """What a pickled Pager is made by."""
    pager = Pager.__new__(Pager)
    pager._start(pickled, name, *numbers)
    return pager


def _name(source: object) -> str:
    """For messages. The keywords of a partial may be credentials."""
    if isinstance(source, partial):
        return f"{getattr(source.func, '__name__', source.func)}({', '.join(map(repr, source.args))})"
    return repr(source)


def _pickled(source: object) -> bytes:
    try:
        pickler: Any = importlib.import_module("cloudpickle")
    except ModuleNotFoundError:
        pickler = pickle
    try:
        return bytes(pickler.dumps(source))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise SourceError(
            f"{source!r} cannot be pickled for its pager: {error}: pass a function that opens it there, "
            "such as functools.partial(Class, path)"
        ) from None


def _memory(name: str, nbytes: int) -> int:
    """A memfd; of so many bytes, which nobody can take away again: that would be a SIGBUS for the other."""
    lowest = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        # Not one of the standard ones, which may be closed here: the pager has its own under their numbers.
        number = fcntl.fcntl(lowest, fcntl.F_DUPFD_CLOEXEC, 3)
    finally:
        os.close(lowest)
    if nbytes:
        os.ftruncate(number, nbytes)
        fcntl.fcntl(number, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return number
