"""The README's Python runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from support import KERNEL_WIRES, LAB, Child

README = (Path(__file__).parents[1] / "README.md").read_text()
NAMES = ("lazy", "stores", "pager", "service", "inline", "fork", "monitor")
BLOCKS = dict(zip(NAMES, re.findall(r"```python\n(.*?)```", README, re.S), strict=True))
if LAB:
    del BLOCKS["stores"], BLOCKS["pager"]  # another Python takes its time to start there
if LAB and "msg" not in KERNEL_WIRES:
    del BLOCKS["lazy"], BLOCKS["inline"]  # which need msg


@pytest.mark.parametrize("name", BLOCKS)
def test_example(needs_uffd: None, child: Child, tmp_path: Path, name: str) -> None:
    done = child(f"import os\nos.chdir({str(tmp_path)!r})\n{BLOCKS[name]}")
    assert done.returncode == 0, done.stderr
