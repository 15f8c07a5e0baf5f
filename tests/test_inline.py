"""Mode "inline": faults served in the thread that takes them, and whose SIGBUS it is.

What may kill or hang runs in a process of its own. A death by SIGBUS is a test's good end where it says so.
"""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path
from textwrap import dedent

import pytest

import lazies
import userfault as uf
from support import PAGE, Child, needs

pytestmark = [pytest.mark.usefixtures("needs_uffd"), needs(uf.Feature.SIGBUS)]

HAS = uf.probe().features or uf.Feature(0)
FEATURES = uf.Feature.SIGBUS | HAS & (uf.Feature.THREAD_ID | uf.Feature.MOVE | uf.Feature.POISON)

SET_UP = (
    f"""
import faulthandler, pickle

FEATURES = uf.Feature({int(FEATURES)})
"""
    + """
def opened(features=FEATURES):
    u = uf.Userfaultfd("msg", features)
    return u, uf.FaultService(u, mode="inline")

def served(source=None, pages=N, **options):
    region = u.map(pages * PAGE)
    service.serve(region, source or uf.sources.Buffer(data), **options)
    return region

def broken_page():
    "A page that nobody can bring: of a file that became shorter."
    with open(FILE + ".short", "w+b") as file:
        file.truncate(PAGE)
        memory = mmap.mmap(file.fileno(), PAGE)
        file.truncate(0)
    return memory

def counter(which):
    "Install a handler of native/sigbus.c; what it counts."
    library = ctypes.CDLL(SIGBUS_LIBRARY)
    assert library.install(which) == 0
    return ctypes.c_long.in_dll(library, "calls")

u, service = opened()
"""
)


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("native")
    source = Path(__file__).parent / "native/sigbus.c"
    command = [
        "cc",
        "-O2",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-shared",
        "-fPIC",
        "-o",
        folder / "sigbus.so",
        source,
    ]
    subprocess.run(command, check=True, timeout=300)
    return lazies.built(folder), folder / "sigbus.so"


class Run:
    """Runs code after SET_UP in a child, to a good end or to a death."""

    def __init__(self, child: Child, libraries: tuple[Path, Path], folder: Path) -> None:
        self.child = child
        self.libraries = libraries
        self.file = folder / "data"

    def __call__(self, code: str, died: signal.Signals | None = None, says: str = "", **names: object) -> str:
        code = SET_UP + dedent(code) + '\nprint("good", flush=True)\n'
        library, other = self.libraries
        done = lazies.run(
            self.child, code, library, self.file, timeout=30, SIGBUS_LIBRARY=str(other), **names
        )
        assert done.returncode == (-died if died else 0), (done.returncode, done.stdout, done.stderr)
        assert done.stdout == ("so far\n" if died else "good\n"), (done.stdout, done.stderr)
        assert says in done.stderr
        return done.stderr


@pytest.fixture
def run(child: Child, libraries: tuple[Path, Path], tmp_path: Path) -> Run:
    return Run(child, libraries, tmp_path)


# -- What is served --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("uf.sources.Zero()", "np.zeros(N * PAGE, np.uint8)"),
        ("uf.sources.Constant(9)", "np.full(N * PAGE, 9, np.uint8)"),
        ("uf.sources.Pattern(5)", "uf.sources.Pattern(5).expected(0, N * PAGE)"),
        ("uf.sources.Buffer(data)", "data"),
        ("uf.sources.Buffer(np.memmap(written()))", "data"),
        ("uf.sources.File(written())", "data"),
        ("native(signal_safe=True)[0]", "data"),
    ],
)
def test_each_source(run: Run, source: str, expected: str) -> None:
    run(
        """
        expected = eval(EXPECTED)
        for options in ({"readahead": 0}, {}, {"page_bytes": 4 * PAGE}, {"readahead": 5}):
            region = served(eval(SOURCE), **options)
            pages = np.random.default_rng(0).permutation(N)
            assert all(region.array[page * PAGE + 7] == expected[page * PAGE + 7] for page in pages)
            assert (region.array == expected).all()
        stats = service.stats(region)
        assert 0 < stats["records"] <= stats["pages"] == N and stats["latency"].sum() == stats["records"]
        """,
        SOURCE=source,
        EXPECTED=expected,
    )


