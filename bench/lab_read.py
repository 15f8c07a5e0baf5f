"""The cost of read() and of a whole fault on the lab's kernel, in guest instructions, for every wire.

    python bench/lab_read.py [--json] [--wires v1,v2,msg] [--batches 1,8,64,512,4096] [--boots 2]

One boot cannot speak both v1 and msg to the library: api 0xAA means either. So v1 is measured in a guest
where it means v1, msg in one where it means msg, and v2 in both, which shows that the two agree.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import rivals
from compare import Row, print_table
from read import PIPE_BATCHES, WIRES

LAB = Path(__file__).with_name("lab") / "run.py"
GUEST = Path(__file__).with_name("guest_read.py")
TIMEOUT = 900  # seconds a boot may take; the first one builds the kernel before
FIGURES: dict[str, Callable[[list[float]], float]] = {
    "ours": min,
    "c": min,
    "struct": min,
    "fault": statistics.median,
}


class LabError(Exception):
    """The lab did not come to an end; the text is what it said last."""


def boots_for(wires: Sequence[str]) -> list[tuple[list[str], list[str]]]:
    """For each kind of boot, the lab's options and the wires to measure."""
    kinds: list[tuple[list[str], list[str]]] = []
    if "v1" in wires:
        kinds.append((["--param", "v1_api=0xAA"], [api for api in wires if api != "msg"]))
    if "msg" in wires or "v1" not in wires:
        kinds.append(([], [api for api in wires if api != "v1"]))
    return kinds


def boot(options: Sequence[str], wires: Sequence[str], batches: Sequence[int]) -> dict[str, Any]:
    """One boot: the guest's answer, with the kernel's release."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out")
        # Compiling in the guest takes long, and its clock runs ahead while it waits for files.
        built = rivals.build(Path(folder))
        lab = ["--icount", "--out", str(out), "--timeout", str(TIMEOUT), "--env", f"{rivals.BUILT}={built}"]
        guest = ["--wires", ",".join(wires), "--batches", ",".join(map(str, batches))]
        command = [sys.executable, str(LAB), *lab, *options, "--python", sys.executable]
        command += ["--", "python", str(GUEST), *guest]
        done = subprocess.run(command, capture_output=True, text=True, timeout=3 * TIMEOUT)
        if done.returncode:
            raise LabError(
                (done.stdout + done.stderr).strip() or f"the lab's exit status was {done.returncode}"
            )
        answer: dict[str, Any] = json.loads((out / "guest_read.json").read_text())
        report = json.loads((out / "report.json").read_text())
        return answer | {"kernel": report["kernel"]["release"]}


def merged(rows: Sequence[Row], keys: Sequence[str]) -> list[Row]:
    """One row for each of `keys`: of all boots the least read, the median fault, and their distance."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    result = []
    for group in groups.values():
        row = {key: value for key, value in group[0].items() if not key.endswith("_median")}
        ranges = []
        for name, choose in FIGURES.items():
            if name in row:
                found = [other[name] for other in group]
                row[name] = choose(found)
                # What a list of tuples costs depends on what malloc did before.
                ranges += [] if name == "struct" else [max(found) / min(found) - 1]
        row |= {"boots": len(group), "spread": max(ranges)}
        result.append(row)
    return sorted(result, key=lambda row: WIRES.index(row["api"]))


def measure(wires: Sequence[str], batches: Sequence[int], boots: int) -> dict[str, Any]:
    """Every kind of boot, `boots` times; two guests run at a time.

    A read row has instructions a call: `c` (the C loop: the kernel's side, with a dozen of its own), `ours`
    (EventReader.read), `struct`; and of those a record `kernel` and `user`, the latter by subtraction.
    """
    with ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(boot, *kind, batches) for kind in boots_for(wires) * boots]
        found = [answer.result() for answer in answers]
    read = merged([row for answer in found for row in answer["read"]], ("api", "batch"))
    for row in read:
        row["kernel"] = row["c"] / row["batch"]
        row["user"] = (row["ours"] - row["c"]) / row["batch"]
    served = merged([row for answer in found for row in answer["served"]], ("api", "source", "touchers"))
    return {
        "kernel": found[0]["kernel"],
        "boots": len(found),
        "largest_spread_read": max(row["spread"] for row in read),
        "largest_spread_fault": max(row["spread"] for row in served),
        "read": read,
        "served": served,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--wires", default=",".join(WIRES), help="default: %(default)s")
    parser.add_argument("--batches", default=",".join(map(str, PIPE_BATCHES)), help="default: %(default)s")
    parser.add_argument("--boots", type=int, default=2, help="of each kind; default: %(default)s")
    options = parser.parse_args()
    batches = [int(batch) for batch in options.batches.split(",")]
    try:
        found = measure(options.wires.split(","), batches, options.boots)
    except LabError as error:
        print(error, file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        print_table(found["read"])
        print_table(found["served"])
        print(
            f"{found['kernel']}, {found['boots']} boots; apart at most: read "
            f"{found['largest_spread_read']:.2%}, fault {found['largest_spread_fault']:.2%}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
