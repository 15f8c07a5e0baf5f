"""Lazy arrays on whichever wire the kernel speaks: what depends on it, and runs in the lab too."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest

import userfault as uf
from support import KERNEL_WIRES, PAGE, Child, has

pytestmark = pytest.mark.usefixtures("needs_privilege")
LIMIT = 1 << 20


@pytest.fixture
def data() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, 4 * LIMIT + 100, np.uint8)


@pytest.fixture
def path(data: np.ndarray, tmp_path: Path) -> Path:
    data.tofile(tmp_path / "data")
    return tmp_path / "data"


def test_reading_under_a_limit(data: np.ndarray, path: Path) -> None:
    budget = uf.Budget(LIMIT)
    a, b = (uf.lazy_array(path, memory_limit=budget) for _ in range(2))
    assert np.array_equal(a, data)
    assert np.array_equal(b, data)
    assert budget.used <= LIMIT
    assert a.stats()["evicted"] > 0
    assert PAGE * (a.resident.sum() + b.resident.sum()) <= LIMIT


@pytest.mark.parametrize("mode", ["c", "r+"])
def test_writing(data: np.ndarray, path: Path, mode: uf.lazy.Mode) -> None:
    if "msg" not in KERNEL_WIRES:
        with pytest.raises(uf.UnsupportedError, match="write-protect"):
            uf.lazy_array(path, mode=mode)
        return
    a = uf.lazy_array(path, mode=mode, memory_limit=LIMIT)
    a[3 * PAGE] += 1  # a missing page
    assert a[5 * PAGE] == data[5 * PAGE]
    a[5 * PAGE] += 1  # one that is there
    assert np.flatnonzero(a.dirty).tolist() == [3, 5]
    expected = data.copy()
    expected[[3 * PAGE, 5 * PAGE]] += 1
    assert np.array_equal(a, expected)  # which drives out everything else
    a.close()
    assert np.array_equal(np.fromfile(path, np.uint8), expected if mode == "r+" else data)


def test_a_page_that_cannot_be_had(path: Path, child: Child) -> None:
    done = child(
        f"""
        import os, faulthandler
        faulthandler.enable()
        a = uf.lazy_array({str(path)!r})
        os.truncate({str(path)!r}, 2 * PAGE)
        assert a[:PAGE].any()
        print("before", flush=True)
        a[10 * PAGE]
        """
    )
    assert done.returncode == -(signal.SIGBUS if has(uf.Feature.POISON) else signal.SIGSEGV), done.stderr
    assert done.stdout == "before\n"
    said, _, traceback = done.stderr.partition("\n")
    assert str(path) in said
    assert f"byte {10 * PAGE} cannot be had" in said
    assert "No data available" in said
    assert "Fatal Python error" in traceback


def test_without_views_nothing_is_left(path: Path) -> None:
    a = uf.lazy_array(path)
    regions = a._lazy()._service._userfaultfd.regions
    before = len(regions)
    view = memoryview(a[PAGE:])
    del a
    assert view[0] == np.fromfile(path, np.uint8, 1, offset=PAGE)[0]
    assert len(regions) == before
    view.release()
    assert len(regions) == before - 1