def test_one_fault_a_page_is_counted(run: Run) -> None:
    run(
        """
        array = served(readahead=0).array
        for page in range(0, N, 2):
            assert array[page * PAGE] == data[page * PAGE]
        stats = service.stats()
        assert stats["records"] == stats["pages"] == stats["runs"] == N // 2, stats
        assert stats["reads"] == stats["failed"] == stats["ahead"] == stats["existing"] == 0
        assert stats["latency"]["count"].sum() == N // 2
        """
    )


@needs(uf.Feature.MOVE)
def test_a_scan_is_read_ahead_of_in_huge_pages(run: Run) -> None:
    run(
        """
        region = served(uf.sources.Pattern(), 16 << 8)
        assert (region.array == uf.sources.Pattern().expected(0, region.length)).all()
        stats = service.stats(region)
        assert stats["records"] < 40 and stats["pages"] == 16 << 8, stats
        assert stats["moved"] or not os.path.exists("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")
        """
    )


def test_many_threads_at_the_same_and_at_other_pages(run: Run) -> None:
    run(
        """
        same_pages = np.arange(N, dtype=np.uint64) * np.uint64(PAGE)
        for turn in range(20):
            array = served(native(ns=20_000, signal_safe=True)[0], readahead=0).array
            def touch(offsets):
                uf.touch(array, offsets)
                return bool((array[offsets] == data[offsets]).all())
            shuffled = np.random.default_rng(turn).permutation(same_pages)
            together(*[lambda i=i: touch(shuffled[i::4].copy()) for i in range(4)],
                     *[lambda: touch(same_pages) for _ in range(12)])
            assert (array == data).all()
        stats = service.stats()
        assert stats["pages"] == 20 * N and stats["failed"] == 0, stats
        assert stats["coming"] > 0 and stats["existing"] < stats["pages"] // 10, stats
        """
    )


def test_regions_come_and_go_while_threads_fault(run: Run) -> None:
    run(
        """
        ending = time.monotonic() + 1.5
        def storm(seed):
            rng = np.random.default_rng(seed)
            while time.monotonic() < ending:
                region = served(uf.sources.Pattern(seed))
                expected = uf.sources.Pattern(seed).expected(0, region.length)
                pages = rng.permutation(N)[:rng.integers(1, N)]
                if not all(region.array[page * PAGE + 1] == expected[page * PAGE + 1] for page in pages):
                    return False
                region.close()
            return True
        together(*[lambda seed=seed: storm(seed) for seed in range(6)])
        assert service.stats()["failed"] == 0
        """
    )


def test_materialize_resident_and_dropped_pages(run: Run) -> None:
    run(
        """
        region = served(readahead=0)
        array = region.array
        assert array[3 * PAGE] == data[3 * PAGE] and service.resident(region).sum() == 1
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.madvise(ctypes.c_void_p(region.start), N * PAGE, mmap.MADV_DONTNEED) == 0
        assert array[3 * PAGE] == data[3 * PAGE]
        service.materialize(region)
        assert service.resident(region).all() and (array == data).all()
        """
    )


def test_errno_is_left_alone(run: Run) -> None:
    run(
        """
        libc = ctypes.CDLL(None, use_errno=True)
        array = served(uf.sources.File(written()), readahead=0).array
        os.truncate(FILE, 8 * PAGE)
        for page in range(8):
            ctypes.set_errno(77)
            libc.memchr(ctypes.c_void_p(array.ctypes.data + page * PAGE), 0, ctypes.c_size_t(8))
            assert ctypes.get_errno() == 77
        """
    )


# -- What is refused -------------------------------------------------------------------------------------


