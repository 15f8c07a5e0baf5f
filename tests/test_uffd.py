"""Opening, negotiation and every ioctl, on the real kernel."""

from __future__ import annotations

import errno
import mmap
import os
import resource

import numpy as np
import pytest

import userfault as uf
from support import KERNEL, LAB, PAGE, Child, addresses, has, only, pending, touching
from userfault import opening

# -- opening and negotiation ---------------------------------------------------------------------------


def test_the_first_way_that_works_is_taken(u: uf.Userfaultfd) -> None:
    assert u.opened_by == next(way.name for way in uf.probe().ways if way.works)


@pytest.mark.parametrize("broken", [1, 2])
def test_a_way_that_fails_falls_through_to_the_next(
    needs_uffd: None, monkeypatch: pytest.MonkeyPatch, broken: int
) -> None:
    def refuse() -> int:
        raise PermissionError(errno.EACCES, "no")

    names = list(opening._WAYS)
    monkeypatch.setattr(opening, "_WAYS", {**opening._WAYS, **dict.fromkeys(names[:broken], refuse)})
    with uf.Userfaultfd() as u:
        assert u.opened_by in names[broken:]
    assert [way.works for way in uf.probe().ways[:broken]] == [False] * broken


def test_when_nothing_works_every_reason_and_remedy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(number: int) -> int:
        raise OSError(number, os.strerror(number))

    codes = {"device": errno.EACCES, "syscall": errno.EPERM, "user-mode-only": errno.EINVAL}
    ways = {name: lambda number=number: refuse(number) for name, number in codes.items()}
    monkeypatch.setattr(opening, "_WAYS", ways)
    with pytest.raises(uf.UnavailableError) as caught:
        uf.Userfaultfd()
    for text in ("EACCES", "setfacl", "EPERM", "vm.unprivileged_userfaultfd", "EINVAL", "Linux 5.11"):
        assert text in str(caught.value)
    capabilities = uf.probe()
    assert capabilities.apis == ()
    assert capabilities.features is None


def test_out_of_descriptors_names_the_limit(needs_uffd: None) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(OSError, match="RLIMIT_NOFILE"):
            uf.Userfaultfd()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_auto_takes_v2_where_it_is_spoken(needs_uffd: None) -> None:
    with uf.Userfaultfd() as u:
        assert u.api == ("v2" if uf.Api.V2 in KERNEL.apis else "msg")
        assert not LAB or u.api == "v2"


def test_what_was_agreed_on(u: uf.Userfaultfd, wire: str) -> None:
    assert u.api == wire
    assert uf.Ioctl.REGISTER in u.ioctls


@only("v1", "v2")
def test_the_rfcs_bits(u: uf.Userfaultfd, wire: str) -> None:
    assert isinstance(u.features, uf.RfcBit)
    assert u.features == u.agreement.available == {"v1": 0x1, "v2": 0x3001}[wire]
    assert uf.probe().rfc_bits == 0x3001
    with pytest.raises(ValueError, match="no features to ask for"):
        uf.Userfaultfd(wire, uf.Feature.MOVE)


@only("v2")
def test_auto_does_without_the_privilege_that_v2_needs(wire: str, child: Child) -> None:
    done = child("""
        os.setuid(65534)
        assert uf.Userfaultfd().api in ("v1", "msg")
        assert "v2" not in uf.probe().apis
        try:
            uf.Userfaultfd("v2")
        except uf.UffdError as error:
            print(error)
        """)
    assert "CAP_SYS_PTRACE" in done.stdout, done.stderr


@only("msg")
def test_features(wire: str) -> None:
    msg = KERNEL.features
    assert msg is not None
    default = uf.Feature.THREAD_ID | uf.Feature.MOVE | uf.Feature.POISON
    with uf.Userfaultfd(api="msg") as u:
        assert u.features == default & msg
        assert u.agreement.refused == default & ~msg
    with uf.Userfaultfd(api="msg", features="all") as u:
        assert not uf.Feature(u.features) & (uf.Feature.SIGBUS | uf.Feature.WP_ASYNC)
        assert uf.Feature.EVENT_REMAP in uf.Feature(u.features)
    with uf.Userfaultfd(api="msg", features=uf.Feature(0)) as u:
        assert u.features == 0


@only("msg")
def test_a_feature_that_the_kernel_lacks(wire: str) -> None:
    with pytest.raises(uf.UnsupportedError, match=r"no 0x4000000000000000; this kernel has .*THREAD_ID"):
        uf.Userfaultfd(api="msg", features=uf.Feature(1 << 62))


def test_an_api_that_the_kernel_lacks(needs_uffd: None) -> None:
    for api in uf.Api:
        if api not in uf.probe().apis:
            with pytest.raises(uf.UnsupportedError, match="this kernel has"):
                uf.Userfaultfd(api=api)
    with pytest.raises(ValueError, match="auto, v1, v2 or msg"):
        uf.Userfaultfd(api="v4")


# -- ioctls --------------------------------------------------------------------------------------------


def test_copy_fills_and_wakes(u: uf.Userfaultfd) -> None:
    region = u.map(4 * PAGE)
    data = np.random.default_rng(1).integers(0, 256, 4 * PAGE, dtype=np.uint8)
    thread = touching(region, [3])
    uf.EventReader(u).read(30)
    assert u.copy(region.start, data) == 4 * PAGE
    thread.join(30)
    assert (region.array == data).all()


