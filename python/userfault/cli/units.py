"""Byte counts as people write and read them."""

from __future__ import annotations

import re

import click

from userfault import PAGE_SIZE

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def size(context: click.Context, option: click.Parameter, text: str | None) -> int | None:
    """An option's callback: bytes, as in 4096, 64K, 256M or 1G, rounded up to whole pages."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)([KMG]?)", text.strip().upper(), re.ASCII)
    if match is None:
        raise click.BadParameter(f"{text!r} is not a size: write 4096, 64K, 256M or 1G", context, option)
    wanted = int(match[1]) * _UNITS[match[2]]
    if wanted == 0:
        raise click.BadParameter(f"at least one page ({PAGE_SIZE} bytes) must be served", context, option)
    return whole_pages(wanted)


def whole_pages(size: int) -> int:
    """`size` rounded up to whole pages."""
    return -(-size // PAGE_SIZE) * PAGE_SIZE


def human(size: float) -> str:
    """`size` bytes with a binary unit and at most one decimal."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:,.1f}".removesuffix(".0") + f" {unit}"
