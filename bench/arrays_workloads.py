"""What arrays.py measures: whole arrays, a few elements, threads, a memory limit, a compressed source."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

import userfault as uf
from arrays_contenders import (
    BLOCK,
    HUGE,
    MIB,
    Compressed,
    Data,
    Offsets,
    Open,
    Peak,
    at_random,
    by_threads,
    check,
    copy_pages,
    first_element,
    gathered,
    opened,
    os_pread_pages,
    pread_pages,
    summed,
    summed_in_blocks,
)
from compare import Comparison, Row
from serve_turns import Turn, judged, scattered, turns
from userfault.cli.machine import memory

LAZY, LAZY_HUGE, PAIR, PREFETCH = "lazy", "lazy, 2 MiB", "lazy, pair", "lazy, prefetch"
INLINE = "lazy, inline"
MEMMAP, READ, PREAD, OS_PREAD = "memmap", "fromfile", "pread in C", "os.pread"
LIMITED, UNLIMITED = "limited", "no limit"
PYTHON, C = "all, Python", "all, C"
ELEMENTS = 1_000
THREADS = 4
MANY_THREADS = 8
PART = 10  # of an array, that its memory limit lets in
MS = "ms", 1e3


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    data: int = 1 << 30  # bytes of the file
    pages: int = 16_384  # touched in random order
    compressed: int = 256 << 20  # bytes, before
    pretouch: int = 5 << 28  # before each turn


FULL = Sizes()
QUICK = Sizes(data=32 << 20, pages=1_024, compressed=8 << 20, pretouch=64 << 20)


@dataclass(frozen=True)
class Setting:
    """What every workload is given."""

    data: Data
    sizes: Sizes
    rounds: int

    def turns(self, contenders: Mapping[str, Turn]) -> Comparison:
        """`serve_turns.turns`, with memory that the host need not hand out first."""
        nbytes = min(self.sizes.pretouch, memory()["MemAvailable"] // 2)

        def at_home(turn: Turn) -> float:
            # A virtual machine tells its host of freed memory within seconds (free page reporting), and
            # having it again costs five times as much as touching it. So have it again, untimed.
            room = np.empty(nbytes, np.uint8)
            room[:: uf.PAGE_SIZE] = 1
            del room
            return turn()

        return turns({name: partial(at_home, turn) for name, turn in contenders.items()}, self.rounds)


@dataclass(frozen=True)
class Case:
    """The rows of one comparison."""

    workload: str
    case: str
    result: Comparison
    unit: str
    scale: float  # units a second

    def rows(self) -> dict[str, Row]:
        return {
            name: {"workload": self.workload, "case": self.case, "contender": name, "unit": self.unit}
            | {"best": self.result.best(name) * self.scale, "median": self.result.median(name) * self.scale}
            | {"figures": []}
            for name in self.result.seconds
        }

    def time(self, name: str, to: str, at_most: float | None = None) -> Row:
        """How many times as long as `to`: the median of the rounds' own ratios, which a goal is about."""
        return self._figure(f"time of {name} / {to}", name, to, at_most)

    def percent(self, name: str, to: str, at_most: float | None = None) -> Row:
        """The same as a percentage."""
        return self._figure(f"{name}, % of {to}", name, to, at_most, of=100.0)

    def more(self, name: str, to: str, at_most: float) -> Row:
        """By how many percent it takes longer than `to`."""
        return self._figure(f"{name} beyond {to}, %", name, to, at_most, of=100.0, less=100.0)

    def _figure(
        self, what: str, name: str, to: str, at_most: float | None, of: float = 1.0, less: float = 0.0
    ) -> Row:
        value = self.result.median_of_ratios(name, to) * of - less
        figure = judged(what, value, None if at_most is None else ("<=", at_most))
        figure["of_bests"] = self.result.ratio_of_bests(name, to) * of - less
        if at_most is not None:
            figure["at"] = (at_most + less) / of * self.result.median(to) * self.scale  # for the plot
        return figure


