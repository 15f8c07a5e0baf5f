"""What /proc and /sys say about this machine and this process."""

from __future__ import annotations

import os
import re
from pathlib import Path


def text(path: str) -> str | None:
    """A file's text without the white space around it, or None when it cannot be read."""
    try:
        return Path(path).read_text(errors="replace").strip()
    except OSError:
        return None


def fields(path: str) -> dict[str, str]:
    """The `name: value` lines of /proc/meminfo or /proc/self/status; empty when it cannot be read."""
    lines = (line.partition(":") for line in (text(path) or "").splitlines())
    return {name: value.strip() for name, _, value in lines}


def memory() -> dict[str, int]:
    """/proc/meminfo's sizes in bytes."""
    return {
        name: int(value.removesuffix(" kB")) * 1024
        for name, value in fields("/proc/meminfo").items()
        if value.endswith(" kB")
    }


def kernel_version() -> tuple[int, int]:
    """Major and minor number of the running kernel."""
    match = re.match(r"(\d+)\.(\d+)", os.uname().release)
    return (int(match[1]), int(match[2])) if match else (0, 0)
