"""The RFC's user side against a model of its kernel side, and the model against the RFC's text."""

from __future__ import annotations

import errno
import os
import select
import struct
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import userfault as uf
from userfault.negotiation import Agreement, Features, negotiate
from userfault.rfc import RfcModel

V1, V2 = 0xAA, 0xAB
SIZE = {"v1": 8, "v2": 16}
FORMAT = {"v1": "<Q", "v2": "<QQ"}
IOCTLS = 0x8000000000000003  # REGISTER, UNREGISTER, API
PAGE = 0x7F0000003000


@pytest.fixture(autouse=True)
def said(record_property: Callable[[str, object], None]) -> None:
    record_property("backend", "model")


@pytest.fixture
def model() -> Iterator[RfcModel]:
    with RfcModel(fork=True) as made:
        yield made


@pytest.fixture(params=["v1", "v2"])
def api(request: pytest.FixtureRequest, model: RfcModel) -> str:
    """Each of the RFC's formats, agreed on with `model`."""
    model.api({"v1": V1, "v2": V2}[request.param], 0)
    return str(request.param)


def refusal(call: object, *args: object) -> int | None:
    """The errno of the OSError that the call raises."""
    with pytest.raises(OSError) as caught:  # noqa: PT011
        call(*args)  # type: ignore[operator]
    return caught.value.errno


# -- the model: UFFDIO_API -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fork", "version", "bits"), [(False, V1, 0x1), (True, V1, 0x1), (False, V2, 0x1001), (True, V2, 0x3001)]
)
def test_the_api_call_answers_the_rfcs_bits(fork: bool, version: int, bits: int) -> None:
    with RfcModel(fork) as model:
        assert model.api(version, 0) == (bits, IOCTLS)


def test_the_api_call_reads_the_first_8_bytes_only(model: RfcModel) -> None:
    asked = struct.pack("<QQQ", V2, 0xFFFFFFFFFFFFFFFF, 0xDEAD)
    assert model.api_struct(asked) == (0, struct.pack("<QQQ", V2, 0x3001, IOCTLS))


@pytest.mark.parametrize("unknown", [0, 0xA9, 0xAC, 0xAA00000000])
def test_an_unknown_api_gets_a_zeroed_struct_and_may_try_again(model: RfcModel, unknown: int) -> None:
    assert model.api_struct(struct.pack("<QQQ", unknown, 7, 7)) == (errno.EINVAL, bytes(24))
    assert refusal(model.api, unknown, 0) == errno.EINVAL
    assert model.poll() == select.POLLERR
    assert model.api(V2, 0) == (0x3001, IOCTLS)


@pytest.mark.parametrize("again", [V1, V2, 0xAC])
def test_a_second_api_call_changes_nothing(model: RfcModel, api: str, again: int) -> None:
    asked = struct.pack("<QQQ", again, 7, 7)
    assert model.api_struct(asked) == (errno.EINVAL, asked)
    model.fault(PAGE)
    assert len(model.read(64, nonblock=True)) == SIZE[api]


def test_before_the_api_call_there_is_nothing_to_read(model: RfcModel) -> None:
    assert model.poll() == select.POLLERR
    assert refusal(model.read, 64, True) == errno.EINVAL
    assert refusal(model.fault, PAGE) == errno.EINVAL
    assert refusal(model.fork) == errno.EINVAL


# -- the model: records ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("write", "wp", "arg"),
    [(False, False, PAGE), (True, False, PAGE | 1), (False, True, PAGE | 2), (True, True, PAGE | 3)],
)
def test_a_fault_is_its_page_with_the_bits_of_the_access(write: bool, wp: bool, arg: int) -> None:
    with RfcModel() as v1, RfcModel() as v2:
        v1.api(V1, 0)
        v2.api(V2, 0)
        for model in v1, v2:
            model.fault(PAGE + 0x123, write, wp)
        assert v1.read(64, nonblock=True) == struct.pack("<Q", arg)
        assert v2.read(64, nonblock=True) == struct.pack("<QQ", 0x1, arg)


def test_a_fork_record_brings_a_descriptor_that_runs_already(model: RfcModel) -> None:
    model.api(V2, 0)
    with model.fork() as child:
        assert model.read(64, nonblock=True) == struct.pack("<QQ", 0x2, child.fileno())
        assert child.poll() == 0
        assert refusal(child.api, V2, 0) == errno.EINVAL
        child.fault(PAGE)
        assert child.read(64, nonblock=True) == struct.pack("<QQ", 0x1, PAGE)
        with child.fork() as grandchild:
            assert child.read(64, nonblock=True) == struct.pack("<QQ", 0x2, grandchild.fileno())


@pytest.mark.parametrize(("patched", "version"), [(False, V1), (False, V2), (True, V1)])
def test_no_fork_record_on_v1_nor_without_patch_3(patched: bool, version: int) -> None:
    with RfcModel(patched) as model:
        model.api(version, 0)
        with pytest.raises(ValueError, match="no fork record"):
            model.fork()
        if version == V1:
            with pytest.raises(ValueError, match="no record of type 0x3"):
                model.put(3, 0)
        assert model.poll() == 0


