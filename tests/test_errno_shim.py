"""Every row of the errno table under a running engine, on the real kernel, with ioctls that fail as told.

tests/native/shim.c is preloaded; the answers that it gives are those that a kernel was seen to give.
"""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent

import pytest

from children import Nursery
from support import LAB, only
from test_errno import ROWS
from test_errno_kernel import CALLS, RECORDED, UNWRITTEN, Answer, in_a_child

# What a child's code finds, beside the tools.
SET_UP = """
SHIM, LEAVE, FOREVER, ALL = ctypes.CDLL(None), -(2**63), 2**62, 2**63 - 1
SHIM.shim_fail.argtypes = ctypes.c_ulong, ctypes.c_int, ctypes.c_int64, *[ctypes.c_uint64] * 4
SHIM.shim_hold.argtypes = ctypes.c_ulong, ctypes.c_uint64, ctypes.c_uint64
SHIM.shim_calls.argtypes = (ctypes.c_ulong,)
SHIM.shim_calls.restype = SHIM.shim_hits.restype = ctypes.c_uint64
CHANGING = RECORDED["COPY", "an event is pending"]

def fail(call, answer, times=FOREVER, start=0, end=ALL):
    "The next `times` calls in [start, end) get the answer. Returns what tells how many did."
    field = LEAVE if answer.field is None else answer.field
    rule = SHIM.shim_fail(REQUESTS[call], answer.number, field, 0, times, start, end)
    assert rule >= 0
    return lambda: SHIM.shim_hits(rule)

def hold(call):
    "The next call waits until `release`."
    assert SHIM.shim_hold(REQUESTS[call], 0, ALL) >= 0

held, release, stop = SHIM.shim_held, SHIM.shim_release, SHIM.shim_stop

def calls(call):
    return SHIM.shim_calls(REQUESTS[call])

def until(what):
    ends = time.monotonic() + 30
    while not what():
        assert time.monotonic() < ends
        time.sleep(0.001)

class Toucher(threading.Thread):
    "Reads a page in a system call: its bytes, or the errno where it failed closed."
    def __init__(self, region, page):
        super().__init__(daemon=True)
        self.page, self.got = region.array[page * PAGE:(page + 1) * PAGE], None
        self.start()
    def run(self):
        read, write = os.pipe()
        try:
            os.write(write, self.page)
            self.got = os.read(read, PAGE)
        except OSError as error:
            self.got = error.errno
        os.close(read)
        os.close(write)
    def result(self):
        self.join(10)
        assert not self.is_alive(), "it sleeps on"
        return self.got

def touch(region, page):
    return Toucher(region, page).result()

def page_of(data, page):
    return data[page * PAGE:(page + 1) * PAGE].tobytes()

def noise(n_pages):
    return np.random.default_rng(n_pages).integers(1, 256, n_pages * PAGE, dtype=np.uint8)

def served(source, n_pages=8, **options):
    region = u.map(n_pages * PAGE)
    service.serve(region, source, readahead=0, **options)
    return region

def settled(**expected):
    "The counters, once they are so: a thread is awake a moment before it is counted."
    ends = time.monotonic() + 10
    while True:
        stats = service.stats()
        seen = {name: int(stats[name]) for name in expected}
        if seen == expected or time.monotonic() > ends:
            break
        time.sleep(0.001)
    assert seen == expected, (seen, expected)
    return stats

def errors(stats):
    return {int(number): int(stats["errors"][number]) for number in np.flatnonzero(stats["errors"])}

def none(stats, *names):
    assert not any(stats[name] for name in names), stats
    assert "failed" not in names or not service.failures()

def at_most(tries, pages, counted=None):
    "A try a millisecond for each page, with room to spare, and some are made; or so much of what is counted."
    counted = counted or tries
    begun, before, counts = time.monotonic(), tries(), counted()
    time.sleep(0.3)
    made, counts, ms = tries() - before, counted() - counts, (time.monotonic() - begun) * 1000
    assert made >= 10 and counts <= 2 * pages * (ms + 20), (made, counts, ms)

u = uf.Userfaultfd(WIRE)
service = uf.FaultService(u)
data = noise(64)
SOURCES = {"COPY": uf.sources.Buffer(data), "ZEROPAGE": uf.sources.Zero()}
BYTES = {"COPY": data, "ZEROPAGE": np.zeros_like(data)}
"""

