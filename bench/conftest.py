"""What the benchmarks need: their helpers on the path, and a userfaultfd."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

import userfault as uf

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def needs_uffd() -> None:
    """Skip where no userfaultfd opens; on CI, fail."""
    try:
        uf.Userfaultfd().close()
    except uf.UnavailableError as error:
        if os.environ.get("CI") == "true":
            pytest.fail(str(error))
        pytest.skip(str(error))


# Runs in a kernel of its own.
collect_ignore = ["lab"]
