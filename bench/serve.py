"""FaultService beside handlers in C and the Python loop: faults, whole regions, an idle service, close()."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

import serve_faults
import serve_life
from compare import Row, argument_parser, show
from serve_contenders import random_data
from serve_turns import FULL, QUICK, Setting, Sizes, print_rows
from userfault.cli.machine import memory

TOUCHERS = (1, 4, 16, 64)
WORKLOADS: Mapping[str, Callable[[Setting], Iterable[Row]]] = {
    "random": serve_faults.random,
    "sequential": serve_faults.sequential,
    "ranges": serve_faults.ranges,
    "pending": serve_faults.pending,
    "fill": serve_life.fill,
    "idle": serve_life.idle,
    "close": serve_life.close,
}
MODES: Mapping[str, Mapping[str, Callable[[Setting], Iterable[Row]]]] = {
    "threads": WORKLOADS,
    "inline": {"random": serve_faults.random_inline, "sequential": serve_faults.sequential_inline},
}


def measure(
    rounds: int,
    mode: str = "threads",
    workloads: Iterable[str] = (),
    touchers: Sequence[int] = TOUCHERS,
    sizes: Sizes = FULL,
) -> list[Row]:
    """The rows of these workloads, or all, of a mode of FaultService."""
    # In a virtual machine, memory that the host has yet to hand out is ten times slower: have it now.
    np.ones(min(sizes.pretouch, memory()["MemAvailable"] // 2), np.uint8)
    with random_data(sizes.data) as data:
        setting = Setting(data, sizes, rounds, touchers)
        return [row for name in workloads or MODES[mode] for row in MODES[mode][name](setting)]


if __name__ == "__main__":
    parser = argument_parser(__doc__, rounds=20)
    parser.add_argument("--mode", choices=MODES, default="threads", help="default: %(default)s")
    parser.add_argument(
        "--workloads", default="", help=f"default: all of {','.join(WORKLOADS)} that the mode has"
    )
    parser.add_argument("--touchers", default=",".join(map(str, TOUCHERS)), help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="little of everything: to see that it works")
    options = parser.parse_args()
    rows = measure(
        options.rounds,
        options.mode,
        [name for name in options.workloads.split(",") if name],
        [int(threads) for threads in options.touchers.split(",")],
        QUICK if options.quick else FULL,
    )
    if options.json:
        show(rows, as_json=True)
    else:
        print_rows(rows)
