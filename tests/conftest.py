"""What the tests share: the real kernel as a fixture, and children that a hang cannot outlive."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import hypothesis
import pytest

import userfault as uf
from support import PREAMBLE, Child

# No time limit on these noisy machines, and no folder of examples where the tree is read-only.
hypothesis.settings.register_profile("userfault", deadline=None, database=None)
hypothesis.settings.load_profile("userfault")


@pytest.fixture
def needs_uffd() -> None:
    """Skip where no userfaultfd can be opened; in CI that is a failure."""
    try:
        uf.Userfaultfd().close()
    except uf.UnavailableError as error:
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI must be able to open a userfaultfd: {error}")
        pytest.skip(str(error))


@pytest.fixture
def needs_privilege(needs_uffd: None) -> None:
    """Skip where only user-mode faults are delivered: system calls on missing pages fail with EFAULT."""
    if uf.probe().user_mode_only:
        if os.environ.get("CI") == "true":
            pytest.fail("CI must be able to open a userfaultfd with privilege")
        pytest.skip("needs /dev/userfaultfd, CAP_SYS_PTRACE or vm.unprivileged_userfaultfd=1")


@pytest.fixture
def child() -> Child:
    """Run Python code in a process of its own, killed after `timeout` seconds."""

    def run(code: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", PREAMBLE + textwrap.dedent(code)],
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run
