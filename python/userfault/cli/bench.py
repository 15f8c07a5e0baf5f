"""`userfault bench`: what the benchmarks of a checkout measure, as tables, JSON and a plot."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from userfault.cli import bench_report, machine

WIRES = ("v1", "v2", "msg")
_BATCHES = (1, 8, 64, 512, 4096)
_MOST = 4096
_NATIVE_SECONDS = 600
_LAB_SECONDS = 3600  # a first boot builds a kernel
_GRACE_SECONDS = 10


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


def _target(context: click.Context, option: click.Parameter, path: str | None) -> str | None:
    """Say before a minute of measuring, and not after it, that the result cannot be written."""
    if path is not None and not os.access(Path(path).absolute().parent, os.W_OK | os.X_OK):
        raise click.BadParameter(f"{path}: no such folder, or not writable", context, option)
    return path


def _picture(context: click.Context, option: click.Parameter, path: str | None) -> str | None:
    if path is not None and Path(path).suffix not in (".png", ".svg", ".pdf"):
        raise click.BadParameter(f"{path} must end in .png, .svg or .pdf", context, option)
    return _target(context, option, path)


_FILE = click.Path(dir_okay=False, writable=True)


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
@click.option("--json", "json_file", type=_FILE, callback=_target, help="Write every figure to this file.")
@click.option(
    "--plot", "plot_file", type=_FILE, callback=_picture, help="Draw them (a .png, .svg or .pdf file)."
)
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
    try:
        folder = checkout(Path.cwd())
        draw = _drawing() if plot_file else None
        facts = _facts(wires, batches, rounds)
        chosen = ["--wires", ",".join(wires), "--batches", ",".join(map(str, batches))]
        status = Console(stderr=True)
        with status.status("measuring natively"):
            command = [str(folder / "read.py"), "--json", "--rounds", str(rounds), *chosen]
            facts["native"] = json.loads(_run(command, _NATIVE_SECONDS))
        if lab:
            with status.status("counting instructions in the lab (some minutes when it has no kernel yet)"):
                command = [str(folder / "lab_read.py"), "--json", *chosen]
                facts["lab"] = json.loads(_run(command, _LAB_SECONDS))
        facts["load_after"] = os.getloadavg()[0]
        if json_file:
            Path(json_file).write_text(json.dumps(facts, indent=1) + "\n")
        bench_report.show(facts)
        if plot_file and draw:
            draw(facts, plot_file)
    except (BenchError, OSError) as error:
        click.echo(f"userfault: {error}", err=True)
        context.exit(1)


class BenchError(Exception):
    """Nothing could be measured; the text says why."""


def checkout(start: Path) -> Path:
    """The bench/ folder of the checkout that holds `start`. Raises BenchError."""
    for folder in (start, *start.parents):
        if (folder / "bench" / "lab_read.py").is_file() and (folder / "bench" / "read.py").is_file():
            return folder / "bench"
    raise BenchError(
        f"no checkout of userfault holds {start}: the benchmarks are not installed with the package; "
        "clone the project and run this command in it"
    )


def _drawing() -> Any:
    try:
        from userfault.plot import read_cost
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        raise BenchError("--plot needs matplotlib: pip install 'userfault[plot]'") from None
    return read_cost


def _run(arguments: list[str], seconds: float) -> str:
    """A script of bench/ in a process group of its own, which ends with us or when its time is up."""
    # What is measured is the userfault that runs now, installed or not.
    path = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))}
    process = subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        process_group=0,
    )
    try:
        output, errors = process.communicate(timeout=seconds)
    except BaseException as error:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.communicate(timeout=_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            name = Path(arguments[0]).name
            raise BenchError(f"{name} did not end within {seconds:g} s, and was stopped") from None
        raise
    if process.returncode:
        text = errors.strip() or f"{Path(arguments[0]).name} ended with status {process.returncode}"
        # Of a traceback, what happened is in the last line.
        raise BenchError(text.splitlines()[-1] if text.startswith("Traceback") else text)
    return output


def _facts(wires: list[str], batches: list[int], rounds: int) -> dict[str, Any]:
    """What the figures depend on."""
    import numpy as np

    model = machine.fields("/proc/cpuinfo")
    return {
        "kernel": os.uname().release,
        "machine": os.uname().machine,
        "processor": next(
            (value for name, value in model.items() if name.strip() == "model name"), "unknown"
        ),
        "processors": os.cpu_count(),
        "python": sys.version.split()[0],
        "numpy": np.__version__,
        "load_before": os.getloadavg()[0],
        "wires": wires,
        "batches": batches,
        "rounds": rounds,
    }
