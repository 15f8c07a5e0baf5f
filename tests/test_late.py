"""With threads that are late (native/delays.c): what is right only while nobody is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from children import PREAMBLE

pytestmark = pytest.mark.usefixtures("needs_privilege")

STALE = """
N = 256
data = np.random.default_rng(1).integers(1, 256, N * PAGE, np.uint8)
path = sys.argv[1]
data.tofile(path)
expected = int(data.sum())
for _ in range(800):
    # Each lies where the one before it lay.
    array = uf.lazy_array(uf.sources.File(path), data.shape)
    assert not array.resident.any()
    assert array.sum() == expected
    del array
print("good")
"""


def test_faults_of_memory_that_has_gone(tmp_path: Path) -> None:
    """A worker has brought a page, and the array is gone, when the reading thread comes to its fault: it was
    served in the next array, or a page of that was poisoned before it had a source."""
    library = tmp_path / "delays.so"
    source = Path(__file__).parent / "native/delays.c"
    command = ["cc", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o", library, source, "-ldl"]
    subprocess.run(command, check=True, timeout=300)
    done = subprocess.run(
        [sys.executable, "-c", PREAMBLE + STALE, tmp_path / "data"],
        env={**os.environ, "LD_PRELOAD": str(library), "DELAYS": "2"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "good\n", "")
