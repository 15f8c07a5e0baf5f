"""What /proc/self says of this process's mappings (proc_pid_smaps(5)) and pages."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from userfault._consts import PAGE_SIZE

_HEADER = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S{4}) \S+ (\S+) \S+ *(.*)")
_CHUNK = 1 << 20  # pages
WATCHED = {"um", "uw", "ui"}  # registered for missing pages, write protection, minor faults


class Vma(NamedTuple):
    start: int
    end: int
    permissions: str
    device: str  # of its file, as major:minor in hexadecimal; 00:00 for none
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
                found = (first, last, header[3], header[4], header[5]) if last > start else None
            elif found and line.startswith("VmFlags:"):
                yield Vma(*found, flags=frozenset(line.split()[1:]))


def registered(start: int, end: int) -> bool:
    """Whether any of [start, end) is registered with a userfaultfd, ours or another library's."""
    return any(vma.flags & WATCHED for vma in vmas(start, end))


def memory_devices() -> set[str]:
    """The devices (of `Vma.device`) whose files are shared memory to userfaultfd: tmpfs.

    Those that are mounted (proc_pid_mountinfo(5)), and the kernel's own, which memfd_create(2), shmget(2) and
    MAP_SHARED|MAP_ANONYMOUS use.
    """
    memfd = os.memfd_create("userfault")
    try:
        numbers = [os.fstat(memfd).st_dev]
    finally:
        os.close(memfd)
    with open("/proc/self/mountinfo") as mounts:
        for line in mounts:
            mount, filesystem = line.split(" - ")
            if filesystem.startswith("tmpfs "):
                numbers.append(os.makedev(*map(int, mount.split()[2].split(":"))))
    return {f"{os.major(number):02x}:{os.minor(number):02x}" for number in numbers}


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
