"""How far is read ahead: the streams of `Served`, and what a service makes of them on the real kernel."""

from __future__ import annotations

import ctypes
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import userfault as uf
from support import touching
from userfault._served import Served

PAGE = uf.PAGE_SIZE
HUGE = 512  # pages


def served(pages: int = 1 << 16, readahead: int = -1, unit: int = 1) -> Served:
    return Served(uf.sources.Zero(), 0, pages, unit, readahead, False)


# -- the streams ---------------------------------------------------------------------------------------


def test_the_first_fault_of_a_stream_reads_nothing_ahead() -> None:
    region = served()
    assert region.advance(100, 101) == 101
    assert region.advance(500, 501) == 501


def test_a_stream_is_read_ahead_as_far_as_it_has_come() -> None:
    region = served()
    page, asked = 0, []
    for _ in range(16):
        end = region.advance(page, page + 1)
        asked.append(end - page - 1)
        page = end
    assert asked[:5] == [0, 4, 7, 15, 31]
    assert max(asked) == asked[-1] == 4096  # 16 MiB


def test_what_is_read_ahead_ends_with_the_region() -> None:
    region = served(10)
    region.advance(7, 8)
    assert region.advance(8, 9) == 10
    fixed = served(10, readahead=100)
    assert fixed.advance(3, 4) == 10


@given(st.integers(0, 2**31))
def test_random_faults_read_nothing_ahead(seed: int) -> None:
    """One in a thousand may look like a stream by chance."""
    region = served(1 << 24)
    pages = np.random.default_rng(seed).choice(1 << 24, 2000, replace=False).tolist()
    assert sum(region.advance(page, page + 1) - page - 1 for page in pages) <= 2 * 4


def test_streams_that_take_turns_are_told_apart() -> None:
    region = served()
    starts = [i * 2000 for i in range(30)]
    at = dict.fromkeys(starts, 0)
    for _ in range(8):
        for start in starts:
            at[start] = region.advance(start + at[start], start + at[start] + 1) - start
    assert set(at.values()) == {510}


def test_a_stream_goes_on_behind_pages_that_were_there() -> None:
    region = served()
    region.advance(0, 1)
    region.fill(1, 40)
    assert region.advance(40, 41) > 41
    far = served()
    far.advance(0, 1)
    assert far.advance(40, 41) == 41


def test_random_faults_do_not_lengthen_a_stream_that_was() -> None:
    region = served()
    page = 0
    for _ in range(12):
        page = region.advance(page, page + 1)
    assert region.advance(60_000, 60_001) == 60_001


@pytest.mark.parametrize("readahead", [0, 1, 100])
def test_a_fixed_number_of_pages(readahead: int) -> None:
    region = served(readahead=readahead)
    for page in (5, 6, 7, 900):
        assert region.advance(page, page + 1) == page + 1 + readahead


@given(
    st.lists(st.tuples(st.integers(0, 300), st.integers(1, 300)), max_size=30),
)
def test_residency_is_a_set_of_pages(runs: list[tuple[int, int]]) -> None:
    region = served(300)
    model = np.zeros(300, bool)
    for first, length in runs:
        end = min(first + length, 300)
        region.fill(first, end)
        model[first:end] = True
    assert (region.resident == model).all()


# -- on the kernel -------------------------------------------------------------------------------------


def noise(pages: int) -> np.ndarray:
    return np.random.default_rng(pages).integers(1, 256, pages * PAGE, dtype=np.uint8)


def settled(service: uf.FaultService, region: uf.Region) -> int:
    """The pages that are there, once no more come."""
    before, now = -1, int(service.resident(region).sum())
    while before != now:
        time.sleep(0.05)
        before, now = now, int(service.resident(region).sum())
    return now


