"""Lazy arrays over zarr beside zarr itself and dask: a few elements, scans, a second pass, one fault."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from compare import Row, argument_parser, print_table
from serve_turns import in_words

try:
    import stores_workloads
    from stores_data import arrays
    from stores_workloads import Setting
except ModuleNotFoundError as error:
    library = (error.name or "").partition(".")[0]
    if library not in ("dask", "scipy", "zarr"):
        raise
    sys.exit(f"stores.py needs {library}: pip install zarr 'dask[array]' scipy")

BYTES = 1 << 30
PAGES = 4_096
WORKLOADS: Mapping[str, Callable[[Setting], Iterable[Row]]] = {
    "chunks": stores_workloads.chunks,
    "window": stores_workloads.window,
    "fault": stores_workloads.fault,
    "open": stores_workloads.opening,
}


def measure(rounds: int, workloads: Iterable[str] = tuple(WORKLOADS), nbytes: int = BYTES) -> dict[str, Any]:
    """What the arrays are, and the rows of all workloads."""
    with arrays(nbytes) as stored:
        setting = Setting(stored, rounds, min(PAGES, nbytes >> 14), nbytes + nbytes // 4)
        rows = [row for name in workloads for row in WORKLOADS[name](setting)]
        return {"arrays": [array.about() for array in stored.values()], "rows": rows}


def show(found: Mapping[str, Any]) -> None:
    """The rows as a table, and below it their figures."""
    for about in found["arrays"]:
        print(", ".join(f"{key}: {value}" for key, value in about.items()))
    print_table([{key: value for key, value in row.items() if key != "figures"} for row in found["rows"]])
    print()
    for row in found["rows"]:
        for figure in row["figures"]:
            print(f"{row['workload']}, {row['case']}: {in_words(figure)}")


if __name__ == "__main__":
    parser = argument_parser(__doc__, rounds=5)
    parser.add_argument("--workloads", default=",".join(WORKLOADS), help="default: %(default)s")
    parser.add_argument("--bytes", type=int, default=BYTES, help="of an array; default: %(default)s")
    options = parser.parse_args()
    found = measure(options.rounds, options.workloads.split(","), options.bytes)
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        show(found)
