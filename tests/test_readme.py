"""The README's Python runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from support import Child

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


@pytest.mark.parametrize("block", BLOCKS, ids=["service", "fork", "monitor"])
def test_example(needs_uffd: None, child: Child, block: str) -> None:
    done = child(block)
    assert done.returncode == 0, done.stderr
