"""`userfault bench stores`: what lazy arrays over zarr cost, beside zarr itself and dask."""

from __future__ import annotations

import json
from pathlib import Path

import click
from rich.console import Console

from userfault.cli import bench_script, bench_stores_report

_SECONDS = 7200
_LEAST = 4 << 20


@click.command()
@click.option(
    "--bytes",
    "nbytes",
    type=click.IntRange(_LEAST, 1 << 40),
    default=1 << 30,
    show_default=True,
    help="Of each array, in a temporary folder.",
)
@click.option(
    "--rounds",
    type=click.IntRange(1, 1000),
    default=5,
    show_default=True,
    help="Rounds, in which all take turns.",
)
@bench_script.json_option
@bench_script.plot_option
@click.pass_context
def stores(
    context: click.Context, nbytes: int, rounds: int, json_file: str | None, plot_file: str | None
) -> None:
    """What a lazy array over a zarr store costs, whose chunks are decoded by a helper process.

    Beside zarr and dask: 1,000 random elements, the sum of all, and scipy on a window. Beside an ordinary
    array: a second pass. Then what a page costs that comes from Python, and what opening costs. Each goal
    is said to be met or missed. Needs zarr, dask and scipy.
    """
    with bench_script.told(context):
        folder = bench_script.checkout(Path.cwd())
        draw = bench_script.plots().stores_cost if plot_file else None
        facts = bench_script.facts(rounds=rounds, nbytes=nbytes)
        with Console(stderr=True).status("measuring (some minutes)"):
            command = [str(folder / "stores.py"), "--json", "--rounds", str(rounds), "--bytes", str(nbytes)]
            facts["stores"] = json.loads(bench_script.run(command, _SECONDS))
        bench_script.keep(facts, json_file)
        bench_stores_report.show(facts)
        if plot_file and draw:
            draw(facts, plot_file)
