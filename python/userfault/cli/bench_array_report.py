"""What `userfault bench array` found, on the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from userfault.cli.bench_report import Facts, Row, new_table, setting

_TITLES = {
    "scan": "A file in the page cache, from opening to the result",
    "gather": "Random elements of it, from opening to the result",
    "threads": "Whole pages of it, without the GIL",
    "limit": "An array of ten times its memory limit",
    "inflate": "Chunks that zlib compressed, from opening to the result",
}
_NOTE = """\
lazy: lazy_array with its defaults; 2 MiB: page_bytes; pair: placement="pair";
inline: serving="inline"; prefetch: prefetch() of the
elements first; fromfile: everything read; memmap: numpy.memmap; pread: into a page, nothing is kept; all:
everything decompressed first. Ratios: the median of each round's own, and that of the best rounds."""


def show(facts: Facts) -> None:
    """Print it for people."""
    console = Console(highlight=False)
    console.print(setting(facts))
    rows: list[Row] = facts["array"]
    for workload in dict.fromkeys(row["workload"] for row in rows):
        mine = [row for row in rows if row["workload"] == workload]
        console.print(_times(_TITLES[workload], mine))
        console.print(figures(mine))
    console.print(Padding(Text(_NOTE.replace("\n", " "), "dim"), (0, 1)))
    console.print(Padding(verdict(rows), (1, 1)), style="bold")


def number(value: float) -> str:
    """With as many digits as tell something."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2f}"


def _times(title: str, rows: list[Row]) -> Table:
    table = new_table(title, "", "by", "best", "median", "unit")
    for row in rows:
        unit = row["unit"].replace("us", "µs")
        table.add_row(row["case"], row["contender"], number(row["best"]), number(row["median"]), unit)
    return table


def figures(rows: list[Row]) -> Table:
    """The ratios of the rows, and whether they meet their goals."""
    table = new_table("", "", "", "median", "bests", "goal", "")
    for row in rows:
        for figure in row["figures"]:
            bests = "" if figure["of_bests"] is None else number(figure["of_bests"])
            cells = number(figure["value"]), bests, figure["goal"] or ""
            table.add_row(row["case"], figure["what"], *cells, _judgement(figure))
    return table


def _judgement(figure: Row) -> Text:
    if figure["met"] is None:
        return Text()
    return Text("met", "green") if figure["met"] else Text("missed", "bold red")


def verdict(rows: list[Row]) -> str:
    """How many goals are met, and which are missed."""
    judged = [(row, figure) for row in rows for figure in row["figures"] if figure["met"] is not None]
    missed = [
        f"{row['workload']}, {row['case']}: {figure['what']} {number(figure['value'])} "
        f"(goal {figure['goal']})"
        for row, figure in judged
        if not figure["met"]
    ]
    summary = f"{len(judged) - len(missed)} of {len(judged)} goals are met."
    return "\n".join([summary, *(f"Missed: {text}" for text in missed)])
