"""Lazy arrays beside numpy.fromfile, numpy.memmap and pread(2): scans, a few elements, threads, a limit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import arrays_workloads
from arrays_contenders import file_of_floats
from arrays_workloads import FULL, QUICK, Setting, Sizes
from compare import Row, argument_parser, print_table, show
from serve_turns import in_words

WORKLOADS: Mapping[str, Callable[[Setting], Iterable[Row]]] = {
    "scan": arrays_workloads.scan,
    "gather": arrays_workloads.gather,
    "threads": arrays_workloads.threads,
    "limit": arrays_workloads.limit,
    "inflate": arrays_workloads.inflate,
}


def measure(rounds: int, workloads: Iterable[str] = tuple(WORKLOADS), sizes: Sizes = FULL) -> list[Row]:
    """The rows of all workloads."""
    with file_of_floats(sizes.data) as data:
        setting = Setting(data, sizes, rounds)
        return [row for name in workloads for row in WORKLOADS[name](setting)]


def print_rows(rows: Sequence[Row]) -> None:
    """The rows as a table, and below it their figures."""
    print_table([{key: value for key, value in row.items() if key != "figures"} for row in rows])
    print()
    for row in rows:
        for figure in row["figures"]:
            print(f"{row['workload']}, {row['case']}: {in_words(figure)}")


if __name__ == "__main__":
    parser = argument_parser(__doc__, rounds=10)
    parser.add_argument("--workloads", default=",".join(WORKLOADS), help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="little of everything: to see that it works")
    options = parser.parse_args()
    rows = measure(options.rounds, options.workloads.split(","), QUICK if options.quick else FULL)
    if options.json:
        show(rows, as_json=True)
    else:
        print_rows(rows)
