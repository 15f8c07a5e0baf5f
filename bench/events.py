"""What following events costs: a storm, every byte checked; fork to first byte; and features that idle."""

from __future__ import annotations

import json
import mmap
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

import userfault as uf
from compare import Row, argument_parser, print_table
from events_storm import KINDS, Storm
from serve_contenders import Contender, Data, random_data, served, service
from serve_turns import FULL, QUICK, Setting, cost, in_words, judged, rows_of, scattered, touching, turns

THREADS = 4  # of the storm
SAMPLES = 10  # forks a round
FORKED = 1 << 20  # bytes of the region whose first one a child reads
PLAIN, OURS = "an ordinary page", "a missing page"
OFF, ON = "without events", "with events"


def progress(text: str) -> None:
    """One line that is written over, for a human who waits."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def storm(seconds: float, threads: int = THREADS) -> Iterator[Row]:
    """What the service heard, and the pages that were compared meanwhile."""
    with uf.Userfaultfd("msg", "all") as u, uf.FaultService(u) as svc:
        storming = Storm(u, svc, threads)
        took = storming.run(seconds, lambda left: progress(f"storm: {left:.0f} s left"))
        stats, failed = svc.stats(), len(svc.failures())
    for kind in KINDS:
        count = int(stats[kind])
        yield {
            "workload": "storm",
            "touchers": threads,
            "what": kind,
            "count": count,
            "a second": count / took,
        }
    pages, wrong = storming.pages, storming.wrong
    yield {
        "workload": "storm",
        "touchers": threads,
        "what": "pages compared",
        "count": pages,
        "a second": pages / took,
        "figures": [judged("wrong", wrong, ("<=", 0)), judged("pages that failed closed", failed, ("<=", 0))],
    }


def first_byte(data: Data, rounds: int) -> Iterator[Row]:
    """From before fork() until the child has read a byte: of a served region's missing page, or of memory."""
    clock = np.frombuffer(mmap.mmap(-1, mmap.PAGESIZE), np.int64)  # shared with the children

    def forked(array: np.ndarray) -> float:
        start = time.monotonic_ns()
        pid = os.fork()
        if pid == 0:
            right = array[0] == data.memory[0]
            clock[0] = time.monotonic_ns()
            os._exit(not right)
        if os.waitpid(pid, 0)[1]:
            raise RuntimeError("the child did not read the right byte")
        return (int(clock[0]) - start) * 1e-9

    def median(sample: Callable[[], float]) -> float:
        progress("fork to first byte")
        return float(np.median([sample() for _ in range(SAMPLES)]))

    def followed() -> float:
        with served(data, "memory", data.memory.nbytes, features="all", readahead=0) as (_, region):
            return median(partial(forked, region.array))

    result = turns({PLAIN: lambda: median(partial(forked, data.memory)), OURS: followed}, rounds)
    for name in (PLAIN, OURS):
        best, middle = result.best(name) * 1e6, result.median(name) * 1e6
        more = (result.median(OURS) - result.median(PLAIN)) * 1e6
        yield {
            "workload": "first byte",
            "touchers": 1,
            "contender": name,
            "unit": "us",
            "best": best,
            "median": middle,
            "figures": [judged(f"us more than {PLAIN}", more)] if name == OURS else [],
        }


def idle_features(setting: Setting) -> Iterator[Row]:
    """Random pages, one a fault: what a fault costs with event features on, of which nothing comes."""
    offsets = scattered(setting.sizes.data, setting.sizes.touches)
    for threads in setting.touchers:
        progress(f"features on, {threads} threads")
        contenders = {
            name: touching(
                setting.data,
                Contender(service(readahead=0, features=features)),
                "memory",
                offsets,
                threads,
                setting.sizes.data,
            )
            for name, features in ((OFF, None), (ON, "all"))
        }
        result = turns(contenders, setting.rounds)
        rows = rows_of(result, offsets.size, workload="features on", touchers=threads)
        rows[ON]["figures"].append(cost(result, ON, OFF, 1.05))
        yield from rows.values()


def measure(rounds: int, seconds: float, quick: bool = False) -> list[Row]:
    """The rows of all three."""
    sizes = QUICK if quick else FULL
    with uf.Userfaultfd("msg", "all") as u:
        hears_forks = uf.Feature.EVENT_FORK in uf.Feature(u.features)
    with random_data(sizes.data) as data:
        rows = list(idle_features(Setting(data, sizes, rounds, (1, 16))))
    if hears_forks:
        # Little memory: fork() copies the page tables of all that there is.
        with random_data(FORKED) as data:
            rows += first_byte(data, rounds)
        rows += storm(seconds)
    else:
        print("forks and the storm: not measured, for want of CAP_SYS_PTRACE", file=sys.stderr)
    progress("")
    return rows


def print_rows(rows: list[Row]) -> None:
    """A table for each workload, and its figures below."""
    for workload in dict.fromkeys(row["workload"] for row in rows):
        mine = [row for row in rows if row["workload"] == workload]
        print_table([{key: value for key, value in row.items() if key != "figures"} for row in mine])
        for row in mine:
            for figure in row.get("figures", ()):
                print(f"{workload}, touchers={row['touchers']}: {in_words(figure)}")
        print()


if __name__ == "__main__":
    parser = argument_parser(__doc__, rounds=20)
    parser.add_argument("--seconds", type=float, default=60, help="of the storm; default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="little of everything: to see that it works")
    options = parser.parse_args()
    found = measure(options.rounds, options.seconds, options.quick)
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        print_rows(found)
