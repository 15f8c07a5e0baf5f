"""Paired measurement: contenders take turns in one run, so that all see the same machine."""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Row = dict[str, Any]


class Comparison:
    """Seconds of each contender in each round."""

    def __init__(self, seconds: Mapping[str, npt.NDArray[np.float64]]) -> None:
        self.seconds = seconds

    def best(self, name: str) -> float:
        return float(self.seconds[name].min())

    def median(self, name: str) -> float:
        return float(np.median(self.seconds[name]))

    def ratio_of_bests(self, name: str, to: str) -> float:
        return self.best(name) / self.best(to)

    def median_of_ratios(self, name: str, to: str) -> float:
        """Each round's ratio, of which the median: what drifts from round to round drops out."""
        return float(np.median(self.seconds[name] / self.seconds[to]))


def keep_freed_memory() -> None:
    """Stop malloc from giving memory back, else large results cost page faults in every call (glibc only)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, whose maximum this is


def take_turns(
    contenders: Mapping[str, Callable[[], object]], rounds: int, prepare: Callable[[], object] = lambda: None
) -> Comparison:
    """Time every contender once a round, in shuffled order; `prepare` runs untimed before each."""
    keep_freed_memory()
    shuffle = random.Random(0)
    seconds = {name: np.zeros(rounds) for name in contenders}
    for contender in contenders.values():
        prepare()
        contender()
    collecting = gc.isenabled()
    gc.disable()
    try:
        for i in range(rounds):
            for name in shuffle.sample(list(contenders), len(contenders)):
                prepare()
                start = time.perf_counter_ns()
                contenders[name]()
                seconds[name][i] = (time.perf_counter_ns() - start) * 1e-9
    finally:
        if collecting:
            gc.enable()
    return Comparison(seconds)


def print_table(rows: Sequence[Row]) -> None:
    """Rows of equal keys, right-aligned under their keys."""

    def cell(value: object) -> str:
        return f"{value:.2f}" if isinstance(value, float) else "-" if value is None else str(value)

    lines = [list(rows[0]), *([cell(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)))


def argument_parser(description: str | None, rounds: int) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument("--rounds", type=int, default=rounds, help="default: %(default)s")
    return parser


def show(rows: Sequence[Row], as_json: bool) -> None:
    """Print the rows: a table, or JSON."""
    if as_json:
        print(json.dumps(rows, indent=1))
    else:
        print_table(rows)


def main(description: str, measure: Callable[[int], list[Row]], rounds: int) -> None:
    """The command line of a benchmark: measure, then print a table or JSON."""
    options = argument_parser(description, rounds).parse_args()
    show(measure(options.rounds), options.json)
