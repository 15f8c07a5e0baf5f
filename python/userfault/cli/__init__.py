"""The `userfault` command."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; say what to install when the `cli` extra is missing."""
    try:
        from userfault.cli.app import cli
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("click", "rich"):
            raise
        print(f"userfault: {error.name} is not installed: pip install 'userfault[cli]'", file=sys.stderr)
        sys.exit(2)
    cli(prog_name="userfault")
