"""Pages that go from one area to another and back, by moves and by copies, while threads touch them."""

from __future__ import annotations

import mmap

import numpy as np
import pytest

import userfault as uf
from areas import KINDS, LIBC, F, advise, anonymous, ends, fault, opened
from support import PAGE, Child

pytestmark = pytest.mark.usefixtures("needs_uffd")
HUGE = 2 << 20


@pytest.mark.parametrize(
    ("step", "advice"),
    [(PAGE, mmap.MADV_NOHUGEPAGE), (HUGE, mmap.MADV_HUGEPAGE), (HUGE, mmap.MADV_NOHUGEPAGE)],
    ids=["small pages", "huge pages", "huge pages that are split"],
)
def test_pages_are_moved_to_where_they_are_touched_and_back(step: int, advice: int) -> None:
    length = 2 * HUGE if step == HUGE else 64 * PAGE
    content = np.random.default_rng(7).integers(1, 256, length, dtype=np.uint8)
    with opened(F.MOVE) as u:
        reader = uf.EventReader(u)
        rooms = [anonymous(length + HUGE) for _ in range(2)]
        ones = [room[-room.ctypes.data % HUGE :][:length] for room in rooms]
        LIBC.madvise(ones[0].ctypes.data, length, advice if step == PAGE else mmap.MADV_HUGEPAGE)
        ones[0][:] = content
        for source, target in (ones, ones[::-1]):
            region = u.register(target.ctypes.data, length)
            advise(region, advice)
            for begin in range(0, length, step):
                there = slice(begin, begin + step)
                toucher, flags = fault(region, reader, begin // PAGE)
                assert flags == 0
                assert u.move(region.start + begin, source.ctypes.data + begin, step) == step
                assert toucher.ends() == content[begin]
                assert (region.array[there] == content[there]).all()
                assert not source[there].any()
            region.unregister()
            # Looked at, it has the zero page everywhere.
            LIBC.madvise(source.ctypes.data, length, mmap.MADV_DONTNEED)


# As the kernel's stress test: the pages are copied from one area to the other while threads count up in them,
# two monitors and two threads in the background bring the pages, and then the areas swap their parts.
BOUNCES = """
    n_pages, per_page = 96, PAGE // 8
    sys.setswitchinterval(1e-4)
    areas, others = zip(*(area(kind, n_pages) for _ in range(2)))
    held = [np.frombuffer(one, np.uint64) for one in areas]
    COUNT = 8  # which number of the page
    held[0][COUNT::per_page] = held[0][COUNT + 1::per_page] = 1
    if kind == "shmem-private":
        # Writing to it left zeros in the page cache, which are not missing.
        others[0].madvise(mmap.MADV_REMOVE)
    expected = [1] * n_pages
    locks = [threading.Lock() for _ in range(n_pages)]
    wrong = []

    def guarded(function, *arguments):
        def run():
            try:
                function(*arguments)
            except BaseException as error:
                wrong.append(repr(error))
        thread = threading.Thread(target=run)
        thread.start()
        return thread

    def bounce(number, source, target):
        region = u.register(areas[target], mode=M.MISSING | M.WP if protect else M.MISSING)
        data, numbers, address = held[source].view(np.uint8), held[target], region.start
        brought, lifted, finished, counted = (threading.Event() for _ in range(4))

        def bring(page):
            start = address + page * PAGE
            try:
                u.copy(start, data[page * PAGE:][:PAGE], write_protect=protect)
            except uf.PageExistsError:
                pass  # another brought it, and woke who sleeps there

        def count_up(seed):
            random = np.random.default_rng(seed)
            page = 0
            while not finished.is_set():
                page = int(random.integers(n_pages)) if number % 2 else (page + 1) % n_pages
                with locks[page]:
                    # Both without the GIL: this may sleep.
                    uf.touch(region.array, np.array([page * PAGE + 8 * COUNT], np.uint64))
                    now = int(numbers[page * per_page + COUNT])
                    assert now == expected[page], (page, now, expected[page])
                    expected[page] = now + 1
                    new = ctypes.c_uint64(now + 1)
                    ctypes.memmove(address + page * PAGE + 8 * COUNT, ctypes.byref(new), 8)

        def monitor():
            reader = uf.EventReader(u, capacity=8)
            while not counted.is_set():
                for record in reader.read(0.05):
                    if record["flags"] & WP:
                        u.writeprotect(int(record["address"]), PAGE, protect=False)
                        lifted.set()
                    else:
                        bring((int(record["address"]) - address) // PAGE)
                        brought.set()

        def background(first, end):
            brought.wait()  # so that some pages come by their faults
            half = (first + end) // 2
            for page in range(first, half):
                bring(page)
            if protect:
                u.writeprotect(address + first * PAGE, (end - first) * PAGE)
            for page in range(half, end):
                bring(page)

        monitors = [guarded(monitor) for _ in range(2)]
        counters = [guarded(count_up, 10 * number + k) for k in range(3)]
        carriers = [guarded(background, k * n_pages // 2, (k + 1) * n_pages // 2) for k in range(2)]
        for thread in carriers: thread.join()
        if protect:
            lifted.wait()
        finished.set()
        for thread in counters: thread.join()
        counted.set()
        for thread in monitors: thread.join()
        assert not wrong, wrong
        region.unregister()
        assert numbers[COUNT::per_page].tolist() == expected
        assert (numbers[COUNT + 1::per_page] == 1).all()
        # The next bounce goes the other way, to where nothing may be left.
        areas[source].madvise(mmap.MADV_REMOVE if kind == "shmem" else mmap.MADV_DONTNEED)

    for number in range(4):
        bounce(number, number % 2, 1 - number % 2)
    assert sum(expected) > n_pages
    """


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("protect", [False, True], ids=["missing", "missing and protected"])
def test_threads_count_up_in_pages_that_bounce(kind: str, protect: bool, child: Child) -> None:
    features = KINDS[kind] | (F.PAGEFAULT_FLAG_WP if protect else F(0))
    ends(child, BOUNCES, features, kind=kind, protect=protect, WP=uf._consts.UFFD_PAGEFAULT_FLAG_WP)
