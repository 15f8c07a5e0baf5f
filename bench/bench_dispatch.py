"""lookup() and dispatch() with pytest-benchmark; every answer is checked against the others."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from compare import keep_freed_memory
from dispatch import REGIONS, Layout, contenders

layout = functools.cache(Layout)


def run(benchmark: BenchmarkFixture, contender: Callable[[], object]) -> Any:
    keep_freed_memory()
    return benchmark.pedantic(contender, rounds=20, warmup_rounds=1)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("name", ["ours", "searchsorted", "bisect"])
@pytest.mark.parametrize("n", REGIONS)
def test_lookup(benchmark: BenchmarkFixture, n: int, name: str) -> None:
    benchmark.group = f"lookup among {n:,} regions"
    ids = run(benchmark, contenders(layout(n))["lookup"][name])
    np.testing.assert_array_equal(ids, layout(n).lookup_searchsorted())


@pytest.mark.parametrize("name", ["ours", "searchsorted"])
@pytest.mark.parametrize("n", REGIONS)
def test_dispatch(benchmark: BenchmarkFixture, n: int, name: str) -> None:
    benchmark.group = f"dispatch among {n:,} regions"
    ids, offsets = run(benchmark, contenders(layout(n))["dispatch"][name])
    expected = layout(n).lookup_bisect()
    np.testing.assert_array_equal(ids, expected)
    held = ids >= 0
    np.testing.assert_array_equal(offsets[~held], -1)
    inside = layout(n).addresses - layout(n).starts[ids]
    np.testing.assert_array_equal(offsets[held], inside[held])
