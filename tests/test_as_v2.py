"""Records of every wire as RFC v2 records."""

from __future__ import annotations

import numpy as np
import pytest

import userfault as uf

PAGE = 0x7F0000003000


def msg(event: int, flags: int = 0, address: int = 0, ptid: int = 0) -> tuple[int, ...]:
    return event, 0, 0, 0, flags, address, ptid


def test_v2_records_as_v2_are_a_copy() -> None:
    v2 = np.array([(1, PAGE), (2, 7), (9, 9)], uf.V2_DTYPE)
    same = uf.as_v2(v2)
    assert same.tolist() == v2.tolist()
    assert not np.shares_memory(same, v2)


def test_msg_records_as_v2() -> None:
    # Flags 1 and 2 are WRITE and WP; an exact address loses its offset; a fork's descriptor is 32 bits.
    made = np.array(
        [
            msg(0x12, 0, PAGE, 1234),
            msg(0x12, 1, PAGE + 0x123),
            msg(0x12, 2, PAGE + 0xFFF),
            msg(0x12, 3, PAGE),
            msg(0x13, 0xFFFFFFFF00000007),
        ],
        uf.MSG_DTYPE,
    )
    assert uf.as_v2(made).tolist() == [(1, PAGE), (1, PAGE | 1), (1, PAGE | 2), (1, PAGE | 3), (2, 7)]


@pytest.mark.parametrize("step", [2, -1, -3])
@pytest.mark.parametrize("dtype", [uf.V1_DTYPE, uf.V2_DTYPE, uf.MSG_DTYPE])
def test_views_of_any_stride_as_v2(dtype: np.dtype[np.void], step: int) -> None:
    made = np.zeros(10, dtype)
    made["address" if dtype == uf.MSG_DTYPE else "arg"] = np.arange(10) * 0x1000
    if dtype != uf.V1_DTYPE:
        made[dtype.names[0]] = 0x12 if dtype == uf.MSG_DTYPE else 1  # type: ignore[index]
    made.flags.writeable = False
    assert uf.as_v2(made[::step])["arg"].tolist() == [i * 0x1000 for i in range(10)[::step]]
    assert uf.as_v2(made[:0]).shape == (0,)


@pytest.mark.parametrize(
    ("unsayable", "name"),
    [
        (msg(0x14), "a remap event (0x14)"),
        (msg(0x15), "a remove event (0x15)"),
        (msg(0x16), "an unmap event (0x16)"),
        (msg(0x12, 4, PAGE), "a page fault with flags 0x4 (a minor fault)"),
        (msg(0x12, 0x10, PAGE), "a page fault with flags 0x10"),
        (msg(0x17), "an unknown event (0x17)"),
        (msg(0), "an unknown event (0x0)"),
    ],
)
def test_records_that_v2_has_no_number_for(unsayable: tuple[int, ...], name: str) -> None:
    made = np.array([msg(0x12, 0, PAGE), unsayable], uf.MSG_DTYPE)
    with pytest.raises(uf.RecordError) as caught:
        uf.as_v2(made)
    assert str(caught.value).startswith(f"record 1: {name}, for which RFC v2 has no number")


@pytest.mark.parametrize(
    "wrong", [None, [PAGE], np.zeros(2, np.uint64), np.zeros((2, 2), uf.V2_DTYPE), np.zeros((), uf.V1_DTYPE)]
)
def test_arrays_that_are_no_records(wrong: object) -> None:
    with pytest.raises(uf.RecordError, match="need a 1-D array"):
        uf.as_v2(wrong)  # type: ignore[arg-type]