# -- A whole array -----------------------------------------------------------------------------------------


def scan(setting: Setting) -> Iterator[Row]:
    """The sum of all elements, and the first element."""
    data = setting.data
    ways: Mapping[str, Open] = {
        LAZY: data.lazy,
        LAZY_HUGE: partial(data.lazy, page_bytes=HUGE),
        READ: data.read,
        MEMMAP: data.memmap,
    }
    result = setting.turns({name: partial(summed, way, data.total) for name, way in ways.items()})
    case = Case("scan", "sum of all", result, *MS)
    rows = case.rows()
    rows[LAZY]["figures"] = [case.time(LAZY, READ, 1.0), case.time(LAZY, MEMMAP)]
    rows[LAZY_HUGE]["figures"] = [case.time(LAZY_HUGE, READ), case.time(LAZY_HUGE, MEMMAP)]
    yield from rows.values()

    first = float(np.fromfile(data.path, np.float64, 1)[0])
    # None but fromfile takes memory, which it need not be compared for.
    result = turns({name: partial(first_element, way, first) for name, way in ways.items()}, setting.rounds)
    case = Case("scan", "first element", result, *MS)
    rows = case.rows()
    for name in (LAZY, LAZY_HUGE):
        ms = judged(f"ms of {name}", result.median(name) * 1e3, ("<=", 1.0) if name == LAZY else None)
        ms |= {"of_bests": result.best(name) * 1e3} | ({"at": 1.0} if name == LAZY else {})
        rows[name]["figures"] = [ms, case.time(name, MEMMAP)]
    yield from rows.values()


# -- A few elements ----------------------------------------------------------------------------------------