Shimmed = Callable[..., None]


@pytest.fixture(scope="session")
def preloaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    """Children whose ioctl(2) is the shim's."""
    library = tmp_path_factory.mktemp("native") / "shim.so"
    source = Path(__file__).parent / "native/shim.c"
    compiler = os.environ.get("CC", "cc").split()
    flags = ["-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-pthread"]
    subprocess.run([*compiler, *flags, "-o", library, source], check=True, timeout=300)
    with pytest.MonkeyPatch.context() as patch:
        # Behind a sanitizer, which must come first.
        patch.setenv("LD_PRELOAD", f"{os.environ.get('LD_PRELOAD', '')} {library}".strip())
        opened = Nursery()
    with opened:
        yield opened


@pytest.fixture
def shimmed(needs_privilege: None, wire: str, preloaded: Nursery) -> Shimmed:
    """Run Python code in such a child, with a userfaultfd and a service open."""

    def run(code: str, **given: object) -> None:
        in_a_child(lambda text: preloaded.run(text, wire), SET_UP + dedent(code), **given)

    return run


# -- what the shim says, a kernel has said -------------------------------------------------------------

# No kernel of today answers an ioctl on a userfaultfd so, or not in a process that lives on.
UNSEEN = {
    errno.ENOSPC: "Linux 4.11 to 4.13, in place of ESRCH",
    errno.EINTR: "only with a fatal signal pending",
    errno.EMFILE: "userfaultfd(2) itself does; see test_out_of_descriptors",
    errno.ENFILE: "as EMFILE, of the whole system",
    errno.EIO: "no row: what nobody expects",
}


def answers(call: str, decision: str) -> list[Answer]:
    """One for each errno of the decision: as this call was seen to give it, or else another."""
    seen = sorted(RECORDED.items(), key=lambda item: (item[0][0] != call, (item[1].field or 0) > 0))
    found = []
    for number, (decided, *_) in ROWS.items():
        if decided == decision:
            found += [answer for _, answer in seen if answer.number == number][:1] or [
                Answer(number, -number)
            ]
    return found[:1] if LAB else found


def cases(decision: str, *calls: str) -> list[object]:
    """Of the calls, those that there are, with each answer."""
    return [
        pytest.param(call, answer, id=f"{call}-{errno.errorcode[answer.number]}")
        for call in calls
        if call in CALLS
        for answer in answers(call, decision)
    ]


def test_every_row_was_seen_or_is_explained() -> None:
    assert set(ROWS) == {answer.number for answer in RECORDED.values()} | set(UNSEEN)


def test_the_shim_answers_as_the_kernel(shimmed: Shimmed) -> None:
    shimmed(
        """
        service.close()
        source = anonymous(WHOLE)
        for call, why in RECORDED:
            answer = RECORDED[call, why]
            if call not in known or why in ("misaligned", "a pipe", "closed"):
                continue
            source[:] = 7
            region = u.map(WHOLE)
            hits = fail(call, answer, times=1)
            assert ask(u.fileno(), call, region.start, WHOLE, source.ctypes.data) == answer, (call, why)
            assert hits() == 1
            if (answer.field or 0) > 0 and call != "POISON":
                # So much was done, and no more.
                assert uf.procmaps.first_present(region.start, PART) == region.start
                assert uf.procmaps.first_present(region.start + PART, WHOLE - PART) is None
        """,
        known=[call for call in CALLS if call not in ("API", "REGISTER", "WAKE")],
    )