def test_a_scan_takes_few_faults_and_random_touches_fill_nothing_more(
    u: uf.Userfaultfd, service: uf.FaultService
) -> None:
    data = noise(4096)
    scanned, random = u.map(len(data)), u.map(len(data))
    for region in (scanned, random):
        service.serve(region, uf.sources.Buffer(data))
    touching(scanned, range(4096)).join(60)
    assert settled(service, scanned) == 4096
    # 2 + 4 + 7 + 15 + ...: twelve doublings, and some that came while the next pages were on their way.
    assert service.stats(scanned)["records"] < 400
    assert service.stats(scanned)["ahead"] > 3000
    pages = np.random.default_rng(1).choice(2048, 100, replace=False) * 2
    touching(random, pages).join(60)
    assert settled(service, random) <= 110
    assert (scanned.array == data).all()
    assert (random.array == data).all()


@pytest.mark.parametrize("readahead", [0, 3, 40])
def test_a_fixed_read_ahead_on_the_kernel(
    u: uf.Userfaultfd, service: uf.FaultService, readahead: int
) -> None:
    data = noise(200)
    region = u.map(len(data))
    service.serve(region, uf.sources.Buffer(data), readahead=readahead)
    assert region.array[10 * PAGE] == data[10 * PAGE]
    settled(service, region)
    assert np.flatnonzero(service.resident(region)).tolist() == list(range(10, 11 + readahead))
    assert (region.array == data).all()


@pytest.mark.parametrize("pages", [2, 3, 64, HUGE, HUGE + 5, 3 * HUGE])
def test_a_unit_comes_as_a_whole(u: uf.Userfaultfd, service: uf.FaultService, pages: int) -> None:
    data = noise(4 * HUGE + 1)
    region = u.map(len(data))
    service.serve(region, uf.sources.Buffer(data), readahead=0, page_bytes=pages * PAGE)
    for page in (4 * HUGE, HUGE + 1):
        assert region.array[page * PAGE] == data[page * PAGE]
    expected = np.zeros(4 * HUGE + 1, bool)
    for page in (4 * HUGE, HUGE + 1):
        expected[page - page % pages :][:pages] = True
    settled(service, region)
    assert (service.resident(region) == expected).all()
    assert (region.array == data).all()


def dontneed(region: uf.Region, first: int, end: int) -> None:
    address = ctypes.c_void_p(region.start + first * PAGE)
    assert ctypes.CDLL(None).madvise(address, ctypes.c_size_t((end - first) * PAGE), 4) == 0


def test_dropped_pages_come_again_and_residency_stays_true(
    u: uf.Userfaultfd, service: uf.FaultService
) -> None:
    data = noise(2 * HUGE)
    region = u.map(len(data))
    service.serve(region, uf.sources.Buffer(data))
    service.materialize(region)
    assert service.resident(region).all()
    dontneed(region, 100, 900)
    assert np.flatnonzero(~service.resident(region)).tolist() == list(range(100, 900))
    assert (region.array == data).all()
    dontneed(region, 0, 2 * HUGE)
    # The engine has not been told: a fault tells it of the neighbours too, so that a scan reads ahead.
    before = int(service.stats(region)["records"])
    touching(region, range(2 * HUGE)).join(60)
    assert service.stats(region)["records"] - before < 200
    assert (region.array == data).all()


def test_arguments_that_make_no_sense(u: uf.Userfaultfd, service: uf.FaultService) -> None:
    region = u.map(PAGE)
    for wrong in ({"page_bytes": 0}, {"page_bytes": 100}, {"page_bytes": -PAGE}, {"readahead": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            service.serve(region, uf.sources.Zero(), **wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="much"):
        service.serve(region, uf.sources.Zero(), readahead="much")  # type: ignore[arg-type]
    for odd in ({"page_bytes": "big"}, {"readahead": 1.5}):
        with pytest.raises(TypeError):
            service.serve(region, uf.sources.Zero(), **odd)  # type: ignore[arg-type]
    service.serve(region, uf.sources.Zero())
