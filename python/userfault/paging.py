"""What runs in a pager: makes the source, and answers requests until the process that started it ends."""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import select
import signal
import threading
import traceback
from operator import index
from typing import Any, BinaryIO

from userfault._post import Post, end_with_parent
from userfault.chunks import Chunked

_CHUNK_BYTES = 64 << 10


def main(config: BinaryIO, about: dict[str, Any], memory: int) -> None:
    """`about` is the first line of the `config` that holds the pickled source; `memory` is what is shared."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    end_with_parent()
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:
        pass  # a standard one that was closed: what is printed must not end up in what is opened next
    os.close(number)
    try:
        parent = os.pidfd_open(about["parent"])
    except ProcessLookupError:
        return
    if os.getppid() != about["parent"]:
        return  # it has ended already
    pickled = config.read()
    config.close()
    for first, end in ((3, min(parent, memory)), (min(parent, memory) + 1, max(parent, memory))):
        os.closerange(first, end)
    os.closerange(max(parent, memory) + 1, os.sysconf("SC_OPEN_MAX"))
    post = Post(memory, about["slots"])
    os.close(memory)
    try:
        source = pickle.loads(pickled)
        if isinstance(source, type) or not hasattr(source, "read_into"):
            source = source()
        if not hasattr(source, "read_into") or not hasattr(source, "nbytes"):
            raise TypeError(f"{source!r} is not a page source: it needs nbytes and read_into(offset, buffer)")
        desk = _Desk(post, source, about["chunk_bytes"], about["cache_bytes"])
    except BaseException as error:
        post.failed(*_told(error))
        os._exit(1)  # not waiting for threads that it may have started
    for i in range(post.n_slots):
        threading.Thread(target=desk.answer_all, args=(i,), daemon=True).start()
    post.ready(desk.nbytes, desk.chunk_bytes, desk.writable, hasattr(source, "flush"))
    # The kernel kills us with the thread that started us; but not when we have changed our user since.
    ended = select.poll()
    ended.register(parent, select.POLLIN)
    ended.poll()
    os._exit(0)


class _Desk:
    """A source, and the slots that requests for it come in."""

    def __init__(self, post: Post, source: Any, chunk_bytes: int | None, cache_bytes: int) -> None:
        self.post = post
        self.nbytes = index(source.nbytes)
        self.chunk_bytes = chunk_bytes or int(getattr(source, "chunk_bytes", None) or _CHUNK_BYTES)
        if not 0 <= self.nbytes < 1 << 63 or not 1 <= self.chunk_bytes < 1 << 63:
            raise ValueError(f"it has nbytes={self.nbytes} and chunk_bytes={self.chunk_bytes}")
        self._shown = ""
        self.writable = hasattr(source, "write_from")
        # A chunk of which each worker was given a part must still be there when it comes for the next.
        cache_bytes = max(cache_bytes, post.n_slots * self.chunk_bytes)
        self.chunked = Chunked(source, self.nbytes, self.chunk_bytes, cache_bytes, post.tally)

    def answer_all(self, i: int) -> None:
        """Answer what is asked for in slot i, for ever."""
        data = self.post.data(i)
        while True:
            what, offset, length = self.post.wait(i)
            try:
                with data[:length] as buffer:
                    if what == "read":
                        self.chunked.read(offset, buffer)
                    elif what == "write":
                        self.chunked.write(offset, buffer.toreadonly())
                    else:
                        self.chunked.flush()
            except BaseException as error:
                with contextlib.suppress(Exception):  # stderr may be closed
                    self.show(error)
                self.post.answer(i, *_told(error))
            else:
                self.post.answer(i)

    def show(self, error: BaseException) -> None:
        """A traceback on stderr, unless the error says it all or was shown before it."""
        words = repr(error)
        if not isinstance(error, OSError) and words != self._shown:
            self._shown = words
            traceback.print_exception(error)


def _told(error: BaseException) -> tuple[int, str]:
    """The errno of an error, and its words."""
    try:
        words = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    except Exception:
        words = f"{type(error).__name__}, whose __str__ fails"
    if isinstance(error, AttributeError | ImportError) and "__main__" in words:
        words += (
            ": a pager cannot import what a script or notebook defines: put it in a module, or "
            "pip install 'userfault[pager]' (cloudpickle)"
        )
    number = error.errno if isinstance(error, OSError) else None
    return number if isinstance(number, int) and 0 < number < 4096 else errno.EIO, words
