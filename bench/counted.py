"""Scripted sequences whose instructions callgrind counts; run by baseline.py, under valgrind.

Each sequence runs twice, with few and with many calls: in the difference everything else cancels.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

import userfault as uf
from read import WIRES, Reader
from sources import Pipe, page_faults

FEW, MANY = 8, 40
BATCHES = (1, 64, 512)
REGIONS = (1, 1_000)
RECORDS = 512
Run = Callable[[int], None]


def marks(folder: Path) -> ctypes.CDLL:
    """marks.c, compiled."""
    built = folder / "marks.so"
    source = Path(__file__).with_name("marks.c")
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", str(built), str(source)], check=True, timeout=60)
    return ctypes.CDLL(str(built))


def reading() -> Iterator[tuple[str, Run, Callable[[], None]]]:
    """EventReader.read() from a pipe."""

    def fresh(pipe: Pipe) -> None:
        with contextlib.suppress(BlockingIOError):
            while os.read(pipe.fd, Pipe.SIZE):
                pass
        pipe.refill()

    for api in WIRES:
        for batch in BATCHES:
            with Pipe(api, batch) as pipe:
                yield f"read/{api}/{batch}", Reader(pipe.fd, api, batch).drain, lambda: fresh(pipe)


def calling(call: Callable[[], object]) -> Run:
    def run(times: int) -> None:
        for _ in range(times):
            call()

    return run


def translating() -> Iterator[tuple[str, Run, Callable[[], None]]]:
    """as_v2, dispatch and lookup, of 512 records a call."""
    random = np.random.default_rng(0)
    for n in REGIONS:
        starts = (1 << 44) + np.arange(n, dtype=np.uint64) * np.uint64(8 * uf.PAGE_SIZE)
        table = uf.RegionTable()
        table.add_many(starts, np.full(n, 4 * uf.PAGE_SIZE, np.uint64))
        addresses = random.choice(starts, RECORDS) + random.integers(
            0, 8, RECORDS, dtype=np.uint64
        ) * np.uint64(uf.PAGE_SIZE)
        yield f"lookup/{n}", calling(lambda: table.lookup(addresses)), lambda: None  # noqa: B023
        for api in WIRES:
            records = page_faults(api, addresses)
            yield f"dispatch/{api}/{n}", calling(lambda: table.dispatch(records)), lambda: None  # noqa: B023
    for api in WIRES:
        records = page_faults(api, np.full(RECORDS, 1 << 44, np.uint64))
        yield f"as_v2/{api}", calling(lambda: uf.as_v2(records)), lambda: None  # noqa: B023


def main(folder: Path) -> None:
    gc.disable()
    count = marks(folder)
    for sequences in (reading(), translating()):
        for name, run, prepare in sequences:
            # The first pair only warms up: the interpreter adapts new code, malloc's lists fill.
            for times in (FEW, MANY, FEW, MANY):
                prepare()
                count.count_from_here()
                run(times)
                count.count_to_here(f"{name}:{times}".encode())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
