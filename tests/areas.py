"""Memory of every kind that can be registered, and threads that sleep in it."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import signal
import subprocess
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import userfault as uf
from support import PAGE, Child, give_up, has
from userfault.procmaps import vmas

F, M = uf.Feature, uf.RegisterMode
DEFAULT = uf.negotiation.DEFAULT & (uf.probe().features or F(0))
SHARED = F.MISSING_SHMEM | F.MINOR_SHMEM | F.WP_HUGETLBFS_SHMEM
# Anonymous memory, a shared mapping of a memfd, and a private one, with the features that each needs.
KINDS = {"anon": F(0), "shmem": SHARED, "shmem-private": SHARED}

LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
LIBC.mmap.restype = ctypes.c_void_p
# Advice that Python does not name (asm-generic/mman-common.h).
MADV_PAGEOUT, MADV_COLLAPSE, MADV_GUARD_INSTALL = 21, 25, 102

UFFD_WP = 1 << 57  # of an entry of /proc/self/pagemap (proc_pid_pagemap(5))


def anonymous(length: int) -> np.ndarray:
    """Private anonymous memory as uint8, with nothing there yet."""
    return np.frombuffer(mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)


def area(kind: str, n_pages: int) -> tuple[mmap.mmap, mmap.mmap | None]:
    """Fresh memory to register; of shared memory also another mapping, to look at it past all faults."""
    if kind == "anon":
        return mmap.mmap(-1, n_pages * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), None
    fd = os.memfd_create("userfault-test")
    os.ftruncate(fd, n_pages * PAGE)
    shared = kind == "shmem"
    memory = mmap.mmap(fd, n_pages * PAGE, flags=mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE)
    other = mmap.mmap(fd, n_pages * PAGE)
    os.close(fd)
    return memory, other


def needs(features: uf.Feature) -> None:
    """Skip where the kernel lacks one of them."""
    for feature in features:
        if not has(feature):
            pytest.skip(f"this kernel lacks {feature.name}")


def run(child: Child, code: str, features: uf.Feature, **given: object) -> subprocess.CompletedProcess[str]:
    """Run it in a child with all of this file, `u`, a userfaultfd with the features, and what is `given`."""
    needs(features)
    lines = [f"sys.path.insert(0, {str(Path(__file__).parent)!r})", "from areas import *"]
    lines += [f'u = uf.Userfaultfd("msg", F({int(features)}))', *(f"{k} = {v!r}" for k, v in given.items())]
    return child("\n".join([*lines, textwrap.dedent(code), "print('end', flush=True)"]))


def ends(child: Child, code: str, features: uf.Feature, **given: object) -> None:
    """`run` it: it must get to its end."""
    done = run(child, code, features, **given)
    assert done.stdout == "end\n", (done.returncode, done.stdout, done.stderr)


def dies(child: Child, code: str, features: uf.Feature, *signals: signal.Signals, **given: object) -> None:
    """`run` it: what it does after it has printed "before" must end it by one of the signals."""
    done = run(child, code, features, **given)
    assert done.stdout == "before\n", (done.returncode, done.stdout, done.stderr)
    assert -done.returncode in signals, (done.returncode, done.stderr)


@contextlib.contextmanager
def opened(features: uf.Feature) -> Iterator[uf.Userfaultfd]:
    """A userfaultfd with just these features; skips where the kernel lacks one."""
    needs(features)
    with uf.Userfaultfd("msg", features) as u:
        try:
            yield u
        finally:
            give_up(u)


def page_of(n: int) -> bytes:
    """The content of page n of test data: nowhere zero."""
    return bytes([n % 255 + 1]) * PAGE


class Toucher:
    """A thread that reads or writes the first byte of a page, without the GIL."""

    def __init__(self, array: np.ndarray, page: int, write: int | None = None) -> None:
        self.seen: int | None = None
        self.array, self.offset, self.write = array, page * PAGE, write
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self) -> None:
        if self.write is None:
            self.seen = uf.touch(self.array, np.array([self.offset], np.uint64))
        else:
            ctypes.memset(self.array.ctypes.data + self.offset, self.write, 1)

    def ends(self) -> int | None:
        """The byte that it read, once it is through."""
        self.thread.join(30)
        assert not self.thread.is_alive(), "it sleeps on"
        return self.seen

    def asleep(self) -> bool:
        self.thread.join(0.1)
        return self.thread.is_alive()


def fault(
    region: uf.Region, reader: uf.EventReader, page: int, write: int | None = None
) -> tuple[Toucher, int]:
    """Touch a page and read the one record of it: the thread that sleeps, and the record's flags."""
    toucher = Toucher(region.array, page, write)
    (record,) = reader.read(30)
    assert record["event"] == uf._consts.UFFD_EVENT_PAGEFAULT
    assert record["address"] == region.start + page * PAGE
    return toucher, int(record["flags"])


def advise(region: uf.Region, advice: int, page: int = 0, n_pages: int | None = None) -> None:
    """madvise(2) some of its pages, or all."""
    length = region.length if n_pages is None else n_pages * PAGE
    if LIBC.madvise(region.start + page * PAGE, length, advice):
        raise OSError(ctypes.get_errno(), f"madvise({advice})")


def pagemap(region: uf.Region) -> np.ndarray:
    """The entries of its pages in /proc/self/pagemap."""
    with open("/proc/self/pagemap", "rb", buffering=0) as file:
        file.seek(region.start // PAGE * 8)
        return np.frombuffer(file.read(region.length // PAGE * 8), np.uint64)


def protected(region: uf.Region, page: int = 0) -> bool:
    return bool(int(pagemap(region)[page]) & UFFD_WP)


def flags(region: uf.Region) -> list[frozenset[str]]:
    """VmFlags of each of its mappings."""
    return [vma.flags for vma in vmas(region.start, region.start + region.length)]
