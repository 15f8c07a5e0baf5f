"""What stores.py measures: a few elements, whole arrays, a second pass, a function on a window, one fault."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from scipy.ndimage import uniform_filter

import userfault as uf
from arrays_contenders import at_random, check
from arrays_workloads import Case
from compare import Row
from serve_turns import scattered as scattered_pages
from stores_data import Stored, scattered
from stores_ones import Ones
from stores_turns import Turn, Turns, Watch, take_turns
from userfault.stores.zarr import open_zarr

LAZY, PREFETCH, MATERIALIZE = "lazy", "lazy, prefetch", "lazy, materialize"
ONE_BY_ONE, VINDEX, ALL, ORDINARY, DASK = "zarr by turns", "zarr.vindex", "zarr, all first", "ndarray", "dask"
PAGER, BUFFER = "lazy, Pager", "lazy, Buffer"
MS = "ms", 1e3
MIB = 1 << 20
PARALLEL = 8  # threads that touch pages: as many as a pager has workers
SMOOTH = 9  # elements that uniform_filter takes the mean of, in each dimension

MANY = 1_000_000
GATHER, SUM, SUM_AGAIN, MANY_AGAIN = "elements", "sum of all", "sum", f"{MANY:,} elements"


@dataclass(frozen=True)
class Setting:
    """What every workload is given."""

    stored: Mapping[str, Stored]
    rounds: int
    pages: int  # touched one by one
    pretouch: int  # bytes, before each turn

    def turns(self, contenders: Mapping[str, Turn]) -> Turns:
        return take_turns(contenders, self.rounds, self.pretouch)


def case_rows(
    turns: Turns, workload: str, key: str, case: str, unit: str, scale: float
) -> tuple[Case, dict[str, Row]]:
    """A comparison, and its rows: with the peak of memory."""
    compared = Case(workload, case, turns.of(key), unit, scale)
    rows = compared.rows()
    for name, row in rows.items():
        row["peak_mib"] = turns.peak(key, name) / MIB
    return compared, rows


# -- Whole arrays and a few elements ------------------------------------------------------------------------


def chunks(setting: Setting) -> Iterator[Row]:
    """Of each array: random elements, the sum of all, and the same again."""
    for name, stored in setting.stored.items():
        turns = setting.turns(
            {
                "elements": partial(elements, stored),
                "elements, prefetch": partial(elements_prefetched, stored),
                "elements by turns": partial(elements_one_by_one, stored),
                "elements, vindex": partial(elements_at_once, stored),
                "elements, dask": partial(elements_by_dask, stored),
                "sum": partial(summed, stored),
                "sum, materialize": partial(materialized, stored),
                "everything": partial(everything, stored),
            }
        )
        case, rows = case_rows(turns, "gather", GATHER, f"{name}: {len(stored.elements):,} elements", *MS)
        for lazy in (LAZY, PREFETCH):
            rows[lazy]["figures"] = [case.time(lazy, to) for to in (ONE_BY_ONE, VINDEX, DASK, ALL)]
        yield from rows.values()
        case, rows = case_rows(turns, "scan", SUM, f"{name}: {SUM}", *MS)
        for lazy in (LAZY, MATERIALIZE):
            rows[lazy]["figures"] = [case.time(lazy, ALL, 1.15)]
        yield from rows.values()
        for again in (SUM_AGAIN, MANY_AGAIN):
            case, rows = case_rows(turns, "again", again, f"{name}: {again}", *MS)
            for lazy in (LAZY, MATERIALIZE):
                rows[lazy]["figures"] = [case.time(lazy, ORDINARY, 1.15)]
            yield from rows.values()


def elements(stored: Stored, watch: Watch) -> None:
    with stored.lazy(watch) as array:
        with watch.timing(GATHER, LAZY):
            found = array[stored.indices]
        check(np.array_equal(found, stored.elements))


def elements_prefetched(stored: Stored, watch: Watch) -> None:
    with stored.lazy(watch) as array:
        with watch.timing(GATHER, PREFETCH):
            array.prefetch(stored.indices)
            found = array[stored.indices]
        check(np.array_equal(found, stored.elements))


def elements_one_by_one(stored: Stored, watch: Watch) -> None:
    places = list(zip(*(axis.tolist() for axis in stored.indices), strict=True))
    array = stored.fresh()
    with watch.timing(GATHER, ONE_BY_ONE):
        found = [array[place] for place in places]
    check(np.array_equal(np.array(found), stored.elements))


def elements_at_once(stored: Stored, watch: Watch) -> None:
    array = stored.fresh()
    with watch.timing(GATHER, VINDEX):
        found = array.vindex[stored.indices]
    check(np.array_equal(found, stored.elements))


def elements_by_dask(stored: Stored, watch: Watch) -> None:
    array = stored.dask()
    with watch.timing(GATHER, DASK):
        found = array.vindex[stored.indices].compute()
    check(np.array_equal(found, stored.elements))


def summed(stored: Stored, watch: Watch) -> None:
    with stored.lazy(watch) as array:
        with watch.timing(SUM, LAZY):
            found = array.sum()
        check(found == stored.total)
        again(array, LAZY, watch)


def materialized(stored: Stored, watch: Watch) -> None:
    with stored.lazy(watch) as array:
        with watch.timing(SUM, MATERIALIZE):
            array.materialize()
            found = array.sum()
        check(found == stored.total)
        again(array, MATERIALIZE, watch)


def everything(stored: Stored, watch: Watch) -> None:
    array = stored.fresh()
    with watch.timing(GATHER, ALL):
        with watch.timing(SUM, ALL):
            whole = np.asarray(array[:])
        found = whole[stored.indices]
    check(np.array_equal(found, stored.elements))
    read = watch.seconds[SUM, ALL]
    with watch.timing(SUM, ALL):
        total = whole.sum()
    watch.seconds[SUM, ALL] += read
    check(total == stored.total)
    again(whole, ORDINARY, watch)


def again(array: npt.NDArray[Any], contender: str, watch: Watch) -> None:
    """A second pass."""
    with watch.timing(SUM_AGAIN, contender):
        array.sum()
    where = scattered(array.shape, MANY)
    with watch.timing(MANY_AGAIN, contender):
        array[where]


# -- A function that needs an ndarray -----------------------------------------------------------------------


def window(setting: Setting) -> Iterator[Row]:
    """scipy.ndimage.uniform_filter on a window: of the lazy array as it is, or of what zarr read."""
    stored = setting.stored["2-D"]
    side = stored.zarr.shape[0]
    part = slice(side // 4 + 100, side // 2 + 100)
    place = (part, part)
    expected = uniform_filter(stored.fresh()[place], SMOOTH)
    key = f"uniform_filter, {side // 4:,} x {side // 4:,}"

    def lazily(watch: Watch, prefetch: bool) -> None:
        name = PREFETCH if prefetch else LAZY
        with stored.lazy(watch) as array:
            with watch.timing(key, name):
                if prefetch:
                    array.prefetch(place)
                found = uniform_filter(array[place], SMOOTH)
            check(np.array_equal(found, expected))

    def by_zarr(watch: Watch) -> None:
        array = stored.fresh()
        with watch.timing(key, "zarr"):
            found = uniform_filter(array[place], SMOOTH)
        check(np.array_equal(found, expected))

    turns = setting.turns(
        {LAZY: partial(lazily, prefetch=False), PREFETCH: partial(lazily, prefetch=True), "zarr": by_zarr}
    )
    case, rows = case_rows(turns, "window", key, key, *MS)
    for lazy in (LAZY, PREFETCH):
        rows[lazy]["figures"] = [case.time(lazy, "zarr")]
    yield from rows.values()


# -- One fault ----------------------------------------------------------------------------------------------


def fault(setting: Setting) -> Iterator[Row]:
    """Random pages, one at a time from the source: through a pager, and without one."""
    nbytes = 4 * setting.pages * uf.PAGE_SIZE
    offsets = scattered_pages(nbytes, setting.pages)
    memory = np.ones(nbytes, np.uint8)

    def touched(threads: int, name: str, watch: Watch) -> None:
        source = Ones(nbytes) if name == PAGER else uf.sources.Buffer(memory)
        with uf.lazy_array(source, readahead=0) as array:
            watch.seconds[f"{threads}", name] = at_random(array, offsets, threads)
            check(bool((array[offsets] == 1).all()))

    for threads in (1, PARALLEL):
        turns = setting.turns({name: partial(touched, threads, name) for name in (PAGER, BUFFER)})
        case, rows = case_rows(
            turns, "fault", f"{threads}", f"random pages, threads: {threads}", "us/page", 1e6 / setting.pages
        )
        rows[PAGER]["figures"] = [case.time(PAGER, BUFFER)]
        yield from rows.values()


# -- Opening ------------------------------------------------------------------------------------------------


def opening(setting: Setting) -> Iterator[Row]:
    """How long it takes to open an array, which for a lazy one starts a pager, and to close it."""
    stored = setting.stored["1-D"]

    def lazily(name: str, watch: Watch) -> None:
        with ExitStack() as stack:
            with watch.timing("open", name):
                array = open_zarr(stored.path) if name == LAZY else uf.lazy_array(Ones(MIB))
                stack.push(array)
            if name == LAZY:
                check(array[0] == stored.zarr[0])
            with watch.timing("close", name):
                stack.close()

    def by_zarr(watch: Watch) -> None:
        with watch.timing("open", "zarr.open"):
            zarr.open_array(stored.path, mode="r")

    turns = setting.turns({LAZY: partial(lazily, LAZY), PAGER: partial(lazily, PAGER), "zarr": by_zarr})
    for key in ("open", "close"):
        yield from case_rows(turns, "open", key, key, *MS)[1].values()
