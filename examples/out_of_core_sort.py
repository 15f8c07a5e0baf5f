"""Sorts a file of 64-bit integers that is larger than the memory it may take.

    python examples/out_of_core_sort.py                                # 256 MiB of random numbers in 32 MiB
    python examples/out_of_core_sort.py numbers.bin --memory 1000000000

An external merge sort in which no line reads or writes a file: two lazy arrays in mode "r+" are the files,
and one Budget holds both to the limit. Runs are sorted in place, so a given file is changed, and then merged
into a second file, numbers.bin.sorted.
"""

import argparse
import contextlib
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import userfault as uf

try:
    from rich.progress import Progress
except ModuleNotFoundError:
    Progress = contextlib.nullcontext

MIB = 1 << 20


def sort(array: uf.LazyArray, out: uf.LazyArray, memory: int) -> Iterator[int]:
    """Sort `array` into `out`; yields how many numbers were done, each of them twice in all."""
    n = memory // 2 // 8
    runs = [array[i : i + n] for i in range(0, len(array), n)]
    for run in runs:
        run.prefetch()  # in large pieces, before the sort asks for it page by page
        run.sort()
        yield len(run)
    step = max(1, memory // 8 // 8 // len(runs))
    while runs:
        heads = [run[:step] for run in runs]
        # What no run has a smaller number behind, outside the heads.
        most = min(head[-1] for head in heads)
        counts = [int(np.searchsorted(head, most, "right")) for head in heads]
        merged, out = np.split(out, [sum(counts)])
        np.concatenate([head[:n] for head, n in zip(heads, counts, strict=True)], out=merged)
        merged.sort()
        runs = [run[n:] for run, n in zip(runs, counts, strict=True) if n < len(run)]
        yield len(merged)


def checksums(array: uf.LazyArray, step: int) -> tuple[int, int, int]:
    """The same for every permutation."""
    blocks = [array[i : i + step] for i in range(0, len(array), step)]
    xor = np.bitwise_xor.reduce([np.bitwise_xor.reduce(block) for block in blocks])
    return len(array), int(xor), int(np.sum([block.sum() for block in blocks]))


def is_sorted(array: uf.LazyArray, step: int) -> bool:
    blocks = (array[i : i + step + 1] for i in range(0, len(array), step))
    return all((block[:-1] <= block[1:]).all() for block in blocks)


def make(path: Path, nbytes: int, step: int) -> None:
    rng = np.random.default_rng(0)
    with open(path, "wb") as file:
        for left in range(nbytes // 8, 0, -step):
            rng.integers(-(2**63), 2**63, min(step, left), dtype=np.int64).tofile(file)


def in_memory() -> int:
    """The bytes of anonymous memory that this process has: pages of lazy arrays, and everything else."""
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10


def main(path: Path, memory: int) -> None:
    step = memory // 32
    target = path.with_name(path.name + ".sorted")
    target.touch()
    os.truncate(target, path.stat().st_size)
    budget = uf.Budget(memory)
    with (
        uf.lazy_array(path, dtype=np.int64, mode="r+", memory_limit=budget) as array,
        uf.lazy_array(target, dtype=np.int64, mode="r+", memory_limit=budget) as out,
        Progress() as progress,
    ):
        task = progress and progress.add_task("sorting", total=2 * len(array))
        before = checksums(array, step)
        without, most, started = in_memory() - budget.used, 0, time.perf_counter()
        for n in sort(array, out, memory):
            most = max(most, in_memory())
            if progress:
                progress.advance(task, n)
            else:
                print(end=".", flush=True)
        out.flush()
        seconds = time.perf_counter() - started
        if checksums(out, step) != before or not is_sorted(out, step):
            sys.exit(f"{target} is not what was to be sorted")
        faults, written = (sum(int(a.stats()[name]) for a in (array, out)) for name in ("records", "written"))
    print(f"\n{before[0]:,} numbers ({before[0] * 8 / MIB:,.1f} MiB) sorted in {seconds:.1f} s")
    print(f"RssAnon: {most / MIB:.1f} MiB at the most, {without / MIB:.1f} without; limit {memory / MIB:.1f}")
    print(f"{faults:,} faults, {written:,} pages written back")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Sort a file of int64 that is larger than memory.")
    parser.add_argument("path", nargs="?", type=Path, help="the file; without one, random numbers")
    parser.add_argument("--bytes", type=int, default=256 * MIB, help="of random numbers (%(default)s)")
    parser.add_argument("--memory", type=int, default=32 * MIB, help="bytes that may be taken (%(default)s)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if given.path is None:
            given.path = Path(folder, "numbers.bin")
            make(given.path, given.bytes, given.memory // 32)
        main(given.path, given.memory)
