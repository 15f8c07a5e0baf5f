#!/usr/bin/env python3
"""All that the lab does: the checks of its kernel, and the project's tests on every wire.

    python3 bench/lab/suite.py --python .venv/bin/python --out build/lab

Three boots, since 0xAA can only mean one thing at a time. The reports of each, and
summary.json over all, are left in the output folder. Exit status: 0 when every boot
passed; else that of the first which did not, as run.py gives it; 1 when all
passed and a wire had no test.
"""

from __future__ import annotations

import argparse
import pathlib
import signal
import sys
from typing import Any, NamedTuple

sys.dont_write_bytecode = True

# isort: off - as in run.py
import build  # noqa: E402
import report  # noqa: E402
import run  # noqa: E402
from build import say  # noqa: E402

# isort: on

WIRES = ("v1", "v2", "msg")


class Boot(NamedTuple):
    """One boot: `wires` is what the kernel must speak in it; none for the kernel's own checks. `tried` are
    those that the tests run for, if another boot has run them for the others."""

    name: str
    wires: str = ""
    options: tuple[str, ...] = ()
    tried: str = ""


BOOTS = (
    Boot("checks"),
    Boot("v2-msg", "v2,msg"),
    Boot("v1-v2", "v1,v2", ("--param", "v1_api=0xAA"), tried="v1"),
)


def suite_line(boot: Boot, options: argparse.Namespace) -> list[str]:
    """run.py's arguments for a boot."""
    line = ["--python", str(options.python), "--timeout", f"{options.timeout:g}"]
    for kind, suffix in (("--json", "json"), ("--junit", "xml")):
        line += [kind, str(options.out / f"{boot.name}.{suffix}")]
    line += boot.options
    if boot.wires:
        line += ["--env", f"USERFAULT_WIRES={boot.wires}"]
        line += ["--env", f"USERFAULT_TRIED={boot.tried or boot.wires}"]
        line += ["--", "python", "-m", "pytest", "-p", "no:cacheprovider", "--benchmark-disable", "tests"]
    return line


def merged(boots: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """One verdict over the reports of all boots."""
    wires: dict[str, int] = {}
    for told in boots.values():
        for wire, n in told["wires"].items():
            wires[wire] = wires.get(wire, 0) + n
    status = next((told["exit_status"] for told in boots.values() if told["exit_status"]), 0)
    why = [f"{name}: {reason}" for name, told in boots.items() for reason in told["reasons"]]
    for boot in BOOTS:
        asked = (boot.tried or boot.wires).split(",") if boot.wires else WIRES
        had = boots[boot.name]["wires"]
        why += [f"{boot.name}: no test of {wire}" for wire in asked if not had.get(wire)]
    status = status or int(bool(why))
    return {
        "outcome": "failed" if status else "passed",
        "exit_status": status,
        "reasons": why,
        "wires": wires,
        "boots": {
            name: {
                key: told[key] for key in ("outcome", "exit_status", "wires", "uname", "cmdline", "seconds")
            }
            for name, told in boots.items()
        },
    }


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description="The checks and the project's tests on v1, v2 and msg.")
    parser.add_argument(
        "--python", type=pathlib.Path, default=sys.executable, help="with pytest and userfault"
    )
    parser.add_argument("--out", type=pathlib.Path, default=run.REPO / "build/lab", help="for the reports")
    parser.add_argument("--timeout", type=float, default=900, metavar="S", help="of a boot; default: 900")
    options = parser.parse_args(argv)
    told = {}
    for boot in BOOTS:
        # A report of an earlier run must not pass for this one's.
        (options.out / f"{boot.name}.json").unlink(missing_ok=True)
        say(f"--- {boot.name}")
        run.main(suite_line(boot, options))
        told[boot.name] = report.read_json(options.out / f"{boot.name}.json")
    summary = merged(told)
    report.write_json(options.out / "summary.json", summary)
    for line in summary["reasons"]:
        say(line)
    counted = ", ".join(f"{n} {wire}" for wire, n in summary["wires"].items())
    say(f"{summary['outcome'].upper()}: {counted}; reports: {options.out}")
    return int(summary["exit_status"])


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        sys.exit(main(sys.argv[1:]))
    except build.LabError as stop:
        say(str(stop))
        sys.exit(3)
    except KeyboardInterrupt:
        sys.exit(130)