def gather(setting: Setting) -> Iterator[Row]:
    """Random elements, prefetched or not, beside reading everything."""
    data = setting.data
    indices = np.random.default_rng(2).choice(data.nbytes // 8, ELEMENTS, replace=False)
    expected = np.fromfile(data.path, np.float64)[indices]
    contenders: Mapping[str, Turn] = {
        PREFETCH: partial(gathered, data.lazy, indices, expected, prefetch=True),
        PAIR: partial(gathered, partial(data.lazy, placement="pair"), indices, expected),
        INLINE: partial(gathered, partial(data.lazy, serving="inline"), indices, expected),
        LAZY: partial(gathered, data.lazy, indices, expected),
        READ: partial(opened, data.read),
        MEMMAP: partial(gathered, data.memmap, indices, expected),
    }
    case = Case("gather", f"{ELEMENTS:,} elements", setting.turns(contenders), *MS)
    rows = case.rows()
    for name, at_most in ((PREFETCH, 2.0), (PAIR, 10.0), (INLINE, 5.0), (LAZY, None)):
        rows[name]["figures"] = [case.percent(name, READ, at_most), case.time(name, MEMMAP)]
    yield from rows.values()


# -- Threads -----------------------------------------------------------------------------------------------


def threads(setting: Setting) -> Iterator[Row]:
    """Whole pages in random order, by threads that do not hold the GIL."""
    data = setting.data
    offsets = scattered(data.nbytes, setting.sizes.pages) & np.uint64(-uf.PAGE_SIZE % (1 << 64))
    expected = int(np.memmap(data.path, np.float64, "r")[offsets // 8].sum())

    def from_memory(way: Open) -> float:
        with way() as array:
            took, found = by_threads(partial(copy_pages, array), offsets, THREADS)
        check(found == expected)
        return took

    def from_file(read: Callable[[int, Offsets], int]) -> float:
        with open(data.path, "rb") as file:
            took, found = by_threads(partial(read, file.fileno()), offsets, THREADS)
        check(found == expected)
        return took

    contenders: Mapping[str, Turn] = {
        LAZY: partial(from_memory, data.lazy),
        MEMMAP: partial(from_memory, data.memmap),
        PREAD: partial(from_file, pread_pages),
        OS_PREAD: partial(from_file, os_pread_pages),
    }
    result = setting.turns(contenders)
    case = Case("threads", f"random pages, {THREADS} threads", result, "us/page", 1e6 / offsets.size)
    rows = case.rows()
    rows[LAZY]["figures"] = [case.time(LAZY, to) for to in (MEMMAP, PREAD, OS_PREAD)]
    yield from rows.values()


# -- A memory limit ----------------------------------------------------------------------------------------


def limit(setting: Setting) -> Iterator[Row]:
    """An array of ten times its memory limit, beside the same without a limit; how much is in memory."""
    data = setting.data
    pages = data.nbytes // PART // uf.PAGE_SIZE
    limited = partial(data.lazy, memory_limit=pages * uf.PAGE_SIZE)
    ways: Mapping[str, Open] = {LIMITED: limited, UNLIMITED: data.lazy}

    result = setting.turns({name: partial(summed_in_blocks, way, data.total) for name, way in ways.items()})
    case = Case("limit", "scan", result, *MS)
    rows = case.rows()
    rows[LIMITED]["figures"] = [case.time(LIMITED, UNLIMITED, 1.3), case.more(LIMITED, UNLIMITED, 15.0)]
    yield from rows.values()

    offsets = scattered(data.nbytes, pages + setting.sizes.pages)

    def touched(way: Open) -> float:
        with way() as array:
            at_random(array, offsets[:pages])  # now it is full
            return at_random(array, offsets[pages:])

    result = setting.turns({name: partial(touched, way) for name, way in ways.items()})
    case = Case("limit", "random pages", result, "us/page", 1e6 / setting.sizes.pages)
    rows = case.rows()
    rows[LIMITED]["figures"] = [case.more(LIMITED, UNLIMITED, 15.0)]
    yield from rows.values()

    def scanned() -> None:
        with limited() as array:
            step = BLOCK // array.itemsize
            for at in range(0, array.size, step):
                array[at : at + step].sum()

    def crowded() -> None:
        with limited() as array:
            at_random(array, offsets, MANY_THREADS)

    in_mib = pages * uf.PAGE_SIZE / MIB
    for name, work in (("scan", scanned), (f"{MANY_THREADS} threads", crowded)):
        grown = np.array([Peak.of(work) for _ in range(setting.rounds)]) / MIB
        figure = judged(f"peak / limit of {in_mib:.1f} MiB, {name}", float(grown.max() / in_mib))
        yield {"workload": "limit", "case": f"resident, {name}", "contender": LIMITED, "unit": "MiB"} | {
            "best": float(grown.min()),
            "median": float(np.median(grown)),
            "figures": [figure],
        }


# -- Decompression -----------------------------------------------------------------------------------------


def inflate(setting: Setting) -> Iterator[Row]:
    """A source of chunks that zlib compressed, beside decompressing all of them first."""
    data = Compressed(setting.sizes.compressed)
    ways: Mapping[str, Open] = {LAZY: data.lazy, PYTHON: data.by_python, C: data.by_c}
    result = setting.turns({name: partial(summed, way, data.total) for name, way in ways.items()})
    case = Case("inflate", "sum of all", result, *MS)
    rows = case.rows()
    rows[LAZY]["figures"] = [case.time(LAZY, to) for to in (PYTHON, C)]
    yield from rows.values()

    indices = np.random.default_rng(3).choice(data.nbytes // 8, ELEMENTS, replace=False)
    with data.by_c() as array:
        expected = array[indices]
    contenders: dict[str, Turn] = {PREFETCH: partial(gathered, data.lazy, indices, expected, prefetch=True)}
    contenders |= {name: partial(gathered, way, indices, expected) for name, way in ways.items()}
    case = Case("inflate", f"{ELEMENTS:,} elements", setting.turns(contenders), *MS)
    rows = case.rows()
    for name in (PREFETCH, LAZY):
        rows[name]["figures"] = [case.time(name, to) for to in (PYTHON, C)]
    yield from rows.values()
