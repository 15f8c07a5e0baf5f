"""What `userfault bench serve` found, on the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from userfault.cli.bench_report import Facts, Row, new_table, setting

_TITLES = {
    "random": "Random pages, touched once each: ns a page",
    "sequential": "Pages in order: ns a page",
    "ranges": "Random pages, with a large dispatch table: ns a page",
    "pending": "Random pages, with many threads asleep at once: ns a page",
    "fill": "A whole region: ns a page",
    "idle": "Idle: CPU ms a second",
    "close": "close() under load: ms",
}
_NOTE = """\
(a) C: poll, read of one record, UFFDIO_COPY; (b) C: the same with 256 records; pinned: it and the toucher
on one CPU; (c) Python: a loop of os.read and fcntl.ioctl; (d) SIGBUS: a signal handler in C, one
UFFDIO_COPY in the thread that touches; inline: ours with mode="inline"; ours: with the default read-ahead;
1 page: with readahead=0; pair: placement="pair"; 2 MiB: page_bytes; memcpy: into fresh huge pages.
Ratios: the median of each round's own, and that of the best rounds."""


def show(facts: Facts) -> None:
    """Print it for people."""
    console = Console(highlight=False)
    console.print(setting(facts))
    rows: list[Row] = facts["serve"]
    for workload in dict.fromkeys(row["workload"] for row in rows):
        mine = [row for row in rows if row["workload"] == workload]
        console.print(_times(_TITLES[workload], mine))
        console.print(_figures(mine))
    console.print(Padding(Text(_NOTE.replace("\n", " "), "dim"), (0, 1)))
    console.print(Padding(verdict(rows), (1, 1)), style="bold")


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if value >= 100 else f"{value:.2f}"


def _times(title: str, rows: list[Row]) -> Table:
    table = new_table(title, "data", "touchers", "served by", "best", "median")
    for row in rows:
        names = row["backing"], f"{row['touchers']:,}", row["contender"]
        table.add_row(*names, _number(row["best"]), _number(row["median"]))
    return table


def _figures(rows: list[Row]) -> Table:
    table = new_table("", "data", "", "median", "bests", "goal", "")
    for row in rows:
        for figure in row["figures"]:
            where = f"{row['backing']}, {row['touchers']:,}"
            bests = "" if figure["of_bests"] is None else _number(figure["of_bests"])
            ratios = _number(figure["value"]), bests
            table.add_row(where, figure["what"], *ratios, figure["goal"] or "", _judgement(figure))
    return table


def _judgement(figure: Row) -> Text:
    if figure["met"] is None:
        return Text()
    return Text("met", "green") if figure["met"] else Text("missed", "bold red")


def verdict(rows: list[Row]) -> str:
    """How many goals are met, and which are missed."""
    judged = [(row, figure) for row in rows for figure in row["figures"] if figure["met"] is not None]
    missed = [
        f"{row['workload']}, {row['backing']}, {row['touchers']:,} touchers: {figure['what']} "
        f"{_number(figure['value'])} (goal {figure['goal']})"
        for row, figure in judged
        if not figure["met"]
    ]
    summary = f"{len(judged) - len(missed)} of {len(judged)} goals are met."
    return "\n".join([summary, *(f"Missed: {text}" for text in missed)])
