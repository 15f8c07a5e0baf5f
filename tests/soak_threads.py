"""For soak.py: the threads that use the memory, and all that they do."""

from __future__ import annotations

import collections
import contextlib
import errno
import gc
import os
import random
import select
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

import userfault as uf
from soak_memory import (
    BROKEN_GOOD,
    BROKEN_PAGES,
    HELD,
    LIBC,
    MADV_COLLAPSE,
    MADV_DONTNEED,
    MADV_HUGEPAGE,
    MADV_NOHUGEPAGE,
    MREMAP_DONTUNMAP,
    PAGE,
    PROT_NONE,
    PROT_READ,
    PROT_WRITE,
    Made,
    Piece,
    as_array,
    call,
    move_memory,
    new_memory,
)

if TYPE_CHECKING:
    from soak import Soak

MOST_PIECES = 16
CHILD_SECONDS = 20


class WrongError(Exception):
    """What must not happen."""


class Thread(threading.Thread):
    """One of those who use the memory, for one round."""

    def __init__(self, soak: Soak, number: int) -> None:
        super().__init__(daemon=True)
        self.soak, self.number = soak, number
        self.choose = random.Random(f"{soak.options.seed} {soak.rounds} {number}")
        self.number_of_ops = 0
        self.done: collections.Counter[str] = collections.Counter()
        self.bytes_checked = 0

    def run(self) -> None:
        self.pipe = os.pipe()
        on_piece = (self.touch, self.look, self.compare, self.compare_held, self.write_out, self.drop)
        on_piece += (self.copy, self.rare, self.change, self.change, self.read_in, self.materialize)
        try:
            while not self.soak.stopping:
                self.number_of_ops += 1
                n = self.choose.random()
                if n < 0.03 or len(self.soak.pieces) < 3:
                    self.do(self.new)
                elif n < 0.055:
                    self.do(self.remove)
                elif n < 0.08:
                    self.do(self.lose)
                elif n < 0.082:
                    self.do(self.fork)
                elif n < 0.085:
                    self.do(self.soak.materials.chill)
                else:
                    with self.borrowed() as piece:
                        self.do(self.choose.choice(on_piece), piece)
        except BaseException:
            self.soak.failure = self.soak.failure or f"thread {self.number}: {traceback.format_exc()}"
        finally:
            for fd in self.pipe:
                os.close(fd)

    def do(self, operation: Callable[..., None], *arguments: Any) -> None:
        self.done[operation.__name__] += 1
        self.note(operation.__name__, *arguments)
        operation(*arguments)

    def note(self, *what: object) -> None:
        self.soak.log.note(self.number, self.number_of_ops, " ".join(map(str, what)))

    @contextlib.contextmanager
    def borrowed(self) -> Iterator[Piece]:
        """A piece that nobody takes away meanwhile."""
        with self.soak.lock:
            piece = self.choose.choice(self.soak.pieces)
            piece.users += 1
        try:
            yield piece
        finally:
            with self.soak.lock:
                piece.users -= 1

    def span(self, piece: Piece, most: int = 2048) -> tuple[int, int]:
        """Some pages [first, end) where this thread may do what it likes; none where it has none."""
        low, high = piece.pages_of(self.number)
        length = min(high - low, self.choose.choice((1, 1, 2, 5, 16, 64, 512, most)), most)
        first = self.choose.randint(low, high - length)
        return first, first + length

    # -- looking -------------------------------------------------------------------------------------

    def same(self, piece: Piece, first: int, end: int, why: str, got: np.ndarray | None = None) -> None:
        """Compare the pages (or `got`) with what they must hold."""
        want = piece.now[first * PAGE : end * PAGE]
        if got is None:
            got = piece.array[first * PAGE : end * PAGE]
        self.bytes_checked += len(want)
        if np.array_equal(got, want):
            return
        wrong = np.flatnonzero(got != want)
        at = int(wrong[0])
        pages = np.unique(first + wrong // PAGE)
        page = got[at // PAGE * PAGE :][:PAGE]
        raise WrongError(
            f"{piece}, pages {first} to {end}, {why}: {len(wrong)} bytes are wrong in {len(pages)} pages, "
            f"{pages[:20].tolist()}; the first at {at % PAGE:#x} of its page: {got[at : at + 8].tolist()}, "
            f"not {want[at : at + 8].tolist()}; {np.count_nonzero(page)} bytes of this page are not zero"
        )

    def touch(self, piece: Piece) -> None:
        """Single bytes here and there, without the GIL."""
        first, end = self.span(piece)
        n = min(end - first, self.choose.choice((1, 8, 64)))
        pages = np.array(self.choose.sample(range(first, end), n), np.uint64)
        offsets = pages * np.uint64(PAGE) + np.uint64(self.choose.randrange(PAGE))
        self.bytes_checked += n
        if uf.touch(piece.array, offsets) != piece.now[offsets.astype(np.int64)].sum(dtype=np.int64):
            self.same(piece, first, end, "whose touched bytes had another sum")
            raise WrongError(f"{piece}: bytes touched in pages {first} to {end} had another sum")

    def look(self, piece: Piece) -> None:
        """The same by plain Python, holding the GIL."""
        first, end = self.span(piece)
        for _ in range(min(end - first, 16)):
            at = self.choose.randrange(first * PAGE, end * PAGE)
            self.bytes_checked += 1
            if (value := piece.array[at]) != piece.now[at]:
                raise WrongError(f"{piece}: at {at:#x} is {value}, not {piece.now[at]}")

    def compare(self, piece: Piece) -> None:
        self.same(piece, *self.span(piece), "compared")

    def compare_held(self, piece: Piece) -> None:
        """By memcmp, holding the GIL."""
        first, end = self.span(piece)
        there, want = piece.array[first * PAGE : end * PAGE], piece.now[first * PAGE : end * PAGE]
        self.bytes_checked += len(want)
        if HELD.memcmp(there.ctypes.data, want.ctypes.data, len(want)):
            self.same(piece, first, end, "in which memcmp found a difference")
            raise WrongError(f"{piece}: memcmp found a difference in pages {first} to {end}")

    def write_out(self, piece: Piece) -> None:
        """The kernel reads the memory."""
        first, end = self.span(piece, 15)
        if first < end:
            self.same(piece, first, end, "written to a pipe", self.through_pipe(piece, first, end))

    def through_pipe(self, piece: Piece, first: int, end: int) -> np.ndarray:
        n, got = os.write(self.pipe[1], piece.array[first * PAGE : end * PAGE]), b""
        if n < (end - first) * PAGE:
            raise WrongError(f"{piece}: write(2) of pages {first} to {end} stopped after {n} bytes")
        while len(got) < n:
            got += os.read(self.pipe[0], n - len(got))
        return np.frombuffer(got, np.uint8)

    def lose(self) -> None:
        """Pages that their source has no more: an error, and never zeros."""
        piece = self.soak.broken
        page = self.choose.randrange(BROKEN_PAGES)
        if self.choose.random() < 0.3:
            piece.drop(page, min(page + self.choose.choice((1, 8, 64)), BROKEN_PAGES))
        try:
            self.same(piece, page, page + 1, "of a broken file", self.through_pipe(piece, page, page + 1))
        except OSError as error:
            if error.errno != errno.EFAULT or page < BROKEN_GOOD:
                raise
        else:
            if page >= BROKEN_GOOD:
                raise WrongError(f"{piece}: page {page} cannot be there")

    # -- changing ------------------------------------------------------------------------------------

    def change(self, piece: Piece) -> None:
        """Write, here and there."""
        first, end = self.span(piece, 64)
        if not piece.writers or first == end:
            return
        for _ in range(8):
            at = self.choose.randrange(first * PAGE, end * PAGE)
            n = min(self.choose.choice((1, 8, 300, 3 * PAGE)), end * PAGE - at)
            value = np.frombuffer(self.choose.randbytes(n), np.uint8)
            piece.now[at : at + n] = value
            if self.choose.random() < 0.5:
                piece.array[at : at + n] = value
            else:
                LIBC.memmove(piece.array.ctypes.data + at, value.ctypes.data, n)
        self.same(piece, first, end, "just written")

    def read_in(self, piece: Piece) -> None:
        """The kernel writes to the memory."""
        first, end = self.span(piece, 15)
        if not piece.writers or first == end:
            return
        value = self.choose.randbytes((end - first) * PAGE)
        os.write(self.pipe[1], value)
        if os.readv(self.pipe[0], [piece.array[first * PAGE : end * PAGE]]) != len(value):
            raise WrongError(f"{piece}: readv(2) to pages {first} to {end} stopped early")
        piece.now[first * PAGE : end * PAGE] = np.frombuffer(value, np.uint8)
        self.same(piece, first, end, "just read in")

    def drop(self, piece: Piece) -> None:
        first, end = self.span(piece)
        if first < end:
            piece.drop(first, end, gil=self.choose.random() < 0.5)

    def copy(self, piece: Piece) -> None:
        """Bring pages, faster than the engine or not."""
        first, end = self.span(piece, 64)
        wake = self.choose.random() < 0.5
        while first < end:
            start, n_bytes = piece.at(first, end)
            content = piece.made.content[first * PAGE : end * PAGE]
            try:
                first += piece.owner.copy(start, content, wake=wake) // PAGE
            except uf.PageExistsError as error:
                first += error.done // PAGE + 1
            except (uf.ChangingError, uf.NotRegisteredError):
                first += 1  # or the run is in two mappings
            if not wake:
                piece.owner.wake(start, n_bytes)

    def materialize(self, piece: Piece) -> None:
        if self.choose.random() < 0.2:
            self.soak.service.materialize(piece.region, wait=self.choose.random() < 0.7)

    def rare(self, piece: Piece) -> None:
        first, end = self.span(piece)
        if first < end:
            what = (self.take_away, self.pin, self.protect, self.advise, self.wake, self.ask)
            self.do(self.choose.choice(what), piece, first, end)

    def take_away(self, piece: Piece, first: int, end: int) -> None:
        """mremap the pages to elsewhere, where they keep what they held. The region misses them now."""
        start, n_bytes = piece.at(first, end)
        # Not beside other memory: were that registered, and neither touched yet, the two would become one
        # mapping, and the kernel would unregister it (Linux 6.18).
        room = new_memory(n_bytes + 2 * PAGE, PROT_NONE)
        with piece.splitting:
            move_memory(start, n_bytes, room + PAGE, MREMAP_DONTUNMAP)
        taken = as_array(room + PAGE, n_bytes).reshape(-1, PAGE)
        for page in range(first, end):
            # What was missing reads as zeros there; what was written was not missing.
            there, at = taken[page - first], slice(page * PAGE, (page + 1) * PAGE)
            if there.any() or not np.array_equal(piece.now[at], piece.made.content[at]):
                self.same(piece, page, page + 1, "taken away", there)
        piece.was_dropped(first, end)
        call("munmap", room, n_bytes + 2 * PAGE)

    def pin(self, piece: Piece, first: int, end: int) -> None:
        end = min(end, first + 64)
        with piece.splitting:
            call("mlock", *piece.at(first, end), allowed=(errno.ENOMEM, errno.EAGAIN))
        self.same(piece, first, end, "locked")
        with piece.splitting:
            call("munlock", *piece.at(first, end))

    def protect(self, piece: Piece, first: int, end: int) -> None:
        """Two mappings more for a while."""
        with piece.splitting:
            call("mprotect", *piece.at(first, end), PROT_READ)
        self.same(piece, first, end, "protected")
        with piece.splitting:
            call("mprotect", *piece.at(first, end), PROT_READ | PROT_WRITE)

    def advise(self, piece: Piece, first: int, end: int) -> None:
        advice = self.choose.choice((MADV_HUGEPAGE, MADV_NOHUGEPAGE, MADV_COLLAPSE))
        allowed = (errno.EINVAL, errno.EAGAIN, errno.EBUSY, errno.ENOMEM)
        gil = self.choose.random() < 0.5
        with piece.splitting:
            call("madvise", *piece.at(first, end), advice, gil=gil, allowed=allowed)

    def wake(self, piece: Piece, first: int, end: int) -> None:
        """For nothing."""
        piece.owner.wake(*piece.at(first, end))

    def ask(self, piece: Piece, first: int, end: int) -> None:
        self.soak.service.stats()
        self.soak.service.stats(piece.region)
        self.soak.service.resident(piece.region)
        ids, offsets = piece.owner.regions.dispatch(np.array([piece.at(first, end)[0]], np.uint64))
        if (ids[0], offsets[0]) != (piece.region.id, first * PAGE):
            raise WrongError(f"{piece}: page {first} is dispatched to {ids[0]} at {offsets[0]:#x}")

    # -- coming and going ----------------------------------------------------------------------------

    def new(self) -> None:
        """Map or register a region, and serve it."""
        if len(self.soak.pieces) >= MOST_PIECES:
            return
        n_bytes = self.choose.choice((1, 2, 7, 16, 65, 200, 512, 700, 1024, 1536)) * PAGE
        made, kind, memory = self.soak.materials.make(self.choose, n_bytes), self.choose.random(), None
        if kind < 0.4:
            region = self.soak.service.map(n_bytes)
        elif kind < 0.7:
            region = self.soak.u.map(n_bytes)
        else:
            memory = new_memory(n_bytes)
            region = self.soak.u.register(memory, n_bytes)
        self.add(region, made, memory)

    def add(self, region: uf.Region, made: Made, memory: int | None) -> None:
        writers = self.soak.options.threads if self.choose.random() < 0.35 else 0
        piece = Piece(region, made, writers, memory)
        time.sleep(self.choose.choice((0, 0, 0, 0.002)))
        self.soak.serve(self.choose, piece)
        self.note("new", piece)
        with self.soak.lock:
            self.soak.pieces.append(piece)

    def remove(self) -> None:
        """Close, drop or unregister a region, in one of all the ways there are."""
        with self.soak.lock:
            if len(self.soak.pieces) < 4:
                return
            piece = self.soak.pieces.pop(self.choose.randrange(len(self.soak.pieces)))
        while piece.users:
            time.sleep(0.0005)
        ways = (self.close, self.close_with_views, self.let_go, self.unregister)
        self.do(self.choose.choice(ways if piece.memory is None else (self.move_on, self.unregister)), piece)

    def complete(self, piece: Piece) -> None:
        """Have every page there."""
        self.soak.service.materialize(piece.region)
        if not self.soak.service.resident(piece.region).all():
            raise WrongError(f"{piece}: materialize() left pages out")

    def close(self, piece: Piece) -> None:
        if self.choose.random() < 0.5:
            self.same(piece, 0, piece.pages, "before closing")
        piece.array = np.empty(0)
        piece.region.close()

    def close_with_views(self, piece: Piece) -> None:
        self.complete(piece)
        piece.region.close()
        self.same(piece, 0, piece.pages, "closed with views")

    def let_go(self, piece: Piece) -> None:
        """Without close(): the array keeps the memory, and the memory is served."""
        told, array, now = str(piece), piece.array, piece.now
        del piece.region
        self.bytes_checked += len(now)
        if not np.array_equal(array, now):
            raise WrongError(f"{told} is wrong after its Region was let go")

    def unregister(self, piece: Piece) -> None:
        self.complete(piece)
        piece.region.unregister()
        self.same(piece, 0, piece.pages, "unregistered")
        piece.region.close()
        if piece.memory is not None:
            call("munmap", piece.memory, piece.pages * PAGE)

    def move_on(self, piece: Piece) -> None:
        """Unregister memory of our own, move it, and serve it anew where it is now."""
        n_bytes = piece.pages * PAGE
        self.complete(piece)
        piece.region.unregister()
        piece.region.close()
        memory = new_memory(n_bytes)
        move_memory(piece.memory, n_bytes, memory)
        self.same(piece, 0, piece.pages, "moved", as_array(memory, n_bytes))
        call("madvise", memory, n_bytes, MADV_DONTNEED)
        made = self.soak.materials.make(self.choose, n_bytes)
        self.add(self.soak.u.register(memory, n_bytes), made, memory)

    # -- children ------------------------------------------------------------------------------------

    def fork(self) -> None:
        """A child that tries whatever it can to disturb."""
        with self.soak.forking, self.borrowed() as piece:
            pid = os.fork()
            if pid == 0:
                os._exit(self.in_child(piece))
            ended = os.pidfd_open(pid)
            if not select.select([ended], [], [], CHILD_SECONDS)[0]:
                os.kill(pid, signal.SIGKILL)
            os.close(ended)
            if status := os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
                raise WrongError(f"a fork child ended with {status}")

    def in_child(self, piece: Piece) -> int:
        try:
            piece.region.close()
            self.soak.service.close()
            for attempt in (piece.region.unregister, lambda: self.soak.u.map(PAGE), self.soak.u.fileno):
                try:
                    attempt()
                except uf.ForkedError:
                    continue
                return 3
            self.soak.u.close()
            if self.choose.random() < 0.3:
                self.soak.pieces.clear()
                gc.collect()
        except BaseException:
            traceback.print_exc()
            return 2
        return 0