# -- one fault -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "answer"),
    [
        *cases("PARK", "COPY", "ZEROPAGE"),
        pytest.param("COPY", UNWRITTEN, id="COPY-EAGAIN-unwritten"),
        pytest.param("ZEROPAGE", UNWRITTEN, id="ZEROPAGE-EAGAIN-unwritten"),
    ],
)
def test_what_cannot_be_done_now_is_done_later(shimmed: Shimmed, call: str, answer: Answer) -> None:
    shimmed(
        """
        hits = fail(call, answer, times=5)
        region = served(SOURCES[call])
        assert touch(region, 3) == page_of(BYTES[call], 3)
        stats = settled(pages=1, parked=5)
        assert hits() == 5
        assert errors(stats) == {answer.number: 5}
        none(stats, "failed", "forgotten", "existing")
        """,
        call=call,
        answer=answer,
    )


@pytest.mark.parametrize("call", ["COPY", "ZEROPAGE"])
def test_a_part_that_was_done_is_not_done_again(shimmed: Shimmed, call: str) -> None:
    """And then the rest waits."""
    shimmed(
        """
        hits = fail(call, RECORDED[call, "the fourth page is there"], times=1)
        later = fail(call, RECORDED[call, "an event is pending"], times=2)
        region = served(SOURCES[call], page_bytes=WHOLE)
        touchers = [Toucher(region, page) for page in (0, 7)]
        assert [toucher.result() for toucher in touchers] == [page_of(BYTES[call], page) for page in (0, 7)]
        stats = settled(pages=8)
        assert hits() + later() == 3
        assert errors(stats) == {EAGAIN: 3}
        none(stats, "failed", "forgotten", "existing")
        assert (region.array == BYTES[call][:WHOLE]).all()
        """,
        call=call,
    )


@pytest.mark.parametrize(("call", "answer"), cases("NEXT", "COPY", "ZEROPAGE"))
def test_a_page_that_is_said_to_be_there(shimmed: Shimmed, call: str, answer: Answer) -> None:
    """Its thread is woken, finds that it is not, and asks again."""
    shimmed(
        """
        hits = fail(call, answer, times=2)
        region = served(SOURCES[call])
        assert touch(region, 3) == page_of(BYTES[call], 3)
        stats = settled(pages=1, existing=2)
        assert hits() == 2
        assert errors(stats) == {answer.number: 2}
        none(stats, "failed", "forgotten", "parked")
        """,
        call=call,
        answer=answer,
    )


def test_a_page_that_somebody_else_brings_just_now(shimmed: Shimmed) -> None:
    """The kernel's own EEXIST; the page's thread sleeps until the engine wakes it."""
    shimmed("""
        hold("COPY")
        region = served(SOURCES["COPY"])
        toucher = Toucher(region, 3)
        until(held)
        u.copy(region.start + 3 * PAGE, bytes([9]) * PAGE, wake=False)
        toucher.join(0.1)
        assert toucher.is_alive()
        release()
        assert toucher.result() == bytes([9]) * PAGE
        stats = settled(existing=1)
        assert errors(stats) == {EEXIST: 1}
        none(stats, "pages", "failed", "forgotten", "parked")
        assert service.resident(region).tolist() == [page == 3 for page in range(8)]
        """)


@pytest.mark.parametrize(("call", "answer"), cases("FORGET", "COPY", "ZEROPAGE"))
def test_a_run_that_seems_to_lie_in_two_mappings(shimmed: Shimmed, call: str, answer: Answer) -> None:
    """Page by page it works."""
    shimmed(
        """
        hits = fail(call, answer, times=1)
        region = served(SOURCES[call], page_bytes=WHOLE)
        assert touch(region, 3) == page_of(BYTES[call], 3)
        stats = settled(pages=8)
        assert hits() == 1
        assert errors(stats) == {answer.number: 1}
        none(stats, "failed", "forgotten", "parked")
        assert (region.array == BYTES[call][:WHOLE]).all()
        """,
        call=call,
        answer=answer,
    )


