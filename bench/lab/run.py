#!/usr/bin/env python3
"""The lab: build an RFC kernel when needed, boot it, run a command in it, report.

    python3 bench/lab/run.py                         the checks of the kernel itself
    python3 bench/lab/run.py -- pytest tests -k v2   any command, at the repository's root

Exit status: the command's own; 1 when it succeeded but a test was skipped or did
not run on the kernel; 3 when the lab cannot start; 124 when the command's time
was up; 125 when the machine did not boot or went down early.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import shutil
import signal
import sys
import tempfile
import time
from typing import Any

sys.dont_write_bytecode = True

# isort: off - the flag above comes first, and "build" may also be a folder of the project
import boot  # noqa: E402
import build  # noqa: E402
import report  # noqa: E402
from build import say  # noqa: E402

# isort: on

HERE = pathlib.Path(__file__).resolve().parent
REPO = HERE.parent.parent
KEPT_RUNS = 5


def arguments(argv: list[str]) -> argparse.Namespace:
    """The command line; all after `--` belongs to the guest."""
    split = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(
        usage="run.py [options] [-- COMMAND...]",
        description="Boot a kernel with RFC v1 and v2, and run COMMAND in it at the root of the "
        "repository. Without COMMAND, check the kernel itself. In the guest, $LAB_OUT is "
        "a folder whose files stay.",
    )
    parser.add_argument("--icount", action="store_true", help="one CPU, virtual ns = instructions")
    parser.add_argument("--timeout", type=float, default=600, metavar="S", help="default: 600")
    parser.add_argument("--memory", default="2G", metavar="SIZE", help="of the guest; default: 2G")
    parser.add_argument(
        "--param", action="append", default=[], metavar="NAME=VALUE",
        help="parameter of the userfaultfd module, such as v1_api=0xAA",
    )  # fmt: skip
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="for the command")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the report here")
    parser.add_argument("--junit", type=pathlib.Path, metavar="FILE", help="and as JUnit XML")
    parser.add_argument("--out", type=pathlib.Path, metavar="DIR", help="a new folder for $LAB_OUT")
    parser.add_argument("--python", default=sys.executable, metavar="PATH", help="first on the guest's PATH")
    parser.add_argument("--print-packages", action="store_true", help="what must be installed")
    parser.add_argument("--build-only", action="store_true", help="make the kernel, boot nothing")
    options = parser.parse_args(argv[:split])
    options.command = argv[split + 1 :]
    for pair in options.param + options.env:
        if "=" not in pair:
            parser.error(f"not NAME=VALUE: {pair}")
    if options.param and not options.command:
        parser.error("the checks expect the default parameters, and set them themselves")
    return options


def run_folder(wanted: pathlib.Path | None) -> pathlib.Path:
    """A fresh folder for one boot; of those we named ourselves the last few stay."""
    if wanted is not None:
        if wanted.exists() and any(wanted.iterdir()):
            raise build.LabError(f"--out {wanted}: not empty")
        wanted.mkdir(parents=True, exist_ok=True)
        return wanted.resolve()
    runs = build.cache_folder() / "runs"
    runs.mkdir(exist_ok=True)
    old = sorted(runs.iterdir(), key=lambda p: p.stat().st_mtime)
    for folder in old[: -(KEPT_RUNS - 1)]:
        shutil.rmtree(folder, ignore_errors=True)
    return pathlib.Path(tempfile.mkdtemp(prefix=time.strftime("%H%M%S-"), dir=runs))


def job(options: argparse.Namespace, kernel: build.Kernel) -> boot.Job:
    """What the guest is to do, and with which environment."""
    # Not resolve(): a virtualenv is known by the path of its link.
    python = pathlib.Path(os.path.abspath(options.python))
    command = options.command or [
        *(str(python), "-m", "pytest", "-v", "-p", "no:cacheprovider", str(HERE / "checks")),
    ]
    path = [str(HERE / "guest"), os.environ.get("PYTHONPATH", "")]
    env = {
        "PATH": f"{python.parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "PYTHONPATH": ":".join(p for p in path if p),
        "PYTEST_PLUGINS": "pytest_lab",
        "PYTHONDONTWRITEBYTECODE": "1",
        "HOME": "/run/tmp",
        "TMPDIR": "/run/tmp",
        "LANG": "C.UTF-8",
        "LAB_OUT": "/run/lab",
        "LAB_KERNEL": kernel.release,
    }
    params = dict(pair.split("=", 1) for pair in options.param)
    if not options.command:
        env["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # seconds of imports, for nothing
    if options.icount:
        env |= {"LAB_ICOUNT": "1", "PYTHONHASHSEED": "0"}
    env |= dict(pair.split("=", 1) for pair in options.env)
    return boot.Job(
        command=command,
        cwd=REPO,
        env=env,
        params=params,
        icount=options.icount,
        memory=options.memory,
        timeout=options.timeout,
    )


def main(argv: list[str]) -> int:
    options = arguments(argv)
    if options.print_packages:
        print(" ".join(build.PACKAGES))
        return 0
    kernel = build.ensure_kernel()
    if options.build_only:
        print(kernel.image)
        return 0
    folder = run_folder(options.out)
    work = job(options, kernel)
    say(f"booting {kernel.release}")
    outcome = boot.boot(kernel.image, folder, work)

    problem = outcome.problem
    if outcome.uname and kernel.release not in outcome.uname:
        problem = f"the guest runs {outcome.uname}, not {kernel.release}"
    tests = report.read_tests(folder / "tests.jsonl")
    why = report.reasons(outcome.status, problem, tests)
    if not options.command and not tests:
        why.append("no check ran")
    if problem:
        print(outcome.console, file=sys.stderr)
    status = report.exit_status(outcome.status, problem, why)
    facts = {name: str(value) for name, value in vars(kernel).items()}
    document: dict[str, Any] = {
        "outcome": "failed" if status else "passed",
        "reasons": why,
        "status": outcome.status,
        "exit_status": status,
        "command": work.command,
        "uname": outcome.uname,
        "cmdline": outcome.cmdline,
        "kernel": facts,
        "icount": options.icount,
        "seconds": {"boot": outcome.boot_seconds, "total": outcome.total_seconds},
        "wires": report.wires(tests),
        "tests": tests,
    }
    report.write_json(folder / "report.json", document)
    if options.json:
        report.write_json(options.json, document)
    if options.junit:
        report.write_junit(options.junit, document)
    for line in why:
        say(line)
    counted = ", ".join(f"{n} {wire}" for wire, n in document["wires"].items())
    say(
        f"{document['outcome'].upper()}: status {status}, boot {outcome.boot_seconds} s, "
        f"{outcome.total_seconds} s in all{'; tests: ' + counted if counted else ''}"
    )
    say(f"{outcome.uname or 'no uname'}; run folder: {folder}")
    return status


if __name__ == "__main__":
    # A CI that gives up sends SIGTERM: unwind, and take the machine down with us.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        sys.exit(main(sys.argv[1:]))
    except build.LabError as stop:
        say(str(stop))
        sys.exit(3)
    except KeyboardInterrupt:
        sys.exit(130)