def test_refused_services() -> None:
    with uf.Userfaultfd("msg") as plain, pytest.raises(uf.UnsupportedError, match=r"Feature\.SIGBUS"):
        uf.FaultService(plain, mode="inline")
    with uf.Userfaultfd("msg", FEATURES) as u:
        with pytest.raises(uf.UnsupportedError, match='mode="inline"'):
            uf.FaultService(u)
        for options in ({"workers": 2}, {"shards": 2}, {"placement": "any"}):
            with pytest.raises(ValueError, match='of mode="threads"'):
                uf.FaultService(u, mode="inline", **options)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="mode is one of"):
            uf.FaultService(u, mode="signal")  # type: ignore[arg-type]
    with (
        uf.Userfaultfd("msg", FEATURES | uf.Feature.EVENT_REMAP) as u,
        pytest.raises(uf.UnsupportedError, match="EVENT_REMAP"),
    ):
        uf.FaultService(u, mode="inline")


def test_refused_sources(run: Run) -> None:
    run(
        """
        class Ones:
            nbytes = N * PAGE
            def read_into(self, offset, buffer):
                buffer[:] = b"\\1" * len(buffer)
        for make, word in ((lambda: native()[0], "signal_safe=True"), (lambda: uf.Pager(Ones()), "threads")):
            source = make()
            for use in (lambda: served(source), lambda: uf.lazy_array(source, serving="inline")):
                try:
                    use()
                    raise AssertionError(source)
                except uf.SourceError as error:
                    assert word in str(error) and "lock" in str(error), error
            if hasattr(source, "close"):
                source.close()
        assert native(signal_safe=True)[0].signal_safe and not native()[0].signal_safe
        for options, word in (({"placement": "any"}, "placement"), ({"serving": "signal"}, "serving")):
            try:
                uf.lazy_array(uf.sources.Zero(), PAGE, **{"serving": "inline", **options})
                raise AssertionError(options)
            except ValueError as error:
                assert word in str(error)
        budget = uf.Budget(1 << 20)
        a = uf.lazy_array(written(), memory_limit=budget, serving="inline")
        b = uf.lazy_array(FILE, memory_limit=budget, serving="inline")
        try:
            uf.lazy_array(FILE, memory_limit=budget)
            raise AssertionError
        except ValueError as error:
            assert "inline" in str(error)
        """
    )


# -- Whose SIGBUS it is ----------------------------------------------------------------------------------

BEFORE = {
    "nobody": "",
    "faulthandler": "faulthandler.enable()",
    "a Python handler": "signal.signal(signal.SIGBUS, lambda *args: None)",
    "ignored": "signal.signal(signal.SIGBUS, signal.SIG_IGN)",
    "a handler in C": "calls = counter(0)",
}


@pytest.mark.parametrize("before", BEFORE)
def test_who_was_there_before(run: Run, before: str) -> None:
    """What is ours is served, and what is not goes to whom it would have gone to."""
    what = {
        "nobody": "print('so far', flush=True); broken_page()[0]",
        "faulthandler": "print('so far', flush=True); broken_page()[0]",
        "ignored": "os.kill(os.getpid(), signal.SIGBUS); print('so far', flush=True); broken_page()[0]",
        "a handler in C": "assert broken_page()[0] == 7 and broken_page()[1] == 7 and calls.value == 2",
        "a Python handler": """
seen = []
signal.signal(signal.SIGBUS, lambda *args: seen.append(args))
os.kill(os.getpid(), signal.SIGBUS)
time.sleep(0.3)
os.kill(os.getpid(), signal.SIGBUS)
assert len(seen) == 2, seen
""",
    }[before]
    dies = before in ("nobody", "faulthandler", "ignored")
    said = run(
        dedent(
            f"""
            service.close()
            signal.signal(signal.SIGBUS, signal.SIG_DFL)
            {BEFORE[before]}
            u, service = opened()
            assert (served().array == data).all()
            """
        )
        + what,
        died=signal.SIGBUS if dies else None,
    )
    assert ("Bus error" in said) == (before == "faulthandler")