@pytest.mark.parametrize(
    ("call", "answer"), [*cases("FORGET", "COPY", "ZEROPAGE"), *cases("STOP", "COPY", "ZEROPAGE")]
)
def test_what_is_no_longer_ours_is_forgotten(shimmed: Shimmed, call: str, answer: Answer) -> None:
    """Not failed: should the page be touched again, it comes."""
    shimmed(
        """
        hits = fail(call, answer, times=1)
        region = served(SOURCES[call])
        toucher = Toucher(region, 3)
        assert errors(settled(forgotten=1)) == {answer.number: 1}
        assert hits() == 1
        u.wake(region.start, WHOLE)
        assert toucher.result() == page_of(BYTES[call], 3)
        none(settled(pages=1, forgotten=1), "failed", "existing", "parked")
        """,
        call=call,
        answer=answer,
    )


@pytest.mark.parametrize("how", ["munmap", "mremap", "unregister"])
def test_whoever_waits_for_a_page_that_goes_is_released(shimmed: Shimmed, how: str) -> None:
    """By the kernel where it is unregistered; munmap and mremap wake nobody."""
    shimmed(
        """
        hold("COPY")
        region = served(SOURCES["COPY"])
        toucher = Toucher(region, 3)
        until(held)
        page, size = ctypes.c_void_p(region.start + 3 * PAGE), ctypes.c_size_t(PAGE)
        if how == "munmap":
            LIBC.munmap(page, size)
        elif how == "mremap":
            elsewhere = anonymous(PAGE)
            LIBC.mremap(page, size, size, 1 | 2, ctypes.c_void_p(elsewhere.ctypes.data))  # MAYMOVE, FIXED
        else:
            _ioctl.unregister(u.fileno(), page.value, PAGE)
        release()
        assert toucher.result() == (bytes(PAGE) if how == "unregister" else EFAULT)
        assert errors(settled(forgotten=1)) == {ENOENT: 1}
        """,
        how=how,
    )


@pytest.mark.parametrize(("call", "answer"), cases("POISON", "COPY", "ZEROPAGE"))
def test_what_can_never_be_done_fails_closed(shimmed: Shimmed, call: str, answer: Answer) -> None:
    """The page that is waited for; those about it come."""
    shimmed(
        """
        before = fail(call, RECORDED[call, "the fourth page is there"], times=1)
        region = served(SOURCES[call], page_bytes=WHOLE)
        page = region.start + 3 * PAGE
        hits = fail(call, answer, start=page, end=page + PAGE)
        assert touch(region, 3) == EFAULT
        stats = settled(failed=1, pages=7)
        assert before() == hits() == 1
        assert errors(stats) == {EAGAIN: 1, answer.number: 1}
        none(stats, "forgotten", "parked", "existing")
        failure, = service.failures()
        assert failure[:4] == (page, region.id, 3 * PAGE, answer.number)
        assert failure.why == "the kernel refused it: " + os.strerror(answer.number)
        assert touch(region, 3) == EFAULT  # and so it stays
        for page in (0, 1, 2, 4, 5, 6, 7):
            assert touch(region, page) == page_of(BYTES[call], page)
        settled(failed=1, pages=7)
        """,
        call=call,
        answer=answer,
    )


def test_an_errno_that_there_is_not_fails_closed(shimmed: Shimmed) -> None:
    """It is counted as number 0."""
    shimmed("""
        fail("COPY", Answer(524, None), times=1)
        region = served(SOURCES["COPY"])
        assert touch(region, 3) == EFAULT
        assert settled(failed=1)["errors"][0] == 1
        assert service.failures()[0].errno == 524
        """)


