"""The soak test: a minute in CI, moments elsewhere (`python tests/soak.py --help`: as long as you like)."""

from __future__ import annotations

import os
from pathlib import Path

from children import run_storm
from support import LAB

SECONDS = 3 if LAB else 60 if os.environ.get("CI") == "true" else 10


def test_everything_at_once(wire: str, needs_privilege: None, tmp_path: Path) -> None:
    script = str(Path(__file__).with_name("soak.py"))
    line = [script, "--json", "--api", wire, "--seconds", str(SECONDS)]
    told = run_storm(line, tmp_path, SECONDS + (900 if LAB else 150))
    assert told["operations"]
    assert told["bytes_checked"]
