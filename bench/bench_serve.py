"""Served faults with pytest-benchmark; every byte that came is checked. And that serve.py measures at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import serve_life
import userfault as uf
from serve import MODES
from serve_contenders import (
    BACKINGS,
    CONTENDERS,
    CPU,
    INLINE_CONTENDERS,
    PAIR,
    PINNED,
    Data,
    random_data,
    served,
    touch,
)
from serve_turns import QUICK, Setting, in_order, scattered

PAGES = 256
LENGTH = PAGES * uf.PAGE_SIZE
ROUNDS = 20
ALL = CONTENDERS | INLINE_CONTENDERS
TINY = replace(QUICK, data=4 << 20, touches=64, stream=64, pending=128, ranges=(1, 100), idle=0.05)


@pytest.fixture(scope="module")
def data(needs_uffd: None) -> Iterator[Data]:
    with random_data(TINY.data) as data:
        yield data


@pytest.mark.parametrize(
    ("threads", "name"),
    [(n, name) for n in (1, 16) for name in ALL if n == 1 or name not in (PAIR, PINNED)],
)
@pytest.mark.parametrize("backing", BACKINGS)
def test_random(benchmark: BenchmarkFixture, data: Data, backing: str, threads: int, name: str) -> None:
    benchmark.group = f"{PAGES} random pages from {backing}, touched by {threads} threads"
    contender = ALL[name]
    offsets = scattered(LENGTH, PAGES)
    expected = data.memory[offsets]
    regions: list[uf.Region] = []
    with ExitStack() as stack:

        def fresh() -> tuple[tuple[uf.Region], dict[str, object]]:
            stack.close()
            regions[:] = [stack.enter_context(contender.open(data, backing, LENGTH))]
            return (regions[0],), {}

        benchmark.pedantic(  # type: ignore[no-untyped-call]
            lambda region: touch(region, offsets, expected, threads, contender.cpu),
            setup=fresh,
            rounds=ROUNDS,
        )
        data.check(regions[0])


@pytest.mark.parametrize("fill", [serve_life.touched, serve_life.materialized])
@pytest.mark.parametrize("page_bytes", [uf.PAGE_SIZE, serve_life.HUGE])
def test_fill(benchmark: BenchmarkFixture, data: Data, fill: object, page_bytes: int) -> None:
    benchmark.group = f"{TINY.data >> 20} MiB and the service around them"
    benchmark.pedantic(fill, (data, page_bytes), rounds=ROUNDS)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(("mode", "workload"), [(mode, name) for mode in MODES for name in MODES[mode]])
def test_every_workload_has_rows(data: Data, mode: str, workload: str) -> None:
    if workload == "close" and uf.probe().user_mode_only:
        pytest.skip("system calls on missing pages need privilege")
    rows = list(MODES[mode][workload](Setting(data, TINY, rounds=1, touchers=(1, 2))))
    assert rows
    for row in rows:
        assert row["workload"] == workload
        assert row["best"] <= row["median"]
        assert row["best"] > 0 or workload == "idle"
    figures = [figure for row in rows for figure in row["figures"]]
    assert any(figure["goal"] for figure in figures)
    if workload == "close":
        counts = {figure["what"]: figure["value"] for figure in rows[0]["figures"]}
        assert counts["pages that came"] + counts["pages that failed closed"] == TINY.data // uf.PAGE_SIZE
        assert counts["pages that were wrong"] == counts["pages never answered"] == 0


def test_wrong_bytes_are_seen(data: Data) -> None:
    offsets = scattered(LENGTH, PAGES)
    expected = data.memory[offsets]
    expected[7] ^= 1
    with served(data, "memory", LENGTH) as (_, region):
        with pytest.raises(RuntimeError, match=f"1 of {PAGES} bytes were wrong"):
            touch(region, offsets, expected, threads=4, cpu=CPU)
        data.check(region)
        region.array[LENGTH - 1] ^= 1
        with pytest.raises(RuntimeError, match="a byte of the region is wrong"):
            data.check(region)


def test_memory_of_huge_pages_is_a_rival(data: Data) -> None:
    assert serve_life.copied(data) > 0
    assert np.array_equal(data.memory, data.mapped)


def test_touching_threads_have_neighbours_or_random_pages() -> None:
    page = uf.PAGE_SIZE
    assert (in_order(9, 2)[0::2] // page).tolist() == [0, 1, 2, 3]
    assert (in_order(9, 2)[1::2] // page).tolist() == [4, 5, 6, 7]
    pages = scattered(64 * page, 16) // page
    assert len(set(pages.tolist())) == 16
    assert max(pages) < 64