@pytest.mark.parametrize("call", ["COPY", "ZEROPAGE"])
def test_an_interrupted_call_is_made_again_at_once(shimmed: Shimmed, call: str) -> None:
    shimmed(
        """
        hits = fail(call, Answer(EINTR, -EINTR), times=100)
        region = served(SOURCES[call])
        assert touch(region, 3) == page_of(BYTES[call], 3)
        stats = settled(pages=1)
        assert hits() == 100 and calls(call) == 101
        assert not errors(stats)
        none(stats, "parked", "failed", "forgotten", "existing")
        """,
        call=call,
    )


def test_what_nobody_waits_for_does_not_fail(shimmed: Shimmed) -> None:
    """A page of a fault's unit that cannot be had now is had when it is touched."""
    shimmed("""
        fail("COPY", RECORDED["COPY", "the fourth page is there"], times=1)
        hits = fail("COPY", RECORDED["COPY", "source unreadable"], times=1)
        region = served(SOURCES["COPY"], page_bytes=WHOLE)
        assert touch(region, 0) == page_of(data, 0)
        stats = settled(pages=7)
        assert hits() == 1
        none(stats, "failed", "forgotten", "parked")
        assert service.resident(region).tolist() == [page != 3 for page in range(8)]
        assert touch(region, 3) == page_of(data, 3)
        assert (region.array == data[:WHOLE]).all()
        """)


# -- poison that is refused ----------------------------------------------------------------------------

LOST = """
region = served(SOURCES["COPY"])
page = region.start + 3 * PAGE
fail("COPY", RECORDED["COPY", "source unreadable"], start=page, end=page + PAGE)
"""

if "POISON" in CALLS:

    @only("msg")
    @pytest.mark.parametrize(("call", "answer"), [*cases("PARK", "POISON"), ("POISON", UNWRITTEN)])
    def test_what_cannot_be_poisoned_now_is_poisoned_later(
        shimmed: Shimmed, call: str, answer: Answer
    ) -> None:
        shimmed(
            LOST
            + """
hits = fail("POISON", answer, times=3)
assert touch(region, 3) == EFAULT
stats = settled(failed=1, parked=3)
assert hits() == 3 and calls("POISON") == 4
assert errors(stats) == {EFAULT: 4, answer.number: 3}
assert [failure.offset for failure in service.failures()] == [3 * PAGE]
""",
            answer=answer,
        )

    @only("msg")
    @pytest.mark.parametrize(("call", "answer"), cases("POISON", "POISON"))
    def test_what_cannot_be_poisoned_is_protected(shimmed: Shimmed, call: str, answer: Answer) -> None:
        shimmed(
            LOST
            + """
hits = fail("POISON", answer)
assert touch(region, 3) == EFAULT
settled(failed=1)
assert hits() == 1
vmas = uf.procmaps.vmas(region.start, region.start + WHOLE)
protected = [(vma.start, vma.end) for vma in vmas if vma.permissions == "---p"]
assert protected == [(page, page + PAGE)]
assert [failure.errno for failure in service.failures()] == [EFAULT]
""",
            answer=answer,
        )

    @only("msg")
    @pytest.mark.parametrize(
        ("call", "answer"), [*cases("FORGET", "POISON"), *cases("STOP", "POISON"), *cases("NEXT", "POISON")]
    )
    def test_what_cannot_be_poisoned_for_another_reason(shimmed: Shimmed, call: str, answer: Answer) -> None:
        """The thread asks again, at the latest when it is woken, and then the page fails closed."""
        shimmed(
            LOST
            + """
hits = fail("POISON", answer, times=1)
toucher = Toucher(region, 3)
settled(**{counter: 1})
u.wake(region.start, WHOLE)
assert toucher.result() == EFAULT
stats = settled(failed=1, **{counter: 1})
assert hits() == 1
assert errors(stats) == {EFAULT: 2, answer.number: 1}
""",
            answer=answer,
            counter="existing" if answer.number == errno.EEXIST else "forgotten",
        )

    @only("msg")
    def test_a_poison_that_never_takes_does_not_spin(shimmed: Shimmed) -> None:
        shimmed(
            LOST
            + """
hits = fail("POISON", CHANGING)
toucher = Toucher(region, 3)
until(lambda: hits() > 4)
at_most(hits, 1)
stop()
# Which can be had again; but the poison may just have been about to be tried.
got = toucher.result()
stats = settled(failed=int(got == EFAULT))
assert got == EFAULT or (got == page_of(data, 3) and stats["pages"] == 1)
"""
        )


