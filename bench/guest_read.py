"""In the lab's guest under --icount: what read() and a served fault cost, in instructions.

Virtual nanoseconds are guest instructions there. An interval that a timer tick (every 4 ms) falls into is
longer, so every interval is kept short, taken several times, and the shortest counts.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

import rivals
import userfault as uf
from compare import Row
from read import CONTENDERS, Contender
from sources import Crowd

CLOCK = time.CLOCK_MONOTONIC_RAW
CHUNK = 256  # records an interval reads, or one batch when that has more: below 1 ms
INTERVALS = 12
PAGES = 256  # that one end-to-end interval touches
TOUCHERS = (1, 16)
REPETITIONS = 8
ROUNDS = 6
PIDS = Path("/proc/sys/kernel/pid_max")
SOURCES: dict[str, Callable[[], uf.sources.Source]] = {
    "zero": uf.sources.Zero,
    "buffer": lambda: uf.sources.Buffer(np.ones(PAGES * uf.PAGE_SIZE, np.uint8)),
}


def clocked(contender: Contender, calls: int) -> int:
    start = time.clock_gettime_ns(CLOCK)
    contender.drain(calls)
    return time.clock_gettime_ns(CLOCK) - start


def instructions(crowd: Crowd, contender: Contender, batch: int) -> list[float]:
    """Instructions a call, from every interval; those of clock and loop, measured without a call, are off."""
    calls = max(1, CHUNK // batch)
    turns = crowd.addresses.size // (calls * batch)
    crowd.refill()
    seen = []
    for _ in range(crowd.addresses.size // batch):
        contender.drain(1)
        seen += contender.addresses()
    known = set(crowd.addresses.tolist())
    if len(seen) != len(set(seen)) or not known.issuperset(seen):
        raise RuntimeError("the records are not those of the crowd's faults")
    empty = min(clocked(contender, 0) for _ in range(INTERVALS))
    found: list[float] = []
    while len(found) < INTERVALS:
        crowd.refill()
        found += [(clocked(contender, calls) - empty) / calls for _ in range(turns)]
    return found


def read_rows(api: str, batches: Sequence[int]) -> list[Row]:
    """The cost of every contender's call, and of a record, for each batch."""
    rows = []
    for threads in sorted({max(1024, batch) for batch in batches}):
        with Crowd(threads, api) as crowd:
            for batch in (batch for batch in batches if max(1024, batch) == threads):
                row: Row = {"api": api, "batch": batch, "pending": threads}
                for name, make in CONTENDERS.items():
                    found = instructions(crowd, make(crowd.fd, api, batch), batch)
                    row[name] = min(found)
                    row[f"{name}_median"] = float(np.median(found))
                rows.append(row)
    return rows


class Served:
    """A region, served from one source by a FaultService, whose pages are touched again and again."""

    def __init__(self, api: str, source: str, touchers: int) -> None:
        self.row: Row = {"api": api, "source": source, "touchers": touchers}
        self.make, self.touchers = SOURCES[source], touchers
        self.found: list[list[float]] = []  # by round
        self.records = self.reads = 0

    def run(self) -> None:
        with uf.Userfaultfd(self.row["api"]) as u, uf.FaultService(u) as service:
            region = u.map(PAGES * uf.PAGE_SIZE)
            service.serve(region, self.make(), readahead=0)
            found = []
            for _ in range(REPETITIONS):
                took = rivals.library().touch_again(region.start, uf.PAGE_SIZE, PAGES, self.touchers)
                if took < 0:
                    raise RuntimeError("the pages could not be touched")
                found.append(took / PAGES)
            self.found.append(found)
            stats = service.stats()
            self.records += int(stats["records"])
            self.reads += int(stats["reads"])

    def figures(self) -> Row:
        """Instructions a fault, from touch to touch: fault, wake-ups, read(), dispatch and resolution.

        The median of the rounds' shortest intervals, without the first round, in which caches fill.
        """
        shortest = [min(found) for found in self.found[1:]]
        return self.row | {
            "fault": statistics.median(shortest),
            "records_per_read": self.records / self.reads,
        }


def served_rows(wires: Sequence[str]) -> list[Row]:
    """End to end; the wires take turns, for what a kernel does later depends on what it did before."""
    everything = [
        Served(api, source, touchers) for source in SOURCES for touchers in TOUCHERS for api in wires
    ]
    for _ in range(ROUNDS):
        for served in everything:
            served.run()
    return [served.figures() for served in everything]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--wires", required=True)
    parser.add_argument("--batches", required=True)
    options = parser.parse_args()
    batches = [int(batch) for batch in options.batches.split(",")]
    gc.disable()
    with contextlib.suppress(OSError):
        PIDS.write_text("32768")
    wires = options.wires.split(",")
    answer = {"served": served_rows(wires), "read": [row for api in wires for row in read_rows(api, batches)]}
    Path(os.environ["LAB_OUT"], "guest_read.json").write_text(json.dumps(answer, indent=1))


if __name__ == "__main__":
    main()
