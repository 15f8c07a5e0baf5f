"""What /proc/self says of this process's mappings (proc_pid_smaps(5)) and pages."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from userfault._consts import PAGE_SIZE

_HEADER = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S{4}) \S+ \S+ \S+ *(.*)")
_CHUNK = 1 << 20  # pages
WATCHED = {"um", "uw", "ui"}  # registered for missing pages, write protection, minor faults


class Vma(NamedTuple):
    start: int
    end: int
    permissions: str
    name: str
    flags: frozenset[str]


def vmas(start: int, end: int) -> Iterator[Vma]:
    """The mappings that overlap [start, end), in address order."""
    found = None
    with open("/proc/self/smaps") as smaps:
        for line in smaps:
            if header := _HEADER.match(line):
                first, last = int(header[1], 16), int(header[2], 16)
                if first >= end:
                    return
                found = (first, last, header[3], header[4]) if last > start else None
            elif found and line.startswith("VmFlags:"):
                yield Vma(*found, flags=frozenset(line.split()[1:]))


def registered(start: int, end: int) -> bool:
    """Whether any of [start, end) is registered with a userfaultfd, ours or another library's."""
    return any(vma.flags & WATCHED for vma in vmas(start, end))


def first_present(start: int, length: int) -> int | None:
    """The address of the first page that is there or swapped out (proc_pid_pagemap(5)), or None."""
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        for first in range(start, start + length, _CHUNK * PAGE_SIZE):
            pages = min(_CHUNK, (start + length - first) // PAGE_SIZE)
            pagemap.seek(first // PAGE_SIZE * 8)
            entries = np.frombuffer(pagemap.read(pages * 8), np.uint64)
            found = np.flatnonzero(entries >> np.uint64(62))
            if found.size:
                return first + int(found[0]) * PAGE_SIZE
    return None