def test_dontwake_leaves_the_faulter_asleep(u: uf.Userfaultfd) -> None:
    region = u.map(2 * PAGE)
    data = bytes(PAGE)
    fills = (lambda page: u.copy(page, data, wake=False), lambda page: u.zeropage(page, PAGE, wake=False))
    for index, fill in enumerate(fills):
        page = region.start + index * PAGE
        thread = touching(region, [index])
        uf.EventReader(u).read(30)
        assert fill(page) == PAGE
        thread.join(0.1)
        assert thread.is_alive()
        u.wake(page, PAGE)
        thread.join(30)
        assert not thread.is_alive()


def test_progress_is_exact_when_a_page_exists(u: uf.Userfaultfd) -> None:
    region = u.map(8 * PAGE)
    u.zeropage(region.start + 3 * PAGE, PAGE)
    with pytest.raises(uf.PageExistsError, match="wake") as caught:
        u.copy(region.start + 3 * PAGE, bytes(PAGE))
    assert caught.value.done == 0
    with pytest.raises(uf.UffdError) as caught:
        u.copy(region.start, bytes(8 * PAGE))
    assert caught.value.done == 3 * PAGE
    with pytest.raises(uf.UffdError) as caught:
        u.zeropage(region.start, 8 * PAGE)
    assert caught.value.done == 0
    assert caught.value.errno == errno.EEXIST


def test_wake_makes_an_unresolved_fault_come_again(u: uf.Userfaultfd) -> None:
    region = u.map(PAGE)
    thread = touching(region, [0])
    reader = uf.EventReader(u)
    reader.read(30)
    assert len(reader.read(0)) == 0
    u.wake(region.start, PAGE)
    assert addresses(reader.read(30)) == [region.start]
    u.zeropage(region.start, PAGE)
    thread.join(30)


def test_unregistered_ranges(u: uf.Userfaultfd) -> None:
    region = u.map(2 * PAGE)
    region.unregister()
    assert region.array[0] == 0
    for call in (
        lambda: u.copy(region.start + PAGE, bytes(PAGE)),
        lambda: u.zeropage(region.start + PAGE, PAGE),
    ):
        with pytest.raises(uf.NotRegisteredError, match="not registered"):
            call()


def test_writeprotect(u: uf.Userfaultfd) -> None:
    mode = uf.RegisterMode.MISSING | uf.RegisterMode.WP
    region = u.map(PAGE, mode)
    assert region.mode == mode
    u.copy(region.start, bytes(PAGE), write_protect=True)
    assert region.array[0] == 0
    u.writeprotect(region.start, PAGE, protect=False)
    region.array[0] = 9
    assert region.array[0] == 9
    with pytest.raises(uf.RangeError):
        u.writeprotect(region.start + 1, PAGE)


def refused_for_want_of_it(call: object, *arguments: object) -> None:
    """An ioctl that this kernel does not know."""
    with pytest.raises(uf.UffdError) as caught:
        call(*arguments)  # type: ignore[operator]
    assert (caught.value.errno, caught.value.done) == (errno.EINVAL, 0)


def test_move(u: uf.Userfaultfd) -> None:
    region = u.map(4 * PAGE)
    view = np.frombuffer(mmap.mmap(-1, 4 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)
    view[:] = np.arange(4 * PAGE) % 251
    expected = view.copy()
    assert (uf.Ioctl.MOVE in region.ioctls) == has(uf.Feature.MOVE)
    if uf.Ioctl.MOVE not in region.ioctls:
        refused_for_want_of_it(u.move, region.start, view.ctypes.data, 4 * PAGE)
        return
    assert u.move(region.start, view.ctypes.data, 4 * PAGE) == 4 * PAGE
    assert (region.array == expected).all()
    assert not view.any()  # the pages have left
    with pytest.raises(uf.RangeError):
        u.move(region.start, view.ctypes.data + 1, PAGE)


def test_poison(needs_privilege: None, u: uf.Userfaultfd) -> None:
    region = u.map(PAGE)
    assert (uf.Ioctl.POISON in region.ioctls) == has(uf.Feature.POISON)
    if uf.Ioctl.POISON not in region.ioctls:
        refused_for_want_of_it(u.poison, region.start, PAGE)
        return
    assert u.poison(region.start, PAGE) == PAGE
    read, write = os.pipe()
    with pytest.raises(OSError, match="Bad address"):
        os.write(write, region.array)
    os.close(read)
    os.close(write)


def test_continue_needs_a_minor_region(u: uf.Userfaultfd) -> None:
    region = u.map(PAGE)
    with pytest.raises(uf.UffdError) as caught:
        u.continue_(region.start, PAGE)
    assert caught.value.done == 0


def test_misaligned_ranges_are_refused_by_every_ioctl(u: uf.Userfaultfd) -> None:
    region = u.map(2 * PAGE)
    for start, length in ((region.start + 8, PAGE), (region.start, PAGE - 1), (region.start, 0)):
        for call in (u.zeropage, u.wake, u.continue_, u.poison, u.writeprotect):
            with pytest.raises(uf.RangeError):
                call(start, length)
        with pytest.raises(uf.RangeError):
            u.copy(start, bytes(length))
    assert pending(u) == 0