AFTER = {
    "faulthandler": "faulthandler.enable()",
    "a Python handler": "signal.signal(signal.SIGBUS, lambda *args: None)",
    "the default": "signal.signal(signal.SIGBUS, signal.SIG_DFL)",
    "a handler in C that passes on": "calls = counter(1)",
    "a handler in C that does not": "calls = counter(2)",
}


@pytest.mark.parametrize("how", ["serve", "wait"])
@pytest.mark.parametrize("after", AFTER)
def test_who_takes_it_afterwards(run: Run, after: str, how: str) -> None:
    """SIGBUS is taken back when something is served, and within a moment; what is not ours is passed on."""
    said = run(
        f"""
        array = served(readahead=0).array
        assert array[0] == data[0]
        {AFTER[after]}
        if {how == "serve"}:
            served()
        else:
            time.sleep(0.5)
        assert (array == data).all()
        print("so far", flush=True)
        if {after == "a Python handler"}:
            signal.signal(signal.SIGBUS, signal.SIG_DFL)  # or what is raised would be told over and over
        if {"does not" in after}:
            os.kill(os.getpid(), signal.SIGBUS)
            assert calls.value == 1
            signal.signal(signal.SIGBUS, signal.SIG_DFL)
        broken_page()[0]
        """,
        died=signal.SIGBUS,
    )
    assert ("Bus error" in said) == (after == "faulthandler")


@pytest.mark.parametrize(
    "after", ["a Python handler", "a handler in C that passes on", "a handler in C that does not"]
)
def test_a_fault_meanwhile_waits(run: Run, after: str) -> None:
    """Before it is taken back, a handler that returns has the thread fault again and again."""
    run(
        f"""
        array = served(readahead=0).array
        {AFTER[after]}
        assert (array == data).all()
        """
    )


@pytest.mark.parametrize("after", ["faulthandler", "the default"])
def test_a_fault_meanwhile_ends_the_process(run: Run, after: str) -> None:
    """What docs/inline.md says of those who take SIGBUS without a word: it is not hidden."""
    said = run(
        f"""
        array = served(readahead=0).array
        print("so far", flush=True)
        {AFTER[after]}
        array[0]
        """,
        died=signal.SIGBUS,
    )
    assert ("Bus error" in said) == (after == "faulthandler")


def test_default_action_of_a_signal_that_was_sent(run: Run) -> None:
    run("print('so far', flush=True); os.kill(os.getpid(), signal.SIGBUS); time.sleep(5)", died=signal.SIGBUS)


def test_alternate_stacks_are_left_alone(run: Run) -> None:
    """They may be smaller than what we need: it runs on the stack of the thread that faulted."""
    run(
        """
        class Stack(ctypes.Structure):
            _fields_ = (("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("nbytes", ctypes.c_size_t))
        room = np.full(64 << 10, 0xA5, np.uint8)
        libc = ctypes.CDLL(None)
        array = served(readahead=0).array
        def with_stack():
            stack = Stack(room.ctypes.data, 0, room.size)
            assert libc.sigaltstack(ctypes.byref(stack), None) == 0
            found = bool((array == data).all())
            assert libc.sigaltstack(ctypes.byref(Stack(None, 2, 0)), None) == 0  # SS_DISABLE
            return found
        together(with_stack)
        assert (room == 0xA5).all()
        """
    )


def test_small_stacks_suffice(run: Run) -> None:
    run(
        """
        threading.stack_size(64 << 10)
        a = uf.lazy_array(written(), mode="c", serving="inline", memory_limit=1 << 20, readahead=0)
        def touch():
            uf.touch(a, np.arange(N, dtype=np.uint64) * np.uint64(PAGE))
            return True
        together(touch, touch)
        assert same(a)
        """
    )


def test_blocked_in_the_thread_that_serves(run: Run) -> None:
    run(
        """
        region = u.map(PAGE)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGBUS])
        for refused in (lambda: service.serve(region, uf.sources.Zero()),
                        lambda: uf.lazy_array(uf.sources.Zero(), PAGE, serving="inline")):
            try:
                refused()
                raise AssertionError
            except uf.UnsupportedError as error:
                assert "SIG_UNBLOCK" in str(error)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGBUS])
        service.serve(region, uf.sources.Constant(3))
        assert region.array[0] == 3
        """
    )


