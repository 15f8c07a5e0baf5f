"""What a fault costs: random and sequential touches, many regions, many threads asleep at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import userfault as uf
from compare import Row
from serve_contenders import (
    BACKINGS,
    CONTENDERS,
    IN_C,
    INLINE,
    INLINE_CONTENDERS,
    INLINE_PAGE,
    MANY,
    ONE,
    OURS,
    PAGE,
    PAIR,
    PINNED,
    PYTHON,
    Contender,
    service,
)
from serve_turns import Setting, cost, in_order, rows_of, scattered, speed, touching, turns

RANGES_TOUCHERS = 16
GOALS: Mapping[tuple[int, str, str], float] = {
    (1, PAIR, PINNED): 0.9,
    (1, PAGE, MANY): 3.0,
    (16, PAGE, MANY): 1.05,
    (16, PAGE, PYTHON): 1.2,
    (64, PAGE, MANY): 1.2,
    (64, PAGE, PYTHON): 1.2,
    (1, INLINE_PAGE, PINNED): 1.3,
    (1, INLINE_PAGE, MANY): 6.0,
    (16, INLINE_PAGE, MANY): 1.3,
    (64, INLINE_PAGE, MANY): 1.3,
}


def random(setting: Setting) -> Iterator[Row]:
    """Random pages, one a fault, and with the default read-ahead."""
    speeds = (PAGE, ONE), (PAGE, MANY), (PAGE, PYTHON), (PAIR, PINNED)
    yield from _random(setting, CONTENDERS, speeds, (OURS, PAGE))


def random_inline(setting: Setting) -> Iterator[Row]:
    """The same in mode "inline"."""
    speeds = (INLINE_PAGE, PINNED), (INLINE_PAGE, MANY), (INLINE_PAGE, IN_C), (INLINE_PAGE, PAGE)
    yield from _random(setting, INLINE_CONTENDERS, speeds, (INLINE, INLINE_PAGE))


def _random(
    setting: Setting,
    contenders_of_all: Mapping[str, Contender],
    speeds: Iterable[tuple[str, str]],
    ahead: tuple[str, str],
) -> Iterator[Row]:
    data, length = setting.data, setting.sizes.data
    offsets = scattered(length, setting.sizes.touches)
    for backing in BACKINGS:
        for threads in setting.touchers:
            contenders = {
                name: touching(data, contender, backing, offsets, threads, length)
                for name, contender in contenders_of_all.items()
                if threads == 1 or name not in (PINNED, PAIR)
            }
            result = turns(contenders, setting.rounds)
            rows = rows_of(result, offsets.size, workload="random", backing=backing, touchers=threads)
            for name, to in speeds:
                if name in rows and to in rows:
                    rows[name]["figures"].append(speed(result, name, to, GOALS.get((threads, name, to))))
            rows[ahead[0]]["figures"].append(cost(result, *ahead, 1.1))
            yield from rows.values()


def sequential(setting: Setting) -> Iterator[Row]:
    """Pages in order, with the default read-ahead; every thread has a share of neighbours."""
    yield from _sequential(setting, CONTENDERS, OURS)


def sequential_inline(setting: Setting) -> Iterator[Row]:
    """The same in mode "inline"."""
    yield from _sequential(setting, INLINE_CONTENDERS | {OURS: CONTENDERS[OURS]}, INLINE, OURS)


def _sequential(
    setting: Setting, contenders_of_all: Mapping[str, Contender], ours: str, *others: str
) -> Iterator[Row]:
    for backing in BACKINGS:
        for threads in setting.touchers:
            offsets = in_order(setting.sizes.stream, threads)
            length = offsets.size * uf.PAGE_SIZE
            contenders = {
                name: touching(setting.data, contenders_of_all[name], backing, offsets, threads, length)
                for name in (MANY, ours, *others)
            }
            result = turns(contenders, setting.rounds)
            rows = rows_of(result, offsets.size, workload="sequential", backing=backing, touchers=threads)
            rows[ours]["figures"].append(speed(result, ours, MANY, 10.0 if threads == 1 else None))
            yield from rows.values()


def ranges(setting: Setting) -> Iterator[Row]:
    """Random pages, one a fault, with more and more ranges in the table where a fault's region is found."""
    data, length = setting.data, setting.sizes.data
    offsets = scattered(length, setting.sizes.touches)
    contenders = {}
    for n in setting.sizes.ranges:
        contender = Contender(service(ranges=n, readahead=0))
        contenders[f"{n:,} ranges" if n > 1 else "1 range"] = touching(
            data, contender, "memory", offsets, RANGES_TOUCHERS, length
        )
    result = turns(contenders, setting.rounds)
    rows = rows_of(result, offsets.size, workload="ranges", backing="memory", touchers=RANGES_TOUCHERS)
    first, *others = contenders
    for name in others:
        rows[name]["figures"].append(cost(result, name, first, 1.2))
    yield from rows.values()


def pending(setting: Setting) -> Iterator[Row]:
    """Random pages, one a fault, with more and more threads asleep at once."""
    data, length = setting.data, setting.sizes.data
    offsets = scattered(length, setting.sizes.pending)
    labels = {(name, n): f"{name}, {n:,} threads" for name in (MANY, PAGE) for n in setting.sizes.threads}
    contenders = {
        label: touching(data, CONTENDERS[name], "memory", offsets, n, length)
        for (name, n), label in labels.items()
    }
    result = turns(contenders, setting.rounds)
    rows = rows_of(result, offsets.size, workload="pending", backing="memory", touchers=0)
    *fewer, most = setting.sizes.threads
    for n in fewer:
        figure = cost(result, labels[PAGE, most], labels[PAGE, n], 1.2)
        figure["what"] = f"time of {most:,} / {n:,} touchers"
        rows[labels[PAGE, most]]["figures"].append(figure)
    for (name, n), label in labels.items():
        yield rows[label] | {"contender": name, "touchers": n}
