"""For soak.py: the bytes that its sources give, its regions, and the C library's calls on memory."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import random
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import userfault as uf

PAGE = uf.PAGE_SIZE
DATA_BYTES = 16 << 20
BROKEN_PAGES, BROKEN_GOOD = 96, 40

MADV_DONTNEED, MADV_HUGEPAGE, MADV_NOHUGEPAGE, MADV_COLLAPSE = 4, 14, 15, 25
MREMAP_MAYMOVE, MREMAP_FIXED, MREMAP_DONTUNMAP = 1, 2, 4
PROT_NONE, PROT_READ, PROT_WRITE = 0, mmap.PROT_READ, mmap.PROT_WRITE

FILL = """
#include <stdint.h>
#include <string.h>
#include <unistd.h>
int fill(void *ctx, uint64_t offset, void *dst, size_t length)
{
    usleep(offset / 4096 % 7 * 30);
    memcpy(dst, (char *)ctx + offset, length);
    return 0;
}
"""

# The first lets go of the GIL for each call, the second holds it.
LIBC, HELD = ctypes.CDLL(None, use_errno=True), ctypes.PyDLL(None, use_errno=True)
for _libc in (LIBC, HELD):
    _libc.mmap.restype = _libc.mremap.restype = ctypes.c_void_p
    _libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    _libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
    _libc.madvise.argtypes = _libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    _libc.munmap.argtypes = _libc.mlock.argtypes = _libc.munlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    _libc.memcmp.argtypes = _libc.memmove.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]


def call(name: str, *arguments: Any, gil: bool = False, allowed: tuple[int, ...] = ()) -> int | None:
    """What a function of the C library answers; None for an errno that is allowed, OSError for others."""
    result = getattr(HELD if gil else LIBC, name)(*arguments)
    if result not in (-1, ctypes.c_void_p(-1).value):
        return int(result)
    number = ctypes.get_errno()
    if number in allowed:
        return None
    raise OSError(number, f"{name}{arguments}: {os.strerror(number)}")


def new_memory(n_bytes: int, protection: int = PROT_READ | PROT_WRITE) -> int:
    start = call("mmap", None, n_bytes, protection, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    assert start is not None
    return start


def move_memory(start: int, n_bytes: int, to: int, flags: int = 0) -> None:
    """mremap to memory that is there already, mapping by mapping: several at once are refused."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(address, 16) for address in line.split(maxsplit=1)[0].split("-"))
        first, last = max(first, start), min(last, start + n_bytes)
        if first < last:
            how = flags | MREMAP_MAYMOVE | MREMAP_FIXED
            call("mremap", first, last - first, last - first, how, to + first - start)


def as_array(start: int, n_bytes: int) -> np.ndarray:
    return np.frombuffer((ctypes.c_ubyte * n_bytes).from_address(start), np.uint8)


class Made(NamedTuple):
    """A source, and the bytes that it gives."""

    name: str
    source: uf.sources.Source
    content: np.ndarray


