"""What `userfault bench read` found, on the terminal, and the sentence that it comes down to."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

Facts = dict[str, Any]
Row = dict[str, Any]


def show(facts: Facts) -> None:
    """Print it for people."""
    console = Console(highlight=False)
    console.print(setting(facts))
    native = facts["native"]
    if crowd := _only(native, "crowd"):
        console.print(_times("This kernel's userfaultfd: ns a record (best round)", crowd))
    else:
        console.print("\n No userfaultfd of these formats opens here: see userfault doctor.", style="yellow")
    console.print(_times("A pipe, for the user's side: ns a record (best round)", _only(native, "pipe")))
    if lab := facts.get("lab"):
        console.print(_counts(lab))
        console.print(_served(lab))
        spread = f"Kernel {lab['kernel']}. Between {lab['boots']} boots no read() differs by more than "
        spread += (
            f"{lab['largest_spread_read']:.2%}, no fault by more than {lab['largest_spread_fault']:.2%}."
        )
        console.print(Padding(spread, (0, 1)), style="dim")
    for sentence in (verdict(facts), decoding(facts)):
        if sentence:
            console.print(Padding(sentence, (1, 1, 0, 1)), style="bold")
    console.print()


def setting(facts: Facts) -> Padding:
    """On what it was measured."""
    text = f"Linux {facts['kernel']}, {facts['processor']}, {facts['processors']} processors, load "
    text += f"{facts['load_before']:.1f}; Python {facts['python']}, numpy {facts['numpy']}"
    return Padding(Text(text, "dim"), (1, 1, 0, 1))


def _only(rows: list[Row], source: str) -> list[Row]:
    return [row for row in rows if row["source"] == source]


def new_table(title: str, *columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 1), title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _times(title: str, rows: list[Row]) -> Table:
    names = ("wire", "pending", "a read()", "C loop", "userfault", "os.read+struct", "ratio to C")
    table = new_table(title, *names)
    for row in rows:
        times = [figure(row[f"{name}_ns"] / row["batch"]) for name in ("c", "ours", "struct")]
        counts = [f"{row['pending']:,}", f"{row['batch']:,}"]
        table.add_row(row["api"], *counts, *times, f"{row['median_ours_to_c']:.2f}")
    return with_note(table, "pending, a read(): records; ratio of userfault: the median of each round's own")


def _counts(lab: Facts) -> Table:
    title = "The lab: guest instructions a record"
    table = new_table(title, "wire", "pending", "a read()", "kernel", "+ userfault", "+ os.read+struct")
    for row in lab["read"]:
        counts = [f"{row['pending']:,}", f"{row['batch']:,}"]
        figures = [row["kernel"], row["user"], (row["struct"] - row["c"]) / row["batch"]]
        table.add_row(row["api"], *counts, *map(figure, figures))
    return with_note(table, "kernel: a C loop over read(2); +: what ours and the rival add to it")


def _served(lab: Facts) -> Table:
    title = "The lab: guest instructions a fault, from touch to touch, served by FaultService"
    table = new_table(title, "wire", "filled by", "threads", "a read()", "instructions")
    for row in sorted(lab["served"], key=lambda row: (row["source"] != "zero", row["touchers"])):
        filled = {"zero": "UFFDIO_ZEROPAGE", "buffer": "UFFDIO_COPY"}[row["source"]]
        reads = f"{row['records_per_read']:.1f}"
        table.add_row(row["api"], filled, str(row["touchers"]), reads, figure(row["fault"]))
    return with_note(table, "threads: that touch pages, on the guest's one processor")


def with_note(table: Table, note: str) -> Table:
    table.caption, table.caption_justify = note, "left"
    return table


def _at(rows: list[Row], **wanted: Any) -> Row:
    return next(row for row in rows if all(row[key] == value for key, value in wanted.items()))


def verdict(facts: Facts) -> str:
    """Does 16 bytes instead of 8 cost anything? Empty unless the lab measured v1 and v2."""
    lab = facts.get("lab")
    if not lab or not {"v1", "v2"} <= set(facts["wires"]):
        return ""
    batch = max(facts["batches"])
    v1, v2 = (_at(lab["read"], api=api, batch=batch) for api in ("v1", "v2"))
    one, two = (_at(lab["served"], api=api, source="zero", touchers=1) for api in ("v1", "v2"))
    kernel, fault = v2["kernel"] - v1["kernel"], two["fault"] - one["fault"]
    return (
        f"A record of 16 bytes instead of 8 costs the kernel {kernel:.0f} instructions more "
        f"({v1['kernel']:.0f} to {v2['kernel']:.0f}, {kernel / v1['kernel']:+.0%}, {batch:,} records a "
        f"read), the user's side {_change(v2['user'] - v1['user'])}, and a fault from touch to touch "
        f"{fault / one['fault']:+.1%} ({one['fault']:,.0f} to {two['fault']:,.0f})."
    )


def _change(instructions: float) -> str:
    return "none" if abs(instructions) < 0.5 else f"{instructions:+.1f}"


def decoding(facts: Facts) -> str:
    """What batching is worth in the lab. Empty without it."""
    lab = facts.get("lab")
    batches = facts["batches"]
    if not lab or len(batches) < 2:
        return ""
    wire = lab["read"][0]["api"]
    one, many = (_at(lab["read"], api=wire, batch=batch) for batch in (batches[0], batches[-1]))
    ratio = (one["kernel"] + one["user"]) / (many["kernel"] + many["user"])
    return (
        f"The batch matters, not the record: {batches[-1]:,} records a read instead of {batches[0]} make one "
        f"{ratio:.1f} times cheaper ({wire}: {one['kernel'] + one['user']:,.0f} to "
        f"{many['kernel'] + many['user']:,.0f} instructions)."
    )
