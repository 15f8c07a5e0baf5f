"""The soak test: a minute in CI, moments elsewhere (`python tests/soak.py --help`: as long as you like)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from support import LAB

SECONDS = 3 if LAB else 60 if os.environ.get("CI") == "true" else 10


def test_everything_at_once(wire: str, needs_privilege: None, tmp_path: Path) -> None:
    line = [sys.executable, str(Path(__file__).with_name("soak.py")), "--json", "--api", wire]
    # Files, not pipes, which what hangs would hold open; and a session, to be killed as one.
    out, err = tmp_path / "out", tmp_path / "err"
    with (
        out.open("w") as stdout,
        err.open("w") as stderr,
        subprocess.Popen(
            [*line, "--seconds", str(SECONDS)], stdout=stdout, stderr=stderr, start_new_session=True
        ) as process,
    ):
        try:
            process.wait(SECONDS + (900 if LAB else 150))
        except subprocess.TimeoutExpired:
            pytest.fail(f"it hangs: {err.read_text()}")
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, err.read_text()
    told = json.loads(out.read_text())
    assert told["operations"]
    assert told["bytes_checked"]
