"""`userfault bench array`: what lazy arrays cost, beside numpy's own ways and pread(2)."""

from __future__ import annotations

import json
from pathlib import Path

import click
from rich.console import Console

from userfault.cli import bench_array_report, bench_script

_SECONDS = 7200


@click.command()
@click.option("--quick", is_flag=True, help="Little of everything, to see that it works.")
@click.option(
    "--rounds",
    type=click.IntRange(1, 1000),
    default=10,
    show_default=True,
    help="Rounds, in which all take turns.",
)
@bench_script.json_option
@bench_script.plot_option
@click.pass_context
def array(
    context: click.Context, quick: bool, rounds: int, json_file: str | None, plot_file: str | None
) -> None:
    """What a lazy array costs, from opening to the result.

    Beside numpy.fromfile and numpy.memmap: the sum of a file of 1 GiB, its first element, and 1,000 random
    ones. Then whole pages by several threads beside pread, an array of ten times its memory limit, and a
    source that decompresses beside decompressing everything first. Each goal is said to be met or missed.
    """
    with bench_script.told(context):
        folder = bench_script.checkout(Path.cwd())
        draw = bench_script.plots().array_cost if plot_file else None
        facts = bench_script.facts(rounds=rounds, quick=quick)
        with Console(stderr=True).status("measuring (some minutes)"):
            command = [str(folder / "arrays.py"), "--json", "--rounds", str(rounds)]
            command += ["--quick"] if quick else []
            facts["array"] = json.loads(bench_script.run(command, _SECONDS))
        bench_script.keep(facts, json_file)
        bench_array_report.show(facts)
        if plot_file and draw:
            draw(facts, plot_file)
