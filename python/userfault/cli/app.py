"""The command group."""

from __future__ import annotations

import importlib.metadata

import click

from userfault.cli.bench import bench
from userfault.cli.demo import demo
from userfault.cli.doctor import doctor


def _version(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    if not wanted or context.resilient_parsing:
        return
    try:
        version = importlib.metadata.version("userfault")
    except importlib.metadata.PackageNotFoundError:
        version = "(not installed: run from a source tree)"
    click.echo(f"userfault {version}")
    context.exit()


@click.group()
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_version,
    help="Show the version and exit.",
)
def cli() -> None:
    """Linux userfaultfd for Python, at C speed."""


cli.add_command(bench)
cli.add_command(demo)
cli.add_command(doctor)