def test_blocked_in_another_thread_it_kills(run: Run) -> None:
    run(
        """
        array = served().array
        def blocked():
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGBUS])
            return bool(array[0] == data[0])
        print("so far", flush=True)
        together(blocked)
        """,
        died=signal.SIGBUS,
    )


# -- Sources that fault ----------------------------------------------------------------------------------


def test_a_source_whose_memory_is_served_too(run: Run) -> None:
    run(
        """
        inner = served(readahead=0).array
        def over(array):
            ctx = np.array([array.ctypes.data, 0, 0, 0, 0, 0, 0])
            return uf.sources.Native(ctypes.CDLL(LIBRARY).give, ctx, N * PAGE, signal_safe=True)
        middle = served(over(inner), readahead=0).array
        outer = served(over(middle), page_bytes=4 * PAGE).array
        def touch(seed):
            pages = np.random.default_rng(seed).permutation(N)
            return all(outer[page * PAGE + 9] == data[page * PAGE + 9] for page in pages)
        together(*[lambda seed=seed: touch(seed) for seed in range(8)])
        assert (outer == data).all() and (inner == data).all()
        assert service.stats()["failed"] == 0
        """
    )


def test_a_source_that_asks_for_the_page_itself(run: Run) -> None:
    run(
        """
        ctx = np.zeros(7, np.int64)
        region = served(uf.sources.Native(ctypes.CDLL(LIBRARY).give, ctx, N * PAGE, signal_safe=True))
        ctx[0] = region.start
        print("so far", flush=True)
        region.array[5 * PAGE]
        """,
        died=signal.SIGBUS,
        says="a source touched served memory",
    )


# -- Fork ------------------------------------------------------------------------------------------------


def test_a_fork_child_has_none_of_it_and_may_have_its_own(run: Run) -> None:
    run(
        """
        def own():
            with uf.Userfaultfd("msg", FEATURES) as mine, uf.FaultService(mine, mode="inline") as its:
                region = mine.map(N * PAGE)
                its.serve(region, uf.sources.Pattern())
                return bool((region.array == uf.sources.Pattern().expected(0, N * PAGE)).all())
        region = served(readahead=0)
        array = region.array
        assert array[0] == data[0]
        ending = False
        def touch():
            while not ending:
                other = served(native(ns=1000, signal_safe=True)[0], readahead=0)
                assert same(other.array)
            return True
        threads = [threading.Thread(target=touch) for _ in range(2)]
        for thread in threads:
            thread.start()
        for _ in range(5):
            assert ended_well(fork(own))
            pid = fork(lambda: array[PAGE])
            status = os.waitpid(pid, 0)[1]
            assert os.WTERMSIG(status) == signal.SIGSEGV, status
        ending = True
        for thread in threads:
            thread.join()
        assert service.resident(region).sum() == 1 and same(array)
        """
    )


def test_a_fork_child_is_not_kept_waiting(run: Run) -> None:
    """By threads of its parent's, as many as serve at once, which were serving when it was forked."""
    run(
        """
        def own():
            return same(uf.lazy_array(uf.sources.Buffer(data), serving="inline", readahead=0))
        array = served(native(ns=400_000_000, signal_safe=True)[0], readahead=0).array
        threads = [threading.Thread(target=uf.touch, args=(array, np.array([page * PAGE], np.uint64)))
                   for page in range(16)]
        for thread in threads:
            thread.start()
        time.sleep(0.2)
        assert service.stats()["records"] == 16 and service.stats()["pages"] == 0
        assert ended_well(fork(own))
        for thread in threads:
            thread.join()
        assert same(array, 0, 16)
        """
    )


