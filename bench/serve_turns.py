"""How serve.py measures: how much, in which order, and what a row of its table says."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import userfault as uf
from compare import Comparison, Row, print_table
from serve_contenders import Contender, Data, Offsets, touch

Goal = tuple[str, float]  # ">=" or "<=", and the bound
Turn = Callable[[], float]


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    data: int = 256 << 20  # bytes: random touches are spread over them, and they fill a region
    touches: int = 4_096  # in random order
    stream: int = 8_192  # pages, in order
    pending: int = 16_000  # touches in random order by many threads
    ranges: Sequence[int] = (1, 1_000, 100_000)
    threads: Sequence[int] = (1, 64, 1_000)  # asleep in faults
    idle: float = 1.0  # seconds
    pretouch: int = 1 << 30


FULL = Sizes()
QUICK = Sizes(
    data=16 << 20, touches=256, stream=512, pending=512, threads=(1, 64), idle=0.2, pretouch=64 << 20
)


@dataclass(frozen=True)
class Setting:
    """What every workload is given."""

    data: Data
    sizes: Sizes
    rounds: int
    touchers: Sequence[int]


def turns(contenders: Mapping[str, Turn], rounds: int) -> Comparison:
    """`compare.take_turns`, for contenders that say themselves how many seconds they took."""
    shuffle = random.Random(0)
    seconds = {name: np.zeros(rounds) for name in contenders}
    for contender in contenders.values():
        contender()
    collecting = gc.isenabled()
    gc.disable()
    try:
        for i in range(rounds):
            for name in shuffle.sample(list(contenders), len(contenders)):
                seconds[name][i] = contenders[name]()
    finally:
        if collecting:
            gc.enable()
    return Comparison(seconds)


def touching(
    data: Data, contender: Contender, backing: str, offsets: Offsets, threads: int, length: int
) -> Turn:
    """A turn: touch all the offsets in a new region."""
    expected = data.memory[offsets]

    def turn() -> float:
        with contender.open(data, backing, length) as region:
            return touch(region, offsets, expected, threads, contender.cpu)

    return turn


def scattered(length: int, n: int) -> Offsets:
    """A random byte in each of n random pages."""
    rng = np.random.default_rng(n)
    pages = rng.permutation(length // uf.PAGE_SIZE)[:n].astype(np.uint64)
    offsets: Offsets = pages * np.uint64(uf.PAGE_SIZE) + rng.integers(0, uf.PAGE_SIZE, n, np.uint64)
    return offsets


def in_order(n: int, threads: int) -> Offsets:
    """The first n pages: each thread gets a share of neighbours, in order."""
    pages = np.arange(n // threads * threads, dtype=np.uint64).reshape(threads, -1)
    offsets: Offsets = np.ascontiguousarray(pages.T).ravel() * np.uint64(uf.PAGE_SIZE)
    return offsets


def rows_of(result: Comparison, pages: int, **what: Any) -> dict[str, Row]:
    """A row for each contender, in nanoseconds a page."""
    return {
        name: {**what, "contender": name, "unit": "ns/page"}
        | {"best": result.best(name) / pages * 1e9, "median": result.median(name) / pages * 1e9}
        | {"figures": []}
        for name in result.seconds
    }


def speed(result: Comparison, name: str, to: str, at_least: float | None = None) -> Row:
    """How many times as fast as `to`: the median of the rounds' own ratios, which a goal is about."""
    goal = None if at_least is None else (">=", at_least)
    figure = judged(f"speed of {name} / {to}", result.median_of_ratios(to, name), goal)
    return figure | {"of_bests": result.ratio_of_bests(to, name)}


def cost(result: Comparison, name: str, to: str, at_most: float) -> Row:
    """How many times as long as `to`, likewise."""
    figure = judged(f"time of {name} / {to}", result.median_of_ratios(name, to), ("<=", at_most))
    return figure | {"of_bests": result.ratio_of_bests(name, to)}


def judged(what: str, value: float, goal: Goal | None = None) -> Row:
    """A figure beside its goal."""
    figure: Row = {"what": what, "value": value, "of_bests": None, "goal": None, "met": None}
    if goal is None:
        return figure
    relation, bound = goal
    met = value >= bound if relation == ">=" else value <= bound
    return figure | {"goal": f"{relation} {bound:g}", "met": met}


def in_words(figure: Row) -> str:
    """A figure and its goal."""
    value, of_bests = figure["value"], figure["of_bests"]
    text = f"{figure['what']}: {value:{'.2f' if isinstance(value, float) else ','}}"
    text += "" if of_bests is None else f", of best rounds {of_bests:.2f}"
    if figure["goal"] is None:
        return text
    return f"{text} (goal {figure['goal']}: {'met' if figure['met'] else 'MISSED'})"


def print_rows(rows: Sequence[Row]) -> None:
    """The rows as a table, and below it their figures."""
    print_table([{key: value for key, value in row.items() if key != "figures"} for row in rows])
    print()
    for row in rows:
        where = f"{row['workload']}, {row['backing']}, touchers={row['touchers']}"
        for figure in row["figures"]:
            print(f"{where}: {in_words(figure)}")
