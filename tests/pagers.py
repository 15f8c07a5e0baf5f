"""Page sources in Python, for pagers to import; and what the children of the tests find defined."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np

CHUNK = 64 << 10
PAGE = 4096
SYS_FUTEX, FUTEX_WAKE = 202, 1

# LOG is the path of a file for `Words`, TESTS that of this folder.
SET_UP = """
import contextlib, errno, functools, pickle
sys.path.insert(0, TESTS)
import pagers
from pagers import CHUNK, Words, words

def pager_of(array):
    return array._lazy().source

def right(array, seed=0):
    return bool((array.reshape(-1).view(np.uint8) == words(0, array.nbytes, seed)).all())

def by_system_call(array, byte):
    "The 8 bytes there as a system call reads them, or the errno."
    read, write = os.pipe()
    try:
        os.write(write, array[byte:byte + 8].data)
        return os.read(read, 8)
    except OSError as error:
        return error.errno
    finally:
        os.close(read)
        os.close(write)

def comes(happens):
    deadline = time.monotonic() + 20
    while not happens() and time.monotonic() < deadline:
        time.sleep(0.002)
    return happens()

def over(pid):
    "Whether it ended. Its parent may be somebody who does not care."
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True

def no_children():
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return True
    return False

def failure(function, kind):
    try:
        function()
    except kind as error:
        return str(error)
    raise AssertionError("it did not fail")