def test_reading_changes_nothing(run: Run) -> None:
    """Also where other threads bring and let go of the pages that are read."""
    run(
        """
        pattern = uf.sources.Pattern()
        a = uf.lazy_array(pattern, 2 << 20, mode="c", serving="inline", memory_limit=1 << 20, readahead=0)
        expected = pattern.expected(0, 2 << 20)
        def read(seed):
            pages = np.random.default_rng(seed).integers(0, (2 << 20) // PAGE, 3000)
            uf.touch(a, pages.astype(np.uint64) * np.uint64(PAGE))  # without the GIL
            return all(a[page * PAGE + 8] == expected[page * PAGE + 8] for page in pages[:100].tolist())
        together(*[lambda i=i: read(i) for i in range(4)])
        assert a.stats()["changed"] == 0 and a.stats()["evicted"] > 0
        """
    )


def test_a_fork_child_fills_nothing_of_its_parent(run: Run) -> None:
    """Where the parent has a missing page it has memory that faults for another reason."""
    run(
        """
        region = served(readahead=0)
        broken = broken_page()
        libc = ctypes.CDLL(None)
        libc.mremap.restype = ctypes.c_void_p
        def touch():
            start = np.frombuffer(broken, np.uint8).ctypes.data
            moved = libc.mremap(ctypes.c_void_p(start), ctypes.c_size_t(PAGE), ctypes.c_size_t(PAGE), 3,
                                ctypes.c_void_p(region.start + PAGE))
            return moved == region.start + PAGE and ctypes.string_at(moved, 1)
        status = os.waitpid(fork(touch), 0)[1]
        assert os.WTERMSIG(status) == signal.SIGBUS, status
        assert not service.resident(region).any() and service.stats()["records"] == 0
        assert same(region.array)
        """
    )


# -- The end ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "closing", ["service.close()", "u.close()", "region.close()", "del region, u, service"]
)
def test_what_is_missing_fails_closed(run: Run, closing: str) -> None:
    run(
        f"""
        region = served(readahead=0)
        array = region.array
        assert array[0] == data[0]
        {closing}
        gc.collect()
        assert array[0] == data[0]
        print("so far", flush=True)
        print(array[PAGE])
        """,
        died=signal.SIGBUS,
    )


def test_what_failed_is_told(run: Run) -> None:
    """Where the handler before mends it, the program goes on."""
    run(
        """
        service.close()
        calls = counter(0)
        u, service = opened()
        file = uf.sources.File(written())
        region = served(file, readahead=0)
        os.truncate(FILE, 4 * PAGE)
        assert region.array[PAGE] == data[PAGE]
        assert region.array[9 * PAGE] == 7 and calls.value == 1
        (failure,) = service.failures()
        assert failure[:4] == (region.start + 9 * PAGE, region.id, 9 * PAGE, errno.ENODATA), failure
        assert "its source failed" in failure.why and service.stats()["failed"] == 1
        unserved = u.map(PAGE)
        assert unserved.array[0] == 7 and service.failures()[-1].why == "no source serves it"
        """
    )


def test_what_failed_fails_again(run: Run) -> None:
    run(
        """
        array = served(uf.sources.File(written()), readahead=0).array
        os.truncate(FILE, 4 * PAGE)
        pipe = os.pipe()
        for _ in range(2):
            try:
                os.write(pipe[1], array[9 * PAGE:10 * PAGE])
                raise AssertionError
            except OSError as error:
                assert error.errno == errno.EFAULT
        print("so far", flush=True)
        array[9 * PAGE]
        """,
        died=signal.SIGBUS,
    )


# -- Lazy arrays -----------------------------------------------------------------------------------------


def test_lazy_arrays(run: Run) -> None:
    run(
        """
        a = uf.lazy_array(written(), serving="inline", readahead=0)
        assert [a[page * PAGE] for page in range(0, N, 3)] == [data[page * PAGE] for page in range(0, N, 3)]
        assert a.stats()["records"] == len(range(0, N, 3)) == a.resident.sum()
        b = pickle.loads(pickle.dumps(a[PAGE:]))
        assert (b == data[PAGE:]).all() and b._backing.serving == "inline"
        assert a.evict() and not a.resident.any() and same(a)
        a.close()
        """
    )


