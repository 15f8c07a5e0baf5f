"""That events.py measures at all: in a process of its own, because it forks beside threads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from events_storm import KINDS

SCRIPT = str(Path(__file__).with_name("events.py"))


@pytest.mark.skipif(os.geteuid() != 0, reason="fork events need CAP_SYS_PTRACE")
def test_every_workload_has_rows(needs_uffd: None) -> None:
    command = [sys.executable, SCRIPT, "--quick", "--rounds", "2", "--seconds", "1"]
    done = subprocess.run([*command, "--json"], check=True, capture_output=True, text=True, timeout=300)
    assert not done.stderr
    rows = json.loads(done.stdout)
    figures = [figure for row in rows for figure in row.get("figures", ())]
    assert {row["workload"] for row in rows} == {"features on", "first byte", "storm"}
    assert all(row["count"] > 0 for row in rows if row.get("what") in KINDS)
    assert [figure["value"] for figure in figures if figure["goal"] == "<= 0"] == [0, 0]
    assert sum(figure["goal"] == "<= 1.05" for figure in figures) == 2
    table = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout
    assert all(kind in table for kind in KINDS)