# -- moves that are refused ----------------------------------------------------------------------------

MOVES = {
    "EINVAL": RECORDED["MOVE", "source locked"],
    "EBUSY": RECORDED["MOVE", "source shared by a fork"],
    "EAGAIN in part": RECORDED["MOVE", "the fourth page is there"],
    "EAGAIN": RECORDED["MOVE", "an event is pending"],
    "EAGAIN unwritten": UNWRITTEN,
    "EEXIST": RECORDED["MOVE", "the first page is there"],
    "ENOENT": RECORDED["MOVE", "nothing at the source"],
    "ENOMEM": RECORDED["COPY", "no memory"],
    "ESRCH": RECORDED["COPY", "the process has exited"],
}

if "MOVE" in CALLS:

    @only("msg")
    @pytest.mark.parametrize("answer", MOVES.values(), ids=MOVES)
    @pytest.mark.parametrize("then", [0, 3], ids=["copied at once", "copied later"])
    def test_what_cannot_be_moved_is_copied(shimmed: Shimmed, answer: Answer, then: int) -> None:
        """Of memory of which nothing can be moved (EINVAL, EBUSY) no more is tried."""
        shimmed(
            """
            units, size = 16, 512
            data = noise(units * size)
            region = served(uf.sources.Buffer(data), units * size, page_bytes=size * PAGE)
            never = answer.number in (EINVAL, EBUSY)
            hits, copies = fail("MOVE", answer, times=1), fail("COPY", CHANGING, times=then)
            units = iter(range(units))

            def bring_until(what):
                "Moving takes huge pages, which are not always to be had."
                for unit in units:
                    assert touch(region, unit * size + 17) == page_of(data, unit * size + 17)
                    stats = settled(pages=(unit + 1) * size)
                    ours = slice(unit * size * PAGE, (unit + 1) * size * PAGE)
                    assert (region.array[ours] == data[ours]).all()
                    if what():
                        break
                    time.sleep(0 if never else 0.1)
                return stats

            stats = bring_until(hits)
            assert hits() == 1
            assert stats["errors"][answer.number] == 1 + (copies() if answer.number == EAGAIN else 0)
            if then:
                assert copies() and stats["parked"]
            else:
                assert stats["moved"] == max(answer.field or 0, 0) // PAGE
                none(stats, "parked")
            moves = calls("MOVE")
            stats = bring_until(lambda: calls("MOVE") > moves)
            assert never == (calls("MOVE") == moves)
            none(stats, "failed", "forgotten")
            """,
            answer=answer,
            then=then,
        )


# -- nothing spins -------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 8] if LAB else [1, 64])
def test_what_is_parked_is_tried_once_a_millisecond(shimmed: Shimmed, threads: int) -> None:
    """Its thread sleeps meanwhile. Once it can be done, every page comes."""
    shimmed(
        """
        data = noise(4 * threads)
        region = served(uf.sources.Buffer(data), 4 * threads)
        hits = fail("COPY", CHANGING)
        touchers = {page: Toucher(region, page) for page in range(0, 4 * threads, 4)}
        until(lambda: service.stats()["records"] >= threads and hits() > 4 * threads)
        at_most(hits, threads)
        stop()
        for page, toucher in touchers.items():
            assert toucher.result() == page_of(data, page)
        stats = settled(pages=threads)
        # When some of a read can be done and some cannot, one wake-up is for all: more faults than threads.
        until(lambda: service.stats()["latency"]["count"].sum() >= threads)
        none(stats, "failed", "forgotten")
        """,
        threads=threads,
    )