def test_system_calls_fail_until_the_pages_are_there(run: Run) -> None:
    run(
        """
        a = uf.lazy_array(written(), serving="inline", readahead=0)
        assert by_system_call(a, 3) == errno.EFAULT
        with open(os.devnull, "wb") as file:
            try:
                a.tofile(file)
                raise AssertionError
            except uf.UnsupportedError as error:
                assert error.errno == errno.EFAULT
                assert "materialize()" in str(error) and "inline" in str(error)
            a.prefetch(slice(3 * PAGE, 4 * PAGE))
            assert by_system_call(a, 3) == data[3 * PAGE:4 * PAGE].tobytes()
            a.materialize()
            a.tofile(file)
        assert by_system_call(a, 5) == data[5 * PAGE:6 * PAGE].tobytes()
        """
    )


def test_an_ordinary_user_needs_no_privilege(run: Run) -> None:
    """No faults of system calls are delivered there anyway. No warning is due: it was asked for by name."""
    run(
        """
        import warnings
        source = uf.sources.File(written())
        service.close()
        u.close()
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
        ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE
        warnings.simplefilter("error")
        assert same(uf.lazy_array(source, serving="inline"))
        """
    )


@pytest.mark.parametrize("limit", [None, 1 << 20])
@pytest.mark.parametrize("mode", ["c", "r+"])
def test_writes(run: Run, mode: str, limit: int | None) -> None:
    """By several threads, with and without a memory limit: nothing is lost, and what is private stays so."""
    run(
        """
        n = 1024 * PAGE if MODE == "r+" or LIMIT is None else 128 * PAGE
        before = np.random.default_rng(1).integers(0, 256, n, dtype=np.uint8)
        before.tofile(FILE)
        a = uf.lazy_array(FILE, mode=MODE, serving="inline", memory_limit=LIMIT)
        expected = before.copy()
        def write(thread):
            rng = np.random.default_rng(thread)
            for at in rng.integers(0, n // 8, 1500) * 8 + thread:
                expected[at] += 1
                a[at] += 1
                if a[at] != expected[at]:
                    return False
            return True
        together(*[lambda i=i: write(i) for i in range(4)])
        changed = (expected != before).reshape(-1, PAGE).any(1)
        assert (a == expected).all()
        assert LIMIT is None or a.stats()["evicted"] or MODE == "c"
        assert LIMIT or ((a.dirty & changed) == changed).all()
        a.flush()
        assert (np.fromfile(FILE, np.uint8) == (expected if MODE == "r+" else before)).all()
        a.close()
        """,
        MODE=mode,
        LIMIT=limit,
    )


@pytest.mark.parametrize("on_error", ["poison", "retry"])
def test_what_a_source_does_not_give(run: Run, on_error: str) -> None:
    run(
        """
        source, ctx = native(2, 3, times=3, signal_safe=True)
        a = uf.lazy_array(source, serving="inline", readahead=0, on_error=ON_ERROR)
        assert a[PAGE] == data[PAGE]
        print("so far" * (ON_ERROR == "poison"), end="\\n" * (ON_ERROR == "poison"), flush=True)
        assert a[2 * PAGE] == data[2 * PAGE] and ctx[6] == 3
        """,
        died=signal.SIGBUS if on_error == "poison" else None,
        says="Input/output error",
        ON_ERROR=on_error,
    )


def test_as_many_as_there_can_be(run: Run) -> None:
    run(
        """
        several = [opened() for _ in range(63)]
        try:
            opened()
            raise AssertionError
        except uf.UffdError as error:
            assert error.errno == errno.EBUSY
        for one, its in several:
            region = one.map(PAGE)
            its.serve(region, uf.sources.Constant(5))
            assert region.array[0] == 5
            del region
        for one, its in several:
            one.close()
        del several, one, its
        again = [opened() for _ in range(5)]
        """
    )


def test_it_is_the_page_size_of_the_handlers() -> None:
    """native/sigbus.c counts on it."""
    assert PAGE == 4096