"""


def words(offset: int, nbytes: int, seed: int = 0) -> np.ndarray:
    """The bytes [offset, +nbytes), whose 8-byte words tell where they are."""
    first = offset // 8
    numbers = np.arange(first, -(-(offset + nbytes) // 8), dtype=np.uint64) + np.uint64(seed << 40)
    mixed = (numbers + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    return (mixed ^ mixed >> np.uint64(29)).astype("<u8").view(np.uint8)[offset - first * 8 :][:nbytes]


def note(path: str | None, line: str) -> None:
    """One line at the end of a file; whoever writes at the same time does not mix with it."""
    if path:
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.write(file, line.encode() + b"\n")
        os.close(file)


def notes(path: str) -> list[list[Any]]:
    """The lines, in words, of which those of digits are numbers."""
    if not os.path.exists(path):
        return []
    with open(path) as file:
        return [[int(word) if word.isdigit() else word for word in line.split()] for line in file]


class Words:
    """Bytes that tell where they are. Each call is noted in the file `log`, before it does anything."""

    def __init__(self, nbytes: int, chunk_bytes: int = CHUNK, log: str | None = None) -> None:
        self.nbytes, self.chunk_bytes, self.log = nbytes, chunk_bytes, log

    def read_into(self, offset: int, buffer: memoryview) -> None:
        note(self.log, f"read {offset} {len(buffer)}")
        self.trick(offset)
        buffer[:] = words(offset, len(buffer)).data

    def trick(self, offset: int) -> None:
        """What a source does before it gives its bytes."""


class Slow(Words):
    """Takes its time for each call."""

    def trick(self, offset: int) -> None:
        time.sleep(0.1)


class Gathered(Words):
    """Gives nothing until so many calls are under way."""

    def __init__(self, nbytes: int, calls: int) -> None:
        super().__init__(nbytes)
        self.barrier = threading.Barrier(calls)

    def trick(self, offset: int) -> None:
        self.barrier.wait(20)


class Store:
    """A file. Writes are noted; with `buffers` they are kept, and lost with the process, until a flush."""

    chunk_bytes = CHUNK

    def __init__(
        self, path: str, log: str | None = None, pause: float = 0.0, buffers: bool = False, exits: int = -1
    ) -> None:
        self.file = os.open(path, os.O_RDWR)
        self.nbytes = os.fstat(self.file).st_size
        self.log, self.pause, self.exits = log, pause, exits
        self.kept: dict[int, bytes] = {}
        if buffers:
            self.flush = self._flush

    def read_into(self, offset: int, buffer: memoryview) -> int:
        time.sleep(self.pause)
        got = os.preadv(self.file, [buffer], offset)
        for at in range(offset - offset % PAGE, offset + len(buffer), PAGE):
            if at in self.kept:
                buffer[at - offset : at - offset + PAGE] = self.kept[at]
        return got

    def write_from(self, offset: int, buffer: memoryview) -> int:
        note(self.log, f"write {offset} {len(buffer)} {os.getpid()}")
        half = len(buffer) // 2 // PAGE * PAGE
        self._put(offset, buffer[:half])
        if self.log and len(notes(self.log)) == self.exits:
            os._exit(9)
        time.sleep(self.pause)
        self._put(offset + half, buffer[half:])
        return len(buffer)

    def _put(self, offset: int, buffer: memoryview) -> None:
        if hasattr(self, "flush"):
            for at in range(0, len(buffer), PAGE):
                self.kept[offset + at] = bytes(buffer[at : at + PAGE])
        else:
            os.pwrite(self.file, buffer, offset)

    def _flush(self) -> None:
        for at, data in self.kept.items():
            os.pwrite(self.file, data, at)
        self.kept.clear()


# -- sources that fail ---------------------------------------------------------------------------------------


class MuteError(Exception):
    """An error that cannot say what it is."""

    def __str__(self) -> str:
        raise RuntimeError("no words")

    __repr__ = __str__


def fail_with(error: BaseException) -> Callable[[memoryview], NoReturn]:
    def fail(buffer: memoryview) -> NoReturn:
        raise error

    return fail


_kept: list[Any] = []

# What its chunks do, from the second on, and how it is told. They leave the pager alive.
TRICKS: list[tuple[Callable[[memoryview], object], str]] = [
    (fail_with(OSError(errno.ENOSPC, "the disk of the other side is full")), "OSError: [Errno 28] the disk"),
    (fail_with(ValueError("chunk 2 is corrupt")), "ValueError: chunk 2 is corrupt"),
    (fail_with(KeyError("chunk 3")), "KeyError: 'chunk 3'"),
    (fail_with(SystemExit(4)), "SystemExit: 4"),
    (fail_with(KeyboardInterrupt()), "KeyboardInterrupt"),
    (fail_with(MuteError()), "MuteError, whose __str__ fails"),
    (fail_with(OSError("EACCES", "an errno in letters")), "an errno in letters"),
    (fail_with(OSError(1 << 40, "an errno of 41 bits")), "an errno of 41 bits"),
    (fail_with(socket.gaierror(-2, "Name or service not known")), "Name or service not known"),
    (fail_with(BlockingIOError(errno.EAGAIN, "not now")), "not now"),
    (fail_with(InterruptedError(errno.EINTR, "a signal")), "a signal"),
    (fail_with(OSError(errno.ENOBUFS, "no buffers")), "no buffers"),
    (fail_with(ValueError("two\nlines\r\nand \x1b[31m\x9b\0 red")), "ValueError: two lines and ?[31m?? red"),
    (fail_with(ValueError("\udcff." + "é" * 100_000)), "ValueError: ?.éééé"),
    (lambda buffer: len(buffer) - 1, "Odd.read_into came up short: 65535 of 65536 bytes"),
    (lambda buffer: "all of it", "Odd.read_into returned 'all of it'"),
    (lambda buffer: _kept.append(np.frombuffer(buffer, np.uint8)), "Odd.read_into keeps its buffer"),
]


# What no terminal should be given, with what is shown for it: controls (also U+009B, as UTF-8 has it), and
# bytes that are no character. Then characters at the bounds of each length.
RUDE = {
    b"\x1b[2J\x7f": "?[2J?",
    b"\xc2\x9b3J\x9b": "??3J?",
    b"\xc3 \xc0\xaf \xe0\x9f\xbf": "? ?? ???",
    b"\xed\xa0\x80 \xf4\x90\x80\x80": "??? ????",
    b"\xf0\x8f\xbf\xbf \xf8\x90\x80\x80 \xff": "???? ???? ?",
} | {
    char.encode(): char
    for char in ("\xa1", "\u07ff", "\u0800", "\ud7ff", "\ue000", "\uffff", "\U00010000", "\U0010ffff")
}
RUDE_BYTES = b"".join(RUDE).ljust(510, b"=") + "é".encode()  # which does not fit: words have 512, with a NUL


class Odd(Words):
    """Its chunk i does TRICKS[i - 1]; the others are well."""

    def read_into(self, offset: int, buffer: memoryview) -> Any:
        i = offset // CHUNK
        if 1 <= i <= len(TRICKS):
            return TRICKS[i - 1][0](buffer[:CHUNK])
        return super().read_into(offset, buffer)


class Sick(Words):
    """Its second chunk fails the first so many times, by the count of the notes of all pagers."""

    def __init__(self, log: str, times: int) -> None:
        super().__init__(4 * CHUNK, log=log)
        self.times = times

    def trick(self, offset: int) -> None:
        if offset == CHUNK and self._count() <= self.times:
            raise OSError(errno.EIO, "it is not well")

    def _count(self) -> int:
        assert self.log
        return sum(offset == CHUNK for _, offset, _ in notes(self.log))


class Deadly(Sick):
    """As `Sick`, but the process ends."""

    def __init__(self, log: str, times: int, how: str) -> None:
        super().__init__(log, times)
        self.how = how

    def trick(self, offset: int) -> None:
        if offset == CHUNK and self._count() <= self.times:
            if self.how == "exit":
                os._exit(3)
            ctypes.string_at(0)


class NoStderr(Words):
    """Its second chunk fails where nothing can be said of it."""

    def trick(self, offset: int) -> None:
        if offset == CHUNK:
            sys.stderr.close()
            raise ValueError("nobody hears it")


def shared() -> int:
    """Where the pager has the memory that it shares."""
    with open("/proc/self/maps") as maps:
        return next(int(line.partition("-")[0], 16) for line in maps if "memfd:userfault pager (" in line)


class Abrupt(Words):
    """Its second chunk is given, but the pager dies at the last moment: before it wakes who waits."""

    def trick(self, offset: int) -> None:
        assert self.log
        if offset != CHUNK or sum(offset == CHUNK for _, offset, _ in notes(self.log)) > 1:
            return
        time.sleep(0.1)  # the other sleeps
        memory, slots = shared(), 2
        for i in range(slots):
            state = ctypes.c_int.from_address(memory + PAGE * (1 + i))
            if state.value == 1:
                data = words(offset, CHUNK).tobytes()
                ctypes.memmove(memory + PAGE * (1 + slots) + (2 << 20) * i, data, CHUNK)
                ctypes.c_int.from_address(memory + PAGE * (1 + i) + 8).value = 0
                ctypes.c_uint64.from_address(memory + 32).value += 1
                state.value = 2
        os._exit(5)


class Rude(Words):
    """Refuses its second and third chunks with bytes that no terminal should be given, and dies of it."""

    def __repr__(self) -> str:
        return "\n\udcff" + 200 * "é"

    def trick(self, offset: int) -> None:
        if offset not in (CHUNK, 2 * CHUNK):
            return
        memory, slots = shared(), 2
        for at in range(memory + PAGE, memory + PAGE * (1 + slots), PAGE):
            state = ctypes.c_int.from_address(at)
            if state.value == 1 and ctypes.c_uint64.from_address(at + 16).value == offset:
                ctypes.memmove(at + 32, RUDE_BYTES, len(RUDE_BYTES))
                ctypes.c_int.from_address(at + 8).value = -errno.EIO
                state.value = 2
                ctypes.CDLL(None).syscall(SYS_FUTEX, ctypes.c_void_p(at), FUTEX_WAKE, 1)
                os._exit(5)


class Hostile(Words):
    """Writes at random over all that it shares but the data."""

    def __init__(self, nbytes: int, seed: int) -> None:
        super().__init__(nbytes)
        self.random = np.random.default_rng(seed)
        threading.Thread(target=self.scribble, daemon=True).start()

    def scribble(self) -> None:
        memory, pages = shared(), 4
        while True:
            at = int(self.random.integers(pages)) * PAGE
            if self.random.integers(2):
                data = bytes([int(self.random.integers(4)), 0, 0, 0])  # a state that there is
            else:
                data = self.random.bytes(int(self.random.integers(1, 600)))
            ctypes.memmove(memory + at, data, len(data))
            time.sleep(0.0005)


# -- functions that make sources -----------------------------------------------------------------------------


def refuse() -> NoReturn:
    raise PermissionError(errno.EACCES, "the bucket is private")


def refuse_and_stay() -> NoReturn:
    threading.Thread(target=time.sleep, args=(3600,)).start()
    raise RuntimeError("half of it was made")


def made(log: str) -> Words:
    note(log, "made")
    return Words(4 * CHUNK)


def nothing() -> object:
    return object()


def endless() -> Words:
    return Words(1 << 70)


def unbound() -> Words:
    """It is not killed with the process that started it: so it is for who changes the user."""
    pr_set_pdeathsig = 1
    assert ctypes.CDLL(None).prctl(pr_set_pdeathsig, 0) == 0
    return Words(CHUNK)


def failing(nbytes: int, password: str) -> Words:
    """A source whose every chunk fails, and that may tell nobody what it was given."""
    assert password
    return Words(nbytes, log="/nowhere/at/all")


class Printing(Words):
    """Says what it does."""

    def trick(self, offset: int) -> None:
        print("reading", offset)
