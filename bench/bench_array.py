"""Lazy arrays with pytest-benchmark, every result checked. And that arrays.py measures at all."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import userfault as uf
from arrays import WORKLOADS
from arrays_contenders import (
    CHUNK,
    HUGE,
    MIB,
    Compressed,
    Data,
    Peak,
    by_threads,
    copy_pages,
    file_of_floats,
    first_element,
    gathered,
    library,
    os_pread_pages,
    pread_pages,
    summed,
    summed_in_blocks,
)
from arrays_workloads import QUICK, Setting

ROUNDS = 10
TINY = replace(QUICK, data=16 * MIB, pages=256, compressed=1 * MIB, pretouch=1 * MIB)


@pytest.fixture(scope="module")
def data(needs_uffd: None) -> Iterator[Data]:
    with file_of_floats(TINY.data) as data:
        yield data


@pytest.mark.parametrize("name", ["lazy", "lazy, 2 MiB", "limited", "fromfile", "memmap"])
def test_sum(benchmark: BenchmarkFixture, data: Data, name: str) -> None:
    benchmark.group = f"the sum of {TINY.data >> 20} MiB"
    ways = {
        "lazy": data.lazy,
        "lazy, 2 MiB": lambda: data.lazy(page_bytes=HUGE),
        "limited": lambda: data.lazy(memory_limit=MIB),
        "fromfile": data.read,
        "memmap": data.memmap,
    }
    benchmark.pedantic(summed, (ways[name], data.total), rounds=ROUNDS)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("workload", WORKLOADS)
def test_every_workload_has_rows(data: Data, workload: str) -> None:
    rows = list(WORKLOADS[workload](Setting(data, TINY, rounds=1)))
    assert rows
    for row in rows:
        assert row["workload"] == workload
        assert 0 < row["best"] <= row["median"]
    goals = [figure for row in rows for figure in row["figures"] if figure["goal"]]
    assert bool(goals) == (workload in ("scan", "gather", "limit"))


def test_wrong_results_are_seen(data: Data) -> None:
    for measured in (summed, summed_in_blocks, first_element):
        with pytest.raises(RuntimeError, match="wrong bytes"):
            measured(data.lazy, -1.0)
    with pytest.raises(RuntimeError, match="wrong bytes"):
        gathered(data.lazy, np.arange(2), np.array([-1.0, -1.0]))


def test_all_who_read_pages_find_the_same(data: Data) -> None:
    offsets = np.arange(0, TINY.data, uf.PAGE_SIZE, dtype=np.uint64)
    expected = int(np.fromfile(data.path)[offsets // 8].sum())
    assert expected
    with data.lazy() as array, open(data.path, "rb") as file:
        assert by_threads(lambda share: copy_pages(array, share), offsets, 3)[1] == expected
        assert pread_pages(file.fileno(), offsets) == expected
        assert os_pread_pages(file.fileno(), offsets) == expected
        assert pread_pages(file.fileno(), np.array([TINY.data], np.uint64)) == -1


def test_any_part_of_compressed_chunks_can_be_had() -> None:
    compressed = Compressed(3 * CHUNK + 8)
    with compressed.by_python() as array:
        truth = array.tobytes()
    assert np.frombuffer(truth).sum() == compressed.total
    context = ctypes.byref(compressed.ctx)
    for start, end in ((0, len(truth)), (CHUNK, 2 * CHUNK), (8, CHUNK + 16), (CHUNK - 8, len(truth))):
        room = ctypes.create_string_buffer(end - start)
        assert library().inflate_chunks(context, start, room, end - start) == 0
        assert room.raw == truth[start:end]
    compressed.starts[1] -= 1
    room = ctypes.create_string_buffer(CHUNK)
    assert library().inflate_chunks(context, 0, room, CHUNK) < 0


def test_a_peak_is_seen_after_it_is_over() -> None:
    def grow() -> None:
        room = np.ones(64 * MIB, np.uint8)
        time.sleep(0.2)
        del room
        time.sleep(0.05)

    assert 60 * MIB < Peak.of(grow) < 100 * MIB
