"""What several test files use."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pytest

import userfault as uf
from userfault.rfc import RfcModel

PAGE = uf.PAGE_SIZE
WIRES = ("v1", "v2", "msg")
KERNEL = uf.probe()
KERNEL_WIRES = tuple(str(api) for api in KERNEL.apis)

# In bench/lab's guest. Its processor is emulated: less is tried there, and everything takes longer.
LAB = "LAB_KERNEL" in os.environ
SLOWER = 10 if LAB else 3 if "DELAYS" in os.environ else 1

# Without CAP_SYS_PTRACE there are no fork events. In CI that is a failure.
forks = pytest.mark.skipif(
    os.geteuid() != 0 and os.environ.get("CI") != "true", reason="fork events need CAP_SYS_PTRACE"
)

# A test with fork events and without; v2 always has them.
on_and_off = pytest.mark.parametrize(
    ("wire", "events"),
    [
        pytest.param("v2", True, marks=forks),
        pytest.param("msg", True, marks=forks),
        pytest.param("msg", False),
    ],
    indirect=["wire"],
)

Child = Callable[..., "subprocess.CompletedProcess[str]"]


def only(*wires: str) -> pytest.MarkDecorator:
    """A test about these wires; it is not there for a kernel that speaks none of them."""
    return pytest.mark.parametrize("wire", wires, indirect=True)


def has(feature: uf.Feature) -> bool:
    """Whether the running kernel has a feature of msg."""
    return bool((KERNEL.features or uf.Feature(0)) & feature)


def needs(feature: uf.Feature) -> pytest.MarkDecorator:
    """A test of what a feature of msg brings: skipped without it; and not there in the lab."""
    return pytest.mark.needs(feature)


def touching(region: uf.Region, pages: Iterable[int], write: bool = False) -> threading.Thread:
    """A thread that touches the pages in order, without the GIL."""
    offsets = np.array(list(pages), np.uint64) * np.uint64(PAGE)
    array = region.array

    def store() -> None:
        for offset in offsets.tolist():
            ctypes.memset(array.ctypes.data + offset, 7, 1)

    thread = threading.Thread(target=store if write else lambda: uf.touch(array, offsets), daemon=True)
    thread.start()
    return thread


def wait_for(service: uf.FaultService, counter: str, value: int) -> np.void:
    """A fault's thread is awake a moment before the engine has counted it."""
    deadline = time.monotonic() + 30
    while int(service.stats()[counter]) < value:
        assert time.monotonic() < deadline, f"{counter} stays {service.stats()[counter]}"
        time.sleep(0.001)
    return service.stats()


def pending(u: uf.Userfaultfd) -> int:
    """How many faults the kernel has that nobody has read."""
    with open(f"/proc/self/fdinfo/{u.fileno()}") as info:
        return int(next(line for line in info if line.startswith("pending:")).split()[1])


def addresses(records: np.ndarray) -> list[int]:
    """The page addresses in the page-fault records of any wire."""
    column = records["address" if records.dtype == uf.MSG_DTYPE else "arg"]
    return [int(address) & -PAGE for address in column]


def give_up(u: uf.Userfaultfd) -> None:
    """Before closing at the end of a test: should it have failed, its sleepers read zeros and live.

    Without this the page that they wait for would fail closed, and kill the test run with a signal.
    """
    if not u.closed:
        for region in list(u._alive.values()):
            with contextlib.suppress(OSError, uf.UserfaultError):
                region.unregister()


class KernelFaults:
    """Faults on the running kernel, in a region of its own."""

    def __init__(self, u: uf.Userfaultfd, n_pages: int = 16) -> None:
        self.u = u
        self.region = u.map(n_pages * PAGE)
        self.start, self.table = self.region.start, u.regions
        self.threads: list[threading.Thread] = []

    def reader(self, **options: Any) -> uf.EventReader:
        return uf.EventReader(self.u, **options)

    def at(self, *pages: int, write: bool = False, wait: bool = True) -> None:
        """Touch each page from a thread of its own, and wait until all these faults are pending."""
        before = pending(self.u)
        self.threads += [touching(self.region, [page], write) for page in pages]
        deadline = time.monotonic() + 30 * SLOWER
        while wait and pending(self.u) < before + len(pages):
            assert time.monotonic() < deadline
            time.sleep(0.001)

    def end(self) -> None:
        self.u.zeropage(self.start, self.region.length)
        for thread in self.threads:
            thread.join(30)
            assert not thread.is_alive()


class ModelFaults:
    """The same faults on `userfault.rfc`'s model of a kernel, for wires that the running one lacks."""

    def __init__(self, wire: str, n_pages: int = 16) -> None:
        self.wire, self.start, self.table = wire, 0x7F0000000000, uf.RegionTable()
        self.table.add(self.start, n_pages * PAGE)
        self.model = RfcModel(fork=True)
        self.model.api({"v1": 0xAA, "v2": 0xAB}[wire], 0)

    def reader(self, **options: Any) -> uf.EventReader:
        return uf.EventReader(self.model.fileno(), api=self.wire, **options)

    def at(self, *pages: int, write: bool = False, wait: bool = True) -> None:
        for page in pages:
            self.model.fault(self.start + page * PAGE, write)

    def end(self) -> None:
        self.model.close()


Faults = KernelFaults | ModelFaults


def read_all(reader: uf.EventReader, n: int) -> Sequence[np.ndarray]:
    """Batches until n records are there."""
    batches: list[np.ndarray] = []
    while sum(map(len, batches)) < n:
        batches.append(reader.read(30).copy())
        assert len(batches[-1]), "no more came"
    return batches
