"""What several test files use."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable, Iterable

import numpy as np

import userfault as uf

Child = Callable[..., "subprocess.CompletedProcess[str]"]

# Every child's code starts with this.
PREAMBLE = """
import ctypes, gc, mmap, os, signal, sys, threading, time
import numpy as np
import userfault as uf
PAGE = uf.PAGE_SIZE

def settles(service, counter, value):
    # A fault's thread is awake a moment before the engine has counted it.
    deadline = time.monotonic() + 10
    while int(service.stats()[counter]) != value and time.monotonic() < deadline:
        time.sleep(0.001)
    return int(service.stats()[counter]) == value
"""


def touching(region: uf.Region, pages: Iterable[int]) -> threading.Thread:
    """A thread that touches the pages in order, without the GIL."""
    offsets = np.array(list(pages), np.uint64) * np.uint64(uf.PAGE_SIZE)
    thread = threading.Thread(target=uf.touch, args=(region.array, offsets), daemon=True)
    thread.start()
    return thread


def pending(u: uf.Userfaultfd) -> int:
    """How many faults the kernel has that nobody has read."""
    with open(f"/proc/self/fdinfo/{u.fileno()}") as info:
        return int(next(line for line in info if line.startswith("pending:")).split()[1])
