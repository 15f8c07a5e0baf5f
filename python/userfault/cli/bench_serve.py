"""`userfault bench serve`: what a fault costs, served by ours and by its rivals."""

from __future__ import annotations

import json
from pathlib import Path

import click
from rich.console import Console

from userfault.cli import bench_script, bench_serve_report

_SECONDS = 7200


@click.command()
@click.option(
    "--mode",
    type=click.Choice(["threads", "inline"]),
    default="threads",
    show_default=True,
    help="Who serves a fault: threads of the service's own, or the thread that took it.",
)
@click.option("--quick", is_flag=True, help="Little of everything, to see that it works.")
@click.option(
    "--rounds",
    type=click.IntRange(1, 1000),
    default=20,
    show_default=True,
    help="Rounds, in which all take turns.",
)
@bench_script.json_option
@bench_script.plot_option
@click.pass_context
def serve(
    context: click.Context,
    mode: str,
    quick: bool,
    rounds: int,
    json_file: str | None,
    plot_file: str | None,
) -> None:
    """What a fault costs from touch to touch, by access pattern and number of threads.

    Beside ours: handlers in C, which read one record or 256 records a read(), and the Python loop. Then
    whole regions beside a memcpy, a large dispatch table, many threads asleep at once, an idle service, and
    close() under load. In mode inline: random pages and pages in order, also beside a handler of SIGBUS in C.
    Each goal is said to be met or missed.
    """
    with bench_script.told(context):
        folder = bench_script.checkout(Path.cwd())
        draw = bench_script.plots().serve_cost if plot_file else None
        facts = bench_script.facts(mode=mode, rounds=rounds, quick=quick)
        with Console(stderr=True).status("measuring (some minutes)"):
            command = [str(folder / "serve.py"), "--json", "--mode", mode, "--rounds", str(rounds)]
            command += ["--quick"] if quick else []
            facts["serve"] = json.loads(bench_script.run(command, _SECONDS))
        bench_script.keep(facts, json_file)
        bench_serve_report.show(facts)
        if plot_file and draw:
            draw(facts, plot_file)