@pytest.mark.parametrize("placement", ["any", "spin"])
def test_what_is_parked_is_not_tried_with_every_other_fault(shimmed: Shimmed, placement: str) -> None:
    shimmed(
        """
        service.close()
        service = uf.FaultService(u, placement=placement)
        region, other = served(SOURCES["COPY"]), served(uf.sources.Buffer(noise(2048)), 2048)
        hits = fail("COPY", CHANGING, start=region.start, end=region.start + WHOLE)
        toucher = Toucher(region, 3)
        until(lambda: hits() > 3)
        pages = np.random.default_rng(0).permutation(2048).astype(np.uint64)
        before, begun = hits(), time.monotonic()
        uf.touch(other.array, pages * np.uint64(PAGE))
        tries, ms = hits() - before, (time.monotonic() - begun) * 1000
        assert tries <= 2 * (ms + 20), (tries, ms)
        stop()
        assert toucher.result() == page_of(data, 3)
        """,
        placement=placement,
    )


def test_more_pages_than_can_be_parked(shimmed: Shimmed) -> None:
    """Two threads wait for the first and the last page of a unit of 8,192."""
    shimmed("""
        u.close()
        u = uf.Userfaultfd(WIRE, uf.Feature(0) if WIRE == "msg" else None)  # without moves
        service = uf.FaultService(u)
        data = noise(8192)
        region = served(uf.sources.Buffer(data), 8192, page_bytes=8192 * PAGE)
        # The engine reads both faults together, when it comes back from another.
        hold("ZEROPAGE")
        Toucher(served(SOURCES["ZEROPAGE"]), 0)
        until(held)
        hits = fail("COPY", CHANGING)
        touchers = {page: Toucher(region, page) for page in (0, 8191)}
        with open(f"/proc/self/fdinfo/{u.fileno()}") as info:
            until(lambda: info.seek(0) == 0 and "pending:\\t2\\n" in info.read())
        release()
        until(lambda: hits() > 4)
        at_most(hits, 64, lambda: int(service.stats()["ioctls"]))
        stop()
        for page, toucher in touchers.items():
            assert toucher.result() == page_of(data, page)
        settled(pages=8193)
        assert (region.array == data).all()
        """)


# -- nothing is dropped --------------------------------------------------------------------------------

NATIVE = "uf.sources.Native(SHIM.shim_source, data, data.nbytes)"


def test_what_a_worker_parks_is_tried_again(shimmed: Shimmed) -> None:
    """Though the reading thread has gone to sleep, and no other fault wakes it."""
    shimmed(f"""
        region = served({NATIVE}, 64)
        hold("COPY")
        hits = fail("COPY", CHANGING, times=3)
        toucher = Toucher(region, 3)
        until(held)
        time.sleep(0.1)
        release()
        assert toucher.result() == page_of(data, 3)
        stats = settled(pages=1, parked=3)
        # A try that finds the worker still at its end wakes the thread instead, whose new fault is handed on.
        assert hits() == 3 and stats["handed"] >= 4, (hits(), stats)
        """)


if not LAB:

    def test_what_is_parked_is_tried_while_a_region_is_filled(shimmed: Shimmed) -> None:
        """materialize() of four gigabytes of zeros takes a while, and no fault comes meanwhile."""
        shimmed("""
            region, zeros = served(SOURCES["COPY"]), served(uf.sources.Zero(), 1 << 20)
            hits = fail("COPY", CHANGING)
            toucher = Toucher(region, 3)
            until(lambda: hits() > 3)
            before, begun = hits(), time.monotonic()
            service.materialize(zeros, wait=False)
            until(lambda: service.stats()["pages"] == 1 << 20)
            tries, ms = hits() - before, (time.monotonic() - begun) * 1000
            assert tries >= 3, (tries, ms)
            stop()
            assert toucher.result() == page_of(data, 3)
            """)


