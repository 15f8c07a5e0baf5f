"""The page sources that need no function of anybody's: Constant and Pattern, byte by byte."""

from __future__ import annotations

import numpy as np
import pytest

import userfault as uf
from native.forms import PROTOTYPE, code_address, touch_all
from support import PAGE
from userfault.sources import Constant, Native, Pattern, Source


@pytest.mark.parametrize("value", [0, 1, 0xA5, 255])
def test_every_byte_of_a_constant(u: uf.Userfaultfd, service: uf.FaultService, value: int) -> None:
    region = u.map(16 * PAGE)
    service.serve(region, Constant(value))
    touch_all(region)
    assert (region.array == value).all()


@pytest.mark.parametrize("seed", [0, 7, -1, 2**70])
def test_every_byte_of_a_pattern(u: uf.Userfaultfd, service: uf.FaultService, seed: int) -> None:
    region = u.map(256 * PAGE)
    pattern = Pattern(seed)
    service.serve(region, pattern)
    touch_all(region)
    assert (region.array == pattern.expected(0, region.length)).all()


def test_a_pattern_tells_every_word_from_every_other() -> None:
    words = Pattern().expected(0, 1 << 20).view("<u8")
    assert len(np.unique(words)) == len(words)
    assert words.all()
    x = (80 + 4 * 0x9E3779B97F4A7C15) * 0xD6E8FEB86659FD93 % 2**64
    assert Pattern(3).expected(80, 8).tobytes() == (x ^ x >> 32).to_bytes(8, "little")
    # Any two pages, and any two seeds, differ in most bytes, not in a few.
    pages = Pattern().expected(0, 512 * PAGE).reshape(512, PAGE)
    assert (pages[1:] != pages[0]).mean(axis=1).min() > 0.7
    assert (Pattern(1).expected(0, PAGE) != pages[0]).mean() > 0.9


@pytest.mark.parametrize(("offset", "length"), [(0, 0), (0, 1), (3, 2), (5, 30), (8, 8), (4095, 4097)])
def test_a_part_of_a_pattern(offset: int, length: int) -> None:
    whole = Pattern(5).expected(0, 3 * PAGE)
    part = Pattern(5).expected(offset, length)
    assert part.dtype == np.uint8
    assert (part == whole[offset : offset + length]).all()
    assert len(part) == length


def test_what_the_plain_sources_refuse() -> None:
    for value in (-1, 256):
        with pytest.raises(uf.SourceError, match="0 to 255"):
            Constant(value)
    for make in (lambda: Constant("x"), lambda: Pattern(1.5)):  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            make()
    for once in (Constant(1), Pattern(1), Native(PROTOTYPE(code_address()))):
        with pytest.raises(uf.SourceError, match="once"):
            once.__init__(2)  # type: ignore[misc]


def test_a_half_made_source_serves_nothing(u: uf.Userfaultfd, service: uf.FaultService) -> None:
    region = u.map(PAGE)
    for kind in (Native, Constant, Pattern, Source):
        with pytest.raises(uf.SourceError, match="has 0 bytes"):
            service.serve(region, kind.__new__(kind))
