"""`userfault bench`: what the benchmarks of a checkout measure, as tables, JSON and a plot."""

from __future__ import annotations

import json
import re
from pathlib import Path

import click
from rich.console import Console

from userfault.cli import bench_report, bench_script
from userfault.cli.bench_array import array
from userfault.cli.bench_serve import serve
from userfault.cli.bench_stores import stores

WIRES = ("v1", "v2", "msg")
_BATCHES = (1, 8, 64, 512, 4096)
_MOST = 4096
_NATIVE_SECONDS = 600
_LAB_SECONDS = 3600  # a first boot builds a kernel


@click.group()
def bench() -> None:
    """Measure, beside the rivals that take turns with ours. Run it in a checkout of the project."""


def _wires(context: click.Context, option: click.Parameter, text: str) -> list[str]:
    wires = text.split(",")
    if unknown := [wire for wire in wires if wire not in WIRES]:
        raise click.BadParameter(
            f"{unknown[0]!r} is no wire: choose among {','.join(WIRES)}", context, option
        )
    return [wire for wire in WIRES if wire in wires]


def _batches(context: click.Context, option: click.Parameter, text: str) -> list[int]:
    batches = set()
    for part in text.split(","):
        if not re.fullmatch(r"\d{1,4}", part, re.ASCII) or not 1 <= int(part) <= _MOST:
            why = f"{part!r} is not a number of records a read() from 1 to {_MOST}"
            raise click.BadParameter(why, context, option)
        batches.add(int(part))
    return sorted(batches)


@bench.command()
@click.option("--lab", is_flag=True, help="Also boot the lab's kernel, and count instructions for each wire.")
@click.option("--wires", default=",".join(WIRES), show_default=True, callback=_wires, help="Record formats.")
@click.option(
    "--batches",
    default=",".join(map(str, _BATCHES)),
    show_default=True,
    callback=_batches,
    help="Records a read().",
)
@click.option(
    "--rounds",
    type=click.IntRange(1, 1000),
    default=20,
    show_default=True,
    help="Native rounds; the best counts.",
)
@bench_script.json_option
@bench_script.plot_option
@click.pass_context
def read(
    context: click.Context,
    lab: bool,
    wires: list[str],
    batches: list[int],
    rounds: int,
    json_file: str | None,
    plot_file: str | None,
) -> None:
    """What a read() costs a record, by record format and batch.

    Natively, in nanoseconds: from a pipe, which every format can come from (the user's side), and from a
    userfaultfd with 1,024 or more pending faults, in the formats that the running kernel speaks. With
    --lab, in instructions, exactly: all formats on the lab's kernel, split into the kernel's side and the
    user's, and a fault from touch to touch. Beside ours: a C loop over read(2), and os.read + struct.
    """
    with bench_script.told(context):
        folder = bench_script.checkout(Path.cwd())
        draw = bench_script.plots().read_cost if plot_file else None
        facts = bench_script.facts(wires=wires, batches=batches, rounds=rounds)
        chosen = ["--wires", ",".join(wires), "--batches", ",".join(map(str, batches))]
        status = Console(stderr=True)
        with status.status("measuring natively"):
            command = [str(folder / "read.py"), "--json", "--rounds", str(rounds), *chosen]
            facts["native"] = json.loads(bench_script.run(command, _NATIVE_SECONDS))
        if lab:
            with status.status("counting instructions in the lab (some minutes when it has no kernel yet)"):
                command = [str(folder / "lab_read.py"), "--json", *chosen]
                facts["lab"] = json.loads(bench_script.run(command, _LAB_SECONDS))
        bench_script.keep(facts, json_file)
        bench_report.show(facts)
        if plot_file and draw:
            draw(facts, plot_file)


bench.add_command(serve)
bench.add_command(array)
bench.add_command(stores)
