"""What `userfault bench stores` found, on the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from userfault.cli.bench_array_report import figures, number, verdict
from userfault.cli.bench_report import Facts, Row, new_table, setting

_TITLES = {
    "gather": "Random elements, of which nothing is in memory",
    "scan": "All of it, of which nothing is in memory",
    "again": "A second pass over what is in memory",
    "window": "A function that needs an ndarray, on a window of the 2-D array",
    "fault": "Pages that Python fills, one at a time",
    "open": "Opening and closing",
}
_NOTE = """\
lazy: open_zarr with its defaults, opened and closed untimed; prefetch, materialize: called first, timed;
zarr by turns: z[i], one element a call; zarr.vindex: all in one call; zarr, all first: z[:], into an ndarray;
dask: dask.array.from_zarr. Pager: a source in Python that does nothing; Buffer: the same in this process. The
files are in the page cache. peak: by how much memory grew, with all of the pager's own (Python, numpy, zarr).
Ratios: the median of each round's own, and that of the best rounds."""


def show(facts: Facts) -> None:
    """Print it for people."""
    console = Console(highlight=False)
    console.print(setting(facts))
    for array in facts["stores"]["arrays"]:
        console.print(Padding(Text(_about(array), "dim"), (0, 1)))
    rows: list[Row] = facts["stores"]["rows"]
    for workload in dict.fromkeys(row["workload"] for row in rows):
        mine = [row for row in rows if row["workload"] == workload]
        console.print(_times(_TITLES[workload], mine))
        if any(row["figures"] for row in mine):
            console.print(figures(mine))
    console.print(Padding(Text(_NOTE.replace("\n", " "), "dim"), (0, 1)))
    console.print(Padding(verdict(rows), (1, 1)), style="bold")


def _about(array: Row) -> str:
    shape, chunks = (" x ".join(f"{n:,}" for n in array[key]) for key in ("shape", "chunks"))
    return (
        f"{array['name']}: {shape} {array['dtype']} in chunks of {chunks}, "
        f"{array['nbytes'] / (1 << 20):,.0f} MiB, which zstd made {array['compressed']:.1f} times as small"
    )


def _times(title: str, rows: list[Row]) -> Table:
    table = new_table(title, "", "by", "best", "median", "unit", "peak, MiB")
    for row in rows:
        unit, peak = row["unit"].replace("us", "µs"), f"{row['peak_mib']:,.0f}"
        table.add_row(row["case"], row["contender"], number(row["best"]), number(row["median"]), unit, peak)
    return table
