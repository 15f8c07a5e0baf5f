"""Running a benchmark of the checkout, and what every `userfault bench` command shares."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import click

from userfault.cli import machine

_GRACE_SECONDS = 10


class BenchError(Exception):
    """Nothing could be measured; the text says why."""


@contextlib.contextmanager
def told(context: click.Context) -> Iterator[None]:
    """Errors end the command with a sentence, not a traceback."""
    try:
        yield
    except (BenchError, OSError) as error:
        click.echo(f"userfault: {error}", err=True)
        context.exit(1)


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
json_option = click.option(
    "--json", "json_file", type=_FILE, callback=_target, help="Write every figure to this file."
)
plot_option = click.option(
    "--plot", "plot_file", type=_FILE, callback=_picture, help="Draw them (a .png, .svg or .pdf file)."
)


def checkout(start: Path) -> Path:
    """The bench/ folder of the checkout that holds `start`. Raises BenchError."""
    for folder in (start, *start.parents):
        if (folder / "bench" / "lab_read.py").is_file() and (folder / "bench" / "read.py").is_file():
            return folder / "bench"
    raise BenchError(
        f"no checkout of userfault holds {start}: the benchmarks are not installed with the package; "
        "clone the project and run this command in it"
    )


def plots() -> ModuleType:
    """`userfault.plot`. Raises BenchError without matplotlib."""
    try:
        import userfault.plot
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        raise BenchError("--plot needs matplotlib: pip install 'userfault[plot]'") from None
    return userfault.plot


def run(arguments: list[str], seconds: float) -> str:
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


def facts(**chosen: Any) -> dict[str, Any]:
    """What the figures depend on, and what was asked for."""
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
        **chosen,
    }


def keep(found: dict[str, Any], json_file: str | None) -> None:
    """Note the load after measuring, and write everything to the file, if one was asked for."""
    found["load_after"] = os.getloadavg()[0]
    if json_file:
        Path(json_file).write_text(json.dumps(found, indent=1) + "\n")