# -- the model: read() and poll() ------------------------------------------------------------------


def test_read_fills_as_many_whole_records_as_fit(model: RfcModel, api: str) -> None:
    size = SIZE[api]
    for i in range(5):
        model.fault(PAGE + i * 0x1000)
    assert refusal(model.read, size - 1, True) == errno.EINVAL
    assert model.poll() == select.POLLIN
    first = model.read(3 * size - 1, nonblock=True)
    rest = model.read(1024, nonblock=False)  # blocks for the very first only
    assert [len(first), len(rest)] == [2 * size, 3 * size]
    args = [arg for (*_, arg) in struct.iter_unpack(FORMAT[api], first + rest)]
    assert args == [PAGE + i * 0x1000 for i in range(5)]
    assert model.poll() == 0
    assert refusal(model.read, 64, True) == errno.EAGAIN


def test_a_blocking_read_waits_for_the_first_record(model: RfcModel, api: str) -> None:
    later = threading.Timer(0.05, model.fault, [PAGE])
    later.start()
    assert struct.pack("<Q", PAGE) in model.read(1024, nonblock=False)
    later.join()


def test_a_bad_buffer_consumes_the_fault(model: RfcModel, api: str) -> None:
    for i in range(4):
        model.fault(PAGE + i * 0x1000)
    assert refusal(model.read, 64, True, 0) == {"v1": errno.EFAULT, "v2": errno.EINVAL}[api]
    # After at least one record the error is silent, and what was filled is returned.
    assert model.read(64, True, SIZE[api]) == struct.pack(FORMAT[api], *[1, PAGE + 0x1000][-SIZE[api] // 8 :])
    assert model.read(64, True) == struct.pack(FORMAT[api], *[1, PAGE + 0x3000][-SIZE[api] // 8 :])
    assert model.poll() == 0


# -- negotiate -------------------------------------------------------------------------------------


class Mainline:
    """UFFDIO_API of Linux 6.18, which succeeds once; with `v2`, patched to answer 0xAB with these bits."""

    def __init__(self, v2: int | None) -> None:
        self.answers = {V1: 0x1FFFF} if v2 is None else {V1: 0x1FFFF, V2: v2}

    def api(self, api: int, features: int) -> tuple[int, int]:
        if api not in self.answers or features & ~0x1FFFF:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        bits, self.answers = self.answers[api], {}
        return bits, IOCTLS


def on_rfc(api: str, features: Features = None, fork: bool = False) -> tuple[Agreement, int]:
    """What negotiate agrees on with an RFC kernel, and the bytes of a record from then on."""
    with RfcModel(fork) as model, RfcModel(fork) as throwaway:
        agreement = negotiate(model.api, throwaway.api, api, features)
        model.fault(PAGE)
        return agreement, len(model.read(64, nonblock=True))


def on_mainline(api: str, features: Features = None, v2: int | None = None) -> Agreement:
    return negotiate(Mainline(v2).api, Mainline(v2).api, api, features)


@pytest.mark.parametrize(
    ("asked", "fork", "speaks", "bits"),
    [("auto", False, "v2", 0x1001), ("v2", True, "v2", 0x3001), ("v1", True, "v1", 0x1)],
)
@pytest.mark.parametrize("features", [None, "all"])
def test_an_rfc_kernel(asked: str, fork: bool, speaks: str, bits: int, features: Features) -> None:
    agreement, size = on_rfc(asked, features, fork)
    assert (agreement.api, agreement.ioctls, size) == (speaks, IOCTLS, SIZE[speaks])
    assert agreement.features == agreement.available == bits
    assert isinstance(agreement.features, uf.RfcBit)
    assert agreement.refused == 0


@pytest.mark.parametrize(("asked", "features"), [("msg", None), ("msg", "all"), ("auto", uf.Feature.MOVE)])
def test_an_rfc_kernel_has_no_msg(asked: str, features: Features) -> None:
    with pytest.raises(uf.UnsupportedError, match=r"no msg.*this kernel has v1 and v2"):
        on_rfc(asked, features)


@pytest.mark.parametrize("asked", ["auto", "msg"])
def test_a_mainline_kernel(asked: str) -> None:
    default = uf.Feature.THREAD_ID | uf.Feature.MOVE | uf.Feature.POISON
    agreement = on_mainline(asked)
    assert (agreement.api, agreement.available, agreement.features) == ("msg", 0x1FFFF, default)
    every = on_mainline(asked, "all").features
    assert every == 0x1FFFF & ~(uf.Feature.SIGBUS | uf.Feature.WP_ASYNC)
    assert on_mainline(asked, uf.Feature.SIGBUS).features == uf.Feature.SIGBUS


@pytest.mark.parametrize("asked", ["v1", "v2"])
def test_a_mainline_kernel_has_neither_v1_nor_v2(asked: str) -> None:
    with pytest.raises(uf.UnsupportedError, match=rf"no {asked}.*this kernel has msg"):
        on_mainline(asked)


def test_an_rfc_kernel_that_keeps_0xaa_for_msg() -> None:
    assert [on_mainline(api, None, 0x3001).api for api in ("auto", "v2", "msg")] == ["v2", "v2", "msg"]
    assert on_mainline("auto", uf.Feature.MOVE, 0x3001).features == uf.Feature.MOVE
    with pytest.raises(uf.UnsupportedError, match=r"no v1.*this kernel has v2 and msg"):
        on_mainline("v1", None, 0x3001)


@pytest.mark.parametrize("asked", ["auto", "v2"])
def test_bits_without_a_name_are_kept(asked: str) -> None:
    agreement = on_mainline(asked, None, 0x7001)
    assert int(agreement.features) == int(agreement.available) == 0x7001


@pytest.mark.parametrize(
    ("asked", "features", "why"),
    [
        ("v3", None, "api must be auto, v1, v2 or msg"),
        ("V2", None, "api must be auto, v1, v2 or msg"),
        ("v1", uf.Feature.MOVE, "v1 has no features to ask for"),
        ("v2", uf.Feature.MOVE, "v2 has no features to ask for"),
    ],
)
def test_what_cannot_be_asked_for(asked: str, features: Features, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        on_rfc(asked, features)


@pytest.mark.parametrize("asked", ["auto", "v1", "v2"])
def test_an_error_other_than_einval_is_not_taken_for_a_refusal(asked: str) -> None:
    def broken(api: int, features: int) -> tuple[int, int]:
        raise OSError(errno.EFAULT, "")

    assert refusal(negotiate, broken, broken, asked, None) == errno.EFAULT


# -- EventReader over the model --------------------------------------------------------------------


def test_a_reader_takes_batches_and_the_part_that_is_left(model: RfcModel, api: str) -> None:
    reader = uf.EventReader(model.fileno(), capacity=4, api=api)
    for i in range(10):
        model.fault(PAGE + i * 0x1000, write=i % 2 == 1)
    batches = [reader.read().copy() for _ in range(3)]
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert {batch.dtype for batch in batches} == {{"v1": uf.V1_DTYPE, "v2": uf.V2_DTYPE}[api]}
    records = np.concatenate(batches)
    assert records["arg"].tolist() == [PAGE + i * 0x1000 + i % 2 for i in range(10)]
    if api == "v2":
        assert set(records["type"]) == {1}


@pytest.mark.parametrize("timeout", [0, 0.01])
def test_a_reader_with_nothing_pending(model: RfcModel, api: str, timeout: float) -> None:
    reader = uf.EventReader(model.fileno(), api=api)
    assert reader.read(timeout=timeout).shape == (0,)
    model.fault(PAGE)
    assert reader.read(timeout=timeout)["arg"].tolist() == [PAGE]


def test_a_reader_keeps_types_that_have_no_number_yet(model: RfcModel) -> None:
    model.api(V2, 0)
    put = [(3, 0xDEAD), (1, PAGE), (0xFFFFFFFFFFFFFFFF, 0), (0, 0xFFFFFFFFFFFFFFFF)]
    for record in put:
        model.put(*record)
    records = uf.EventReader(model.fileno(), api="v2").read()
    assert records.tolist() == put
    assert uf.as_v2(records).tolist() == put


def test_a_reader_can_follow_a_fork(model: RfcModel) -> None:
    model.api(V2, 0)
    with model.fork() as child:
        model.fault(PAGE)
        fork, fault = uf.EventReader(model.fileno(), api="v2").read()
        assert (fork["type"], fault["type"]) == (2, 1)
        child.fault(PAGE, write=True)
        of_child = uf.EventReader(int(fork["arg"]), api="v2").read()
        assert of_child.tolist() == [(1, PAGE | 1)]


pages = st.integers(0, 2**47 // uf.PAGE_SIZE - 1).map(lambda number: number * uf.PAGE_SIZE)


@given(st.lists(st.tuples(pages, st.booleans(), st.booleans())))
def test_the_same_faults_on_every_wire_are_the_same_v2_records(faults: list[tuple[int, bool, bool]]) -> None:
    msg = [(0x12, 0, 0, 0, write | wp << 1, page, 0) for page, write, wp in faults]
    wires = [np.array(msg, uf.MSG_DTYPE)]
    for version, dtype in (V1, uf.V1_DTYPE), (V2, uf.V2_DTYPE):
        with RfcModel() as model:
            model.api(version, 0)
            read = b""
            for fault in faults:
                model.fault(*fault)
                read += model.read(64, nonblock=True)
            wires.append(np.frombuffer(read, dtype))
    expected = [(1, page + write + 2 * wp) for page, write, wp in faults]
    assert [uf.as_v2(records).tolist() for records in wires] == [expected] * 3