class Materials:
    """Bytes that are not zero, in memory and in files, and the sources that give them."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.path, self.broken_path = folder / "data", folder / "broken"
        self.data = np.random.default_rng(seed).integers(1, 256, DATA_BYTES, dtype=np.uint8)
        self.path.write_bytes(self.data.tobytes())
        os.sync()  # what is not written cannot leave the page cache
        self.file = np.memmap(self.path, np.uint8, "r")
        self.kinds = ["zero", "buffer", "own", "memmap", "memmap", "file", "file"]
        self.kinds += [kind for kind in ("constant", "pattern") if hasattr(uf.sources, kind.capitalize())]
        if (folder / "fill.so").exists() and hasattr(uf.sources, "Native"):
            self.kinds.append("native")
            self.native = ctypes.CDLL(str(folder / "fill.so"))

    @staticmethod
    def prepare(folder: Path) -> None:
        """Compile a C function to fill with, where there is a compiler."""
        if shutil.which("cc"):
            (folder / "fill.c").write_text(FILL)
            line = ["cc", "-shared", "-fPIC", "-o", str(folder / "fill.so"), str(folder / "fill.c")]
            subprocess.run(line, check=True, timeout=100)

    def make(self, choose: random.Random, n_bytes: int) -> Made:
        """A source of any kind for so many bytes; some end within the last page."""
        kind = choose.choice(self.kinds)
        has = n_bytes - choose.choice((0, 0, 1, 777, PAGE - 1))
        at = choose.randrange(DATA_BYTES - n_bytes)
        content = np.zeros(n_bytes, np.uint8)
        if kind == "zero":
            return Made(kind, uf.sources.Zero(), content)
        if kind == "constant":
            content[:] = value = choose.randrange(1, 256)
            return Made(kind, uf.sources.Constant(value), content)
        if kind == "pattern":
            pattern = uf.sources.Pattern(choose.randrange(1 << 32))
            return Made(kind, pattern, pattern.expected(0, n_bytes))
        if kind == "file":
            at, has = (at, n_bytes) if has == n_bytes else (DATA_BYTES - has, has)
        bytes_here = self.data[at : at + has]
        content[:has] = bytes_here
        if kind == "buffer":
            return Made(kind, uf.sources.Buffer(bytes_here), content)
        if kind == "own":  # memory that goes with the region
            return Made(kind, uf.sources.Buffer(bytes_here.copy()), content)
        if kind == "memmap":
            return Made(kind, uf.sources.Buffer(self.file[at : at + has]), content)
        if kind == "native":
            return Made(kind, uf.sources.Native(self.native.fill, bytes_here, nbytes=has), content)
        return Made(kind, uf.sources.File(self.path, at), content)

    def make_broken(self) -> Made:
        """A file that became shorter than it was."""
        content = self.data[: BROKEN_PAGES * PAGE]
        self.broken_path.write_bytes(content.tobytes())
        source = uf.sources.File(self.broken_path)
        os.truncate(self.broken_path, BROKEN_GOOD * PAGE)
        return Made("broken", source, content)

    def chill(self) -> None:
        """Out of the page cache with the file: its sources have to wait for it again."""
        call("madvise", self.file.ctypes.data, DATA_BYTES, MADV_DONTNEED)
        with open(self.path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Piece:
    """A region, and what it must hold."""

    def __init__(self, region: uf.Region, made: Made, writers: int, memory: int | None) -> None:
        self.region, self.made = region, made
        self.memory = memory  # the address of what we mapped ourselves
        self.array = region.array
        self.pages = region.length // PAGE
        self.writers = writers  # 0: nobody writes
        self.now = made.content.copy() if writers else made.content
        self.options: dict[str, Any] = {}
        self.users = 0
        self.splitting = threading.Lock()  # held by who splits or moves its mapping

    @property
    def owner(self) -> uf.Userfaultfd:
        return self.region._userfaultfd

    def at(self, first: int, end: int) -> tuple[int, int]:
        """Address and length in bytes of the pages [first, end)."""
        return self.region.start + first * PAGE, (end - first) * PAGE

    def pages_of(self, thread: int) -> tuple[int, int]:
        """The pages [first, end) where the thread may do what it likes."""
        if not self.writers:
            return 0, self.pages
        return self.pages * thread // self.writers, self.pages * (thread + 1) // self.writers

    def drop(self, first: int, end: int, gil: bool = False) -> None:
        """They hold the source's bytes again. EINVAL: another thread has locked a part of them."""
        allowed = () if self.writers else (errno.EINVAL,)
        call("madvise", *self.at(first, end), MADV_DONTNEED, gil=gil, allowed=allowed)
        self.was_dropped(first, end)

    def was_dropped(self, first: int, end: int) -> None:
        if self.writers:
            self.now[first * PAGE : end * PAGE] = self.made.content[first * PAGE : end * PAGE]

    def __str__(self) -> str:
        kind = "written" if self.writers else "read"
        return f"{self.region.id}({self.made.name} {self.pages}p {kind} {self.options})"
