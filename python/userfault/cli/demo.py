"""`userfault demo`: the main job in miniature, beside the loop that people write today."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import sys
import tempfile
from collections.abc import Iterator

import click
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from userfault import PAGE_SIZE, SourceError, UnavailableError, UserfaultError
from userfault.cli import machine, race, report, units
from userfault.cli.race import DemoError
from userfault.cli.units import human, whole_pages

_DEFAULT_SIZE = 256 << 20
_CHUNK = 4 << 20


@click.command()
@click.option(
    "--size",
    callback=units.size,
    metavar="SIZE",
    help="How much to map: 4096, 64K, 256M, 1G.  [default: 256M, or as much as --file has]",
)
@click.option(
    "--threads", type=click.IntRange(1, 64), default=4, show_default=True, help="Threads that touch pages."
)
@click.option(
    "--file",
    type=click.Path(exists=True, dir_okay=False, readable=True),
    help="Serve this file instead of a temporary one with random bytes.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def demo(context: click.Context, size: int | None, threads: int, file: str | None, as_json: bool) -> None:
    """Serve page faults from a file, check every byte, and compare with a Python loop.

    Exits with 0 only when every byte was right.
    """
    try:
        with _progress() as progress:
            result, file_bytes = _run(file, size, threads, progress)
    except (UserfaultError, DemoError, OSError) as error:
        # The library's own texts say what to do: an errno in front of them would only hide that.
        text = (isinstance(error, UnavailableError) and error.strerror) or str(error)
        if as_json:
            click.echo(json.dumps({"ok": False, "error": text}, indent=2))
        click.echo(f"userfault: {text}", err=True)
        context.exit(1)
    facts = report.facts(result, file, file_bytes)
    if as_json:
        click.echo(json.dumps(facts, indent=2))
    else:
        report.show(facts)


def _run(file: str | None, size: int | None, threads: int, progress: Progress) -> tuple[race.Race, int]:
    """Prepare the file, and run: what was measured, and the file's size."""
    file_bytes = size or _DEFAULT_SIZE if file is None else _size_of(file)
    length = min(whole_pages(file_bytes), size or sys.maxsize)
    available = machine.memory().get("MemAvailable")
    if available is not None and 2 * length > available:
        raise DemoError(
            f"two regions of {human(length)} do not fit into the {human(available)} of memory available: "
            "choose a smaller --size"
        )
    pages = length // PAGE_SIZE
    tasks = {
        "file": progress.add_task("the file, written" if file is None else "the file, read", total=pages),
        "userfault": progress.add_task("served by userfault", total=pages),
        "loop": progress.add_task("served by a Python loop", total=pages),
        "check": progress.add_task("checked, byte by byte", total=2 * pages),
    }

    def advance(name: str, done: int) -> None:
        # Drawn here, between the timed parts, and not by a thread that would compete for the GIL.
        progress.advance(tasks[name], done)
        progress.refresh()

    with _random_file(length, advance) if file is None else _cached_file(file, length, advance) as path:
        return race.run(path, length, threads, advance), file_bytes


def _size_of(file: str) -> int:
    status = os.stat(file)
    if not stat.S_ISREG(status.st_mode):
        raise SourceError(f"{file} is not a regular file: give one")
    if status.st_size == 0:
        raise SourceError(f"{file} is empty: give a file that has something to serve")
    return status.st_size


@contextlib.contextmanager
def _random_file(length: int, advance: race.Advance) -> Iterator[str]:
    """A file of random bytes without a name, so that nothing remains of it however the process ends."""
    random = np.random.default_rng()
    with tempfile.TemporaryFile(buffering=0) as file:
        left = length
        try:
            while left:
                written = file.write(random.bytes(min(left, _CHUNK)))
                left -= written
                advance("file", written // PAGE_SIZE)
        except OSError as error:
            raise DemoError(
                f"cannot write {human(length)} to {tempfile.gettempdir()}: {error.strerror}: "
                "choose a smaller --size, or set TMPDIR to where there is room"
            ) from error
        yield f"/proc/self/fd/{file.fileno()}"


@contextlib.contextmanager
def _cached_file(path: str, length: int, advance: race.Advance) -> Iterator[str]:
    """The file, brought into the page cache: nobody pays for the disk, and its errors show up now."""
    with open(path, "rb", buffering=0) as file:
        while length > 0 and (chunk := file.read(min(length, _CHUNK))):
            length -= len(chunk)
            advance("file", -(-len(chunk) // PAGE_SIZE))
    yield path


def _progress() -> Progress:
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description:24}"),
        BarColumn(40),
        TaskProgressColumn(),
        console=console,
        auto_refresh=False,
        transient=True,
        disable=not console.is_terminal,
    )
