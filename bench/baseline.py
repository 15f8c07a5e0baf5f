"""Count instructions anew, and compare with those recorded in baseline.json.

    python bench/baseline.py             # callgrind: what runs in user space; prints every figure
    python bench/baseline.py --check     # exit status 1 when one grew by more than 5 %
    python bench/baseline.py --update    # record the figures for this toolchain
    python bench/baseline.py --lab …     # the lab's instead: the kernel's side, and whole faults

Figures compare only below the same versions of everything that makes them. baseline.json may hold several
toolchains; --check under one that it does not hold says so, and ends with 0. Without valgrind: 77.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import counted
import lab_read
import toolchain

FILE = Path(__file__).with_name("baseline.json")
LIMIT = 0.05
SKIPPED = 77
TIMEOUT = 300
Figures = dict[str, float]
Entry = dict[str, Any]


def parse(folder: Path) -> Figures:
    """Instructions a call, from the files that callgrind left: the difference of many and few calls."""
    totals: dict[str, dict[int, int]] = {}
    for path in sorted(folder.glob("out.*"), key=lambda path: int(path.suffix[1:])):
        text = path.read_text()
        name = re.search(r"^desc: Trigger: Client Request: (.+):(\d+)$", text, re.MULTILINE)
        total = re.search(r"^summary: (\d+)$", text, re.MULTILINE)
        if name and total:
            totals.setdefault(name[1], {})[int(name[2])] = int(total[1])
    few, many = counted.FEW, counted.MANY
    return {name: (total[many] - total[few]) / (many - few) for name, total in totals.items()}


def count() -> Entry:
    """Run the scripted sequences under callgrind."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["valgrind", "-q", "--tool=callgrind", "--instr-atstart=no"]
        command += [f"--callgrind-out-file={folder}/out", sys.executable, counted.__file__, folder]
        env = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
        env |= {"PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"}
        subprocess.run(command, env=env, check=True, timeout=TIMEOUT)
        figures = parse(Path(folder))
    return {"counted_by": "callgrind", "toolchain": toolchain.callgrind(), "instructions_per_call": figures}


def count_in_lab() -> Entry:
    """Run the benchmark of read() in the lab, and name its figures."""
    found = lab_read.measure(["v1", "v2", "msg"], [1, 8, 64, 512], boots=1)
    figures: Figures = {}
    for row in found["read"]:
        for name in ("c", "ours"):
            figures[f"read/{row['api']}/{row['batch']}/{name}"] = row[name]
    for row in found["served"]:
        figures[f"fault/{row['api']}/{row['source']}/{row['touchers']} touchers"] = row["fault"]
    return {
        "counted_by": "icount",
        "toolchain": toolchain.lab(found["kernel"]),
        "instructions_per_call": figures,
    }


def find(entries: list[Entry], new: Entry) -> Entry | None:
    """The entry of the same counter and toolchain."""
    keys = ("counted_by", "toolchain")
    return next((entry for entry in entries if all(entry[key] == new[key] for key in keys)), None)


def differences(entries: list[Entry], new: Entry) -> list[str]:
    """How the toolchain differs from the recorded one that is nearest to it."""
    same = [entry["toolchain"] for entry in entries if entry["counted_by"] == new["counted_by"]]
    now: Mapping[str, str] = new["toolchain"]
    lists = [
        [
            f"{key}: {old.get(key)} recorded, {value} here"
            for key, value in now.items()
            if old.get(key) != value
        ]
        for old in same
    ]
    return min(lists, key=len, default=["nothing is recorded yet"])


def grown(old: Mapping[str, float], new: Mapping[str, float]) -> list[str]:
    """Figures that grew by more than 5 %, and such as are not counted any more."""
    wrong = [f"{name}: recorded, but not counted any more" for name in old if name not in new]
    for name, before in old.items():
        if name in new and new[name] > before * (1 + LIMIT):
            change = f"+{new[name] / before - 1:.1%}" if before else "from nothing"
            wrong.append(f"{name}: {before:,.1f} -> {new[name]:,.1f} instructions ({change})")
    return wrong


def update(entries: list[Entry], new: Entry) -> list[Entry]:
    """The entries with that of the same counter and toolchain replaced."""
    old = find(entries, new)
    return [entry for entry in entries if entry is not old] + [new]


def check(entries: list[Entry], new: Entry) -> tuple[int, list[str]]:
    """The exit status, and what to say."""
    old = find(entries, new)
    if old is None:
        why = [f"  {line}" for line in differences(entries, new)]
        return 0, ["not compared, for the toolchain differs from every recorded one:", *why]
    wrong = grown(old["instructions_per_call"], new["instructions_per_call"])
    if wrong:
        return 1, [f"grew by more than {LIMIT:.0%}:", *(f"  {line}" for line in wrong)]
    return 0, [f"{len(old['instructions_per_call'])} figures, none grew by more than {LIMIT:.0%}"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="fail when a figure grew by more than 5 %%")
    what.add_argument("--update", action="store_true", help="record the figures for this toolchain")
    parser.add_argument("--lab", action="store_true", help="boot the lab instead of callgrind")
    parser.add_argument("--file", type=Path, default=FILE, help="default: bench/baseline.json")
    options = parser.parse_args()
    program = "qemu-system-x86_64" if options.lab else "valgrind"
    if shutil.which(program) is None:
        print(f"skipped: {program} is missing (apt-get install {program.replace('_64', '')})")
        return SKIPPED
    entries: list[Entry] = json.loads(options.file.read_text()) if options.file.exists() else []
    new = count_in_lab() if options.lab else count()
    old = find(entries, new)
    recorded = old["instructions_per_call"] if old else {}
    for name, figure in new["instructions_per_call"].items():
        change = f"  {figure / recorded[name] - 1:+7.2%}" if recorded.get(name) else ""
        print(f"{name:36} {figure:12,.1f}{change}")
    if options.update:
        options.file.write_text(json.dumps(update(entries, new), indent=1) + "\n")
        print(f"{options.file.name}: {len(new['instructions_per_call'])} figures recorded")
        return 0
    status, lines = check(entries, new)
    print("\n".join(lines))
    return status if options.check else 0


if __name__ == "__main__":
    sys.exit(main())
