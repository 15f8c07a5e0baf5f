"""`userfault doctor`: what this machine can do, why not, and what mends it."""

from __future__ import annotations

import contextlib
import json
import os

import click
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

import userfault as uf
from userfault.cli import checks
from userfault.cli.checks import Check
from userfault.flags import names

_MARKS = {"ok": "[green]✓[/]", "limited": "[yellow]![/]", "missing": "[red]✗[/]"}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def doctor(context: click.Context, as_json: bool) -> None:
    """Say what this machine can do, why not, and what mends it.

    Exits with 0 when a userfaultfd can be opened and pages be served.
    """
    capabilities = uf.probe()
    api, opened_by = None, None
    with contextlib.suppress(uf.UserfaultError), uf.Userfaultfd() as u:
        api, opened_by = u.api, u.opened_by
    groups = {
        "Opening": list(checks.opening(capabilities)),
        "Features": list(checks.features(capabilities)),
        "System": list(checks.system(api)),
    }
    if as_json:
        click.echo(json.dumps(_facts(capabilities, api, opened_by, groups), indent=2))
    else:
        _show(capabilities, api, opened_by, groups)
    context.exit(0 if api else 1)


def _facts(
    capabilities: uf.Capabilities, api: uf.Api | None, opened_by: str | None, groups: dict[str, list[Check]]
) -> dict[str, object]:
    return {
        "ok": api is not None,
        "kernel": os.uname().release,
        "opened_by": opened_by,
        "user_mode_only": capabilities.user_mode_only,
        "api": api,
        "apis": list(capabilities.apis),
        "ioctls": [flag.name for flag in capabilities.ioctls],
        "features": None if capabilities.features is None else names(capabilities.features).split("|"),
        "checks": [check._asdict() for group in groups.values() for check in group],
    }


def _show(
    capabilities: uf.Capabilities, api: uf.Api | None, opened_by: str | None, groups: dict[str, list[Check]]
) -> None:
    console = Console(highlight=False)
    if api is None:
        verdict = "[bold red]No page can be served here:[/] no userfaultfd can be opened."
    elif capabilities.user_mode_only:
        verdict = f"[bold yellow]Pages can be served, in part:[/] opened by {opened_by}, records are {api}."
    else:
        verdict = f"[bold green]Pages can be served:[/] opened by {opened_by}, records are {api}."
    console.print(Padding(verdict, (1, 1, 0, 1)))
    for title, group in groups.items():
        console.print(Padding(f"[bold]{title}[/]", (1, 1, 0, 1)))
        console.print(Padding(_features(group) if title == "Features" else _rows(group), (0, 0, 0, 2)))
    remedies: dict[str, list[str]] = {}
    for check in (check for group in groups.values() for check in group if check.remedy):
        remedies.setdefault(check.remedy, []).append(check.name)
    if remedies:
        console.print(Padding("[bold]To mend[/]", (1, 1, 0, 1)))
        table = _table()
        for remedy, mended in remedies.items():
            table.add_row("[yellow]→[/]", _shorten(mended), escape(remedy))
        console.print(Padding(table, (0, 0, 0, 2)))
    console.print()


def _table() -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column()
    return table


def _rows(group: list[Check]) -> Table:
    table = _table()
    for check in group:
        table.add_row(_MARKS[check.status], check.name, escape(check.detail))
    return table


def _features(group: list[Check]) -> Table:
    """One row for each version of Linux, so that what is missing stands out by its row."""
    table = _table()
    rows: dict[tuple[str, str], list[str]] = {}
    for check in group:
        rows.setdefault((check.status, check.detail), []).append(check.name.removeprefix("feature."))
    for (status, detail), members in rows.items():
        table.add_row(_MARKS[status], escape(detail), " ".join(members))
    return table


def _shorten(mended: list[str]) -> str:
    return mended[0] if len(mended) == 1 else f"{mended[0]} and {len(mended) - 1} more"
