"""What `userfault demo` found: as a dictionary for machines, and on the terminal."""

from __future__ import annotations

import os
from enum import IntFlag
from typing import Any

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from userfault import PAGE_SIZE, latency_percentile
from userfault.cli.race import Race
from userfault.cli.units import human
from userfault.flags import names

Facts = dict[str, Any]


def _names(mask: IntFlag) -> list[str]:
    return names(mask).split("|") if mask else []


def facts(race: Race, file: str | None, file_bytes: int) -> Facts:
    """Every figure, with its unit in the name."""
    stats, agreement = race.stats, race.agreement
    return {
        "ok": True,
        "kernel": os.uname().release,
        "negotiation": {
            "opened_by": race.opened_by,
            "api": str(agreement.api),
            "asked": _names(agreement.asked),
            "refused": _names(agreement.refused),
            "agreed": _names(agreement.features),
            "ioctls": _names(agreement.ioctls),
        },
        "file": file,
        "file_bytes": file_bytes,
        "page_bytes": PAGE_SIZE,
        "pages": race.pages,
        "threads": race.threads,
        "parts": race.parts,
        "faults": race.faults,
        "records": int(stats["records"]),
        "reads": int(stats["reads"]),
        "records_per_read": float(stats["records"] / stats["reads"]),
        "pages_filled": int(stats["pages"]),
        "seconds": race.seconds,
        "faults_per_second": race.faults / race.seconds,
        "service_p50_ns": latency_percentile(stats, 50),
        "service_p99_ns": latency_percentile(stats, 99),
        "verified_bytes": race.verified_bytes,
        "python_loop": {
            "faults": race.loop_faults,
            "records": race.loop_faults,
            "reads": race.loop_faults,
            "records_per_read": 1.0,
            "seconds": race.loop_seconds,
            "faults_per_second": race.loop_faults / race.loop_seconds,
            "verified_bytes": race.loop_verified_bytes,
        },
        "ratio": race.ratio,
    }


def show(facts: Facts) -> None:
    """Print it for people."""
    console = Console(highlight=False)
    negotiation, loop = facts["negotiation"], facts["python_loop"]

    setting = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    setting.add_column(style="dim")
    setting.add_column()
    setting.add_row("opened by", negotiation["opened_by"])
    setting.add_row("records", negotiation["api"])
    for key in ("asked", "refused", "agreed"):
        setting.add_row(key, " ".join(negotiation[key]) or "nothing")
    mapped = human(facts["pages"] * PAGE_SIZE)
    setting.add_row("region", f"{mapped}, {facts['pages']:,} pages of {human(PAGE_SIZE)}")
    setting.add_row("served from", facts["file"] or "a temporary file of random bytes")
    touchers = "1 thread touches" if facts["threads"] == 1 else f"{facts['threads']} threads touch"
    setting.add_row("touched by", f"{touchers} each page once, in random order")
    console.print(Padding(setting, (1, 0, 0, 1)))

    figures = Table(box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0))
    figures.add_column("")
    figures.add_column("userfault", justify="right", style="bold")
    figures.add_column("Python loop", justify="right")
    figures.add_row("faults", f"{facts['faults']:,}", f"{loop['faults']:,}")
    figures.add_row("read() calls", f"{facts['reads']:,}", f"{loop['reads']:,}")
    per_read = [f"{figure['records_per_read']:.2f}" for figure in (facts, loop)]
    figures.add_row("records per read()", *per_read)
    figures.add_row("seconds", f"{facts['seconds']:.3f}", f"{loop['seconds']:.3f}")
    figures.add_row("faults/s", f"{facts['faults_per_second']:,.0f}", f"{loop['faults_per_second']:,.0f}")
    for percent in (50, 99):
        microseconds = facts[f"service_p{percent}_ns"] / 1000
        figures.add_row(f"service time, p{percent}", f"{microseconds:,.1f} µs", "not taken")
    figures.add_row("bytes checked, all right", f"{facts['verified_bytes']:,}", f"{loop['verified_bytes']:,}")
    console.print(figures)

    console.print(f" [bold green]{facts['ratio']:.2f} times[/] as many faults a second as the Python loop.")
    console.print(
        Padding(
            "Both served every page of a region of their own from the same file in the page cache, "
            f"to as many threads in the same order, taking turns in {facts['parts']} parts. "
            "The Python loop is os.read of one record, struct, bisect, os.preadv and "
            "fcntl.ioctl(UFFDIO_COPY). Service time is from read() to resolved; "
            "taking it would slow the Python loop down.",
            (0, 1, 1, 1),
        ),
        style="dim",
    )