@pytest.mark.parametrize(("call", "answer"), cases("PARK", "COPY"))
def test_materialize_tries_again(shimmed: Shimmed, call: str, answer: Answer) -> None:
    shimmed(
        """
        region = served(SOURCES["COPY"], 64)
        hits = fail("COPY", answer, times=3)
        service.materialize(region)
        assert hits() == 3
        assert (region.array == data).all()
        """,
        answer=answer,
    )


def test_a_service_closes_with_pages_parked(shimmed: Shimmed) -> None:
    """They fail closed, as all that is missing does then."""
    shimmed("""
        region = served(SOURCES["COPY"])
        hits = fail("COPY", CHANGING)
        touchers = [Toucher(region, page) for page in (3, 5)]
        until(lambda: hits() > 4)
        service.close()
        assert [toucher.result() for toucher in touchers] == [EFAULT, EFAULT]
        """)


def test_a_region_is_unregistered_with_pages_parked(shimmed: Shimmed) -> None:
    shimmed("""
        region = served(SOURCES["COPY"])
        hits = fail("COPY", CHANGING)
        toucher = Toucher(region, 3)
        until(lambda: hits() > 4)
        region.unregister()
        assert toucher.result() == bytes(PAGE)
        tries = hits()
        time.sleep(0.1)
        assert hits() == tries
        """)


def test_a_write_that_cannot_be_let_through_now_is_let_through_later(shimmed: Shimmed) -> None:
    """After close() the keeper lifts the protection of each page that is written to."""
    shimmed("""
        service.close()
        region = u.map(PAGE, uf.RegisterMode.MISSING | uf.RegisterMode.WP)
        u.copy(region.start, b"x" * PAGE, write_protect=True)
        array = region.array
        hits = fail("WRITEPROTECT", RECORDED["WRITEPROTECT", "an event is pending"], times=3)
        u.close()
        writer = threading.Thread(target=ctypes.memset, args=(array.ctypes.data, 7, 1), daemon=True)
        writer.start()
        writer.join(10)
        assert not writer.is_alive(), "it sleeps on"
        assert hits() == 3
        assert array[:2].tobytes() == b"\\7x"
        """)


def test_a_fault_is_counted_once_however_often_it_is_tried(shimmed: Shimmed) -> None:
    shimmed("""
        region = served(SOURCES["COPY"])
        hits = fail("COPY", CHANGING, times=5)
        assert touch(region, 3) == page_of(data, 3)
        settled(pages=1, parked=5)
        until(lambda: service.stats(region)["latency"].sum())  # the last of all
        stats, ours = service.stats(), service.stats(region)
        assert stats["records"] == stats["latency"]["count"].sum() == 1
        assert ours["records"] == ours["latency"].sum() == 1
        """)


# -- before the engine ---------------------------------------------------------------------------------


def test_the_system_is_out_of_descriptors(shimmed: Shimmed) -> None:
    """The device's ioctl says so; another way of opening works."""
    shimmed("""
        REQUESTS["NEW"] = 0xAA00
        hits = fail("NEW", Answer(ENFILE, None))
        device, *others = uf.probe().ways
        if hits():
            assert device.reason.startswith("ENFILE") and "fs.file-max" in device.remedy
            with uf.Userfaultfd(WIRE) as other:
                assert other.opened_by != "device"
        """)


@pytest.mark.parametrize("number", [errno.ENOMEM] if LAB else [errno.ENOMEM, errno.EBUSY, errno.EPERM])
def test_a_region_that_cannot_be_registered_leaves_nothing(shimmed: Shimmed, number: int) -> None:
    shimmed(
        """
        fail("REGISTER", Answer(number, None), times=1)
        before = sum(vma.end - vma.start for vma in uf.procmaps.vmas(0, 2**47))
        refuses(Answer(number, None), u.map, 1 << 30)
        assert len(u.regions) == 0
        assert sum(vma.end - vma.start for vma in uf.procmaps.vmas(0, 2**47)) < before + (1 << 30)
        """,
        number=number,
    )
