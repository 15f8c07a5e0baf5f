"""Lazy arrays over zarr with pytest-benchmark. And that stores.py sees wrong results, and measures memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

for library in ("zarr", "dask.array", "scipy"):
    pytest.importorskip(library)

import stores_workloads  # noqa: E402
from stores_data import LEAST, Stored, arrays, scattered  # noqa: E402
from stores_turns import Watch, peak, restart_peak, take_turns  # noqa: E402

ROUNDS = 5
MIB = 1 << 20


@pytest.fixture(scope="module")
def stored(needs_uffd: None) -> Iterator[dict[str, Stored]]:
    with arrays(LEAST) as stored:
        yield stored


@pytest.mark.parametrize("name", ["1-D", "2-D"])
def test_sum(benchmark: BenchmarkFixture, stored: dict[str, Stored], name: str) -> None:
    benchmark.group = f"the sum of {LEAST >> 20} MiB, {name}"

    def summed() -> None:
        stores_workloads.summed(stored[name], Watch())

    benchmark.pedantic(summed, rounds=ROUNDS)  # type: ignore[no-untyped-call]


def test_the_arrays_are_compressed_and_of_several_chunks(stored: dict[str, Stored]) -> None:
    for about in (array.about() for array in stored.values()):
        assert about["nbytes"] == LEAST
        assert all(n > chunk for n, chunk in zip(about["shape"], about["chunks"], strict=True))
        assert about["compressed"] > 2


def test_wrong_results_are_seen(stored: dict[str, Stored]) -> None:
    right = stored["2-D"]
    elements = (stores_workloads.elements_one_by_one, stores_workloads.elements_at_once)
    for turn in (*elements, stores_workloads.elements_by_dask, stores_workloads.everything):
        turn(right, Watch())
        with pytest.raises(RuntimeError, match="wrong bytes"):
            turn(replace(right, elements=right.elements + 1), Watch())
    for turn in (stores_workloads.elements, stores_workloads.elements_prefetched):
        with pytest.raises(RuntimeError, match="wrong bytes"):
            turn(replace(right, elements=right.elements + 1), Watch())
    for turn in (stores_workloads.summed, stores_workloads.materialized, stores_workloads.everything):
        with pytest.raises(RuntimeError, match="wrong bytes"):
            turn(replace(right, total=right.total + 1e6), Watch())


def test_random_elements_differ() -> None:
    rows, columns = scattered((200, 300), 100)
    assert len(set(zip(rows.tolist(), columns.tolist(), strict=True))) > 90
    assert rows.max() < 200 <= columns.max() < 300


def test_all_take_turns_and_their_memory_is_seen() -> None:
    calls: list[str] = []

    def turn(name: str, nbytes: int, watch: Watch) -> None:
        calls.append(name)
        with watch.timing("case", name):
            np.ones(nbytes, np.uint8)
        watch.beside = 5 * MIB

    turns = take_turns({"a": partial(turn, "a", 1), "b": partial(turn, "b", 64 * MIB)}, 3, MIB)
    assert sorted(calls) == list("aaabbb")
    assert all(set(calls[i : i + 2]) == {"a", "b"} for i in (0, 2, 4))
    assert set(turns.of("case").seconds) == {"a", "b"}
    assert 60 * MIB < turns.peak("case", "b") - turns.peak("case", "a") < 70 * MIB
    assert turns.peak("case", "a") >= 5 * MIB


def test_a_peak_is_counted_anew() -> None:
    np.ones(64 * MIB, np.uint8)
    before = restart_peak()
    assert peak() - before < 16 * MIB
