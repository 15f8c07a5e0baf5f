"""What /proc/self/smaps says of this process's mappings (proc_pid_smaps(5))."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

_HEADER = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S{4}) \S+ \S+ \S+ *(.*)")
_WATCHED = {"um", "uw", "ui"}  # registered for missing pages, write protection, minor faults


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
    return any(vma.flags & _WATCHED for vma in vmas(start, end))
