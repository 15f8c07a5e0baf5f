"""A lazy array's pages come with the right bytes or not at all: then who touches them dies, and is told why.

Whatever may die or hang does it in a process of its own.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent

import pytest

import lazies
import userfault as uf
from children import Nursery
from support import Child, needs
from test_errno_kernel import in_a_child
from test_errno_shim import SET_UP as SHIMMED

pytestmark = pytest.mark.usefixtures("needs_privilege")
writes = needs(uf.Feature.PAGEFAULT_FLAG_WP)

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lazies.built(tmp_path_factory.mktemp("native"))


@pytest.fixture
def run(child: Child, library: Path, tmp_path: Path) -> Run:
    """Run code after `lazies.SET_UP`."""

    def run(code: str, **names: object) -> subprocess.CompletedProcess[str]:
        return lazies.run(child, code, library, tmp_path / "data", **names)

    return run


def good(done: subprocess.CompletedProcess[str]) -> str:
    """It came to its end; what it had to say on stderr."""
    assert done.stdout == "good\n", (done.returncode, done.stdout, done.stderr)
    assert done.returncode == 0, (done.returncode, done.stderr)
    return done.stderr


def died(done: subprocess.CompletedProcess[str], *signals: signal.Signals) -> None:
    """Of the signal, and not before it should."""
    assert "still here" not in done.stdout, done.stdout + done.stderr
    assert -done.returncode in (signals or (signal.SIGBUS,)), (done.returncode, done.stdout, done.stderr)
    assert done.stdout == "before\n", done.stdout + done.stderr


# -- sources that fail -------------------------------------------------------------------------------------

# How a source comes to be without page 9, and what that is called.
FAILURES = {
    "a file that became shorter": (
        """
        a = uf.lazy_array(written(), (N, PAGE), ">u1", offset=0, **options)
        os.truncate(FILE, 9 * PAGE + 100)
        """,
        "No data available",
    ),
    "a function that answers -EIO": (
        "a = uf.lazy_array(native(9, 10)[0], (N, PAGE), **options)",
        "Input/output error",
    ),
    "a function that answers more than 0": (
        "a = uf.lazy_array(native(9, 10, error=-5)[0], (N, PAGE), **options)",
        "No data available",
    ),
}
failing = pytest.mark.parametrize("failure", FAILURES)


@failing
@pytest.mark.parametrize(
    "options", [{}, {"mode": "c"}, {"memory_limit": 1 << 20}, {"readahead": 16}], ids=str
)
def test_a_page_that_cannot_be_had_kills_its_toucher(
    run: Run, failure: str, options: dict[str, object]
) -> None:
    """And stderr says which, and why, before faulthandler says where."""
    if "mode" in options and not uf.probe().features & uf.Feature.PAGEFAULT_FLAG_WP:  # type: ignore[operator]
        pytest.skip("the kernel has no PAGEFAULT_FLAG_WP")
    make, why = FAILURES[failure]
    done = run(
        dedent(make)
        + dedent("""
        import faulthandler
        faulthandler.enable()
        a = a.reshape(-1)
        def touch():
            return a[9 * PAGE + 5]
        assert same(a, 0, 9)
        print("before", flush=True)
        print("still here", touch(), flush=True)
        """),
        options=options,
    )
    died(done)
    said, _, trace = done.stderr.partition("Fatal Python error: Bus error")
    assert said.count("\n") - said.isspace() >= 1
    line = said.splitlines()[0]
    assert line.startswith("userfault: lazy array uint8 (64, 4096) of "), line
    assert line.endswith(f": byte {9 * 4096} cannot be had: {why}"), line
    assert said.splitlines()[1:] in ([], [""])
    assert "in touch" in trace


@failing
@pytest.mark.parametrize("unit", [1, 4, 64])
def test_its_neighbours_stay_readable(run: Run, failure: str, unit: int) -> None:
    """Before it and after, in the same unit and in others, touched before it was and after."""
    lost = range(9, 64) if "shorter" in failure else [9]
    said = good(
        run(
            dedent(FAILURES[failure][0])
            + dedent("""
            a = a.reshape(-1)
            assert same(a, 3, 4)
            for _ in range(2):
                assert by_system_call(a, 9) == errno.EFAULT
            for page in np.random.default_rng(1).permutation(N):
                right = errno.EFAULT if page in lost else data[page * PAGE:(page + 1) * PAGE].tobytes()
                assert by_system_call(a, page) == right, page
            assert same(a, 0, 9)
            print("good")
            """),
            options={"page_bytes": unit * 4096},
            lost=list(lost),
        )
    )
    lines = [line for line in said.splitlines() if "cannot be had:" in line]
    assert f"byte {9 * 4096} " in lines[0]
    assert len(lines) == min(len(lost), 20), said


def test_the_offset_that_is_told_is_the_arrays_own(run: Run) -> None:
    """Not the source's, nor that of the mapping, which begins before it."""
    said = good(
        run("""
        a = uf.lazy_array(native(9, 11)[0], 50 * PAGE, offset=2 * PAGE + 100, page_bytes=4 * PAGE)
        assert by_system_call(a[100:], 7) == errno.EFAULT  # within the source's tenth page and the next
        print("good")
        """)
    )
    first = 9 * 4096 - (2 * 4096 + 100)
    assert f": byte {first} cannot be had" in said.splitlines()[0], said


def test_no_more_than_twenty_lines_are_said(run: Run) -> None:
    """Of each array."""
    said = good(
        run("""
        for _ in range(2):
            a = uf.lazy_array(native(0, N)[0], readahead=0)
            assert all(by_system_call(a, page) == errno.EFAULT for page in range(N))
        print("good")
        """)
    )
    lines = said.splitlines()
    assert len(lines) == 40, said
    assert [line.endswith("(no more is said of it)") for line in lines] == [*[False] * 19, True] * 2
    assert all("byte" in line and "Input/output error" in line for line in lines)


def test_a_long_name_leaves_room_for_the_reason(run: Run) -> None:
    """Of an array with many fields, of a file far down."""
    said = good(
        run("""
        dtype = [(f"field{number}", "<f8") for number in range(200)]
        a = uf.lazy_array(native(0, N)[0], N * PAGE // 1600, dtype)
        assert by_system_call(a.view(np.uint8), 0) == errno.EFAULT
        print("good")
        """)
    )
    assert said.startswith("userfault: lazy array [('field0'")
    assert said.endswith(": byte 0 cannot be had: Input/output error\n"), said


# -- on_error="retry" ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("times", [1, 7])
@pytest.mark.parametrize("page_bytes", [4096, 4 * 4096])
def test_a_source_that_comes_to_itself(run: Run, times: int, page_bytes: int) -> None:
    said = good(
        run(
            """
            source, ctx = native(9, 12, times=times)
            a = uf.lazy_array(source, on_error="retry", page_bytes=page_bytes)
            assert a[10 * PAGE] == data[10 * PAGE] and same(a)
            assert ctx[6] == times
            print("good")
            """,
            times=times,
            page_bytes=page_bytes,
        )
    )
    assert "cannot be had:" not in said
    for line in said.splitlines():
        assert line.startswith("userfault: lazy array "), said
        assert line.endswith("cannot be had yet, and is asked for again: Input/output error"), said
    assert page_bytes != 4096 or said, "nothing was said"


def test_while_it_is_asked_again_others_come(run: Run) -> None:
    """Pages of other arrays; and of its own, when it has come to itself."""
    said = good(
        run("""
        source, ctx = native(9, 10)
        a, b = uf.lazy_array(source, on_error="retry", readahead=0), uf.lazy_array(uf.sources.Buffer(data))
        got = []
        # In a system call: who touches it and holds the GIL keeps all threads waiting.
        thread = threading.Thread(target=lambda: got.append(by_system_call(a, 9)))
        thread.start()
        while ctx[6] < 3:
            time.sleep(0.001)
        assert same(b) and not got
        before, begun = int(ctx[6]), time.monotonic()
        time.sleep(0.3)
        asked, lasted = int(ctx[6]) - before, time.monotonic() - begun
        assert asked <= lasted / 0.01 + 1, "it is asked again and again without a pause"
        ctx[3] = 0
        thread.join()
        assert got == [data[9 * PAGE:10 * PAGE].tobytes()] and same(a)
        print("good")
        """)
    )
    assert f"byte {9 * 4096} cannot be had yet" in said
    assert said.count("\n") == 1, said


def test_patience_has_an_end(run: Run) -> None:
    done = run("""
        import userfault.backing
        userfault.backing._PATIENCE_SECONDS = 0.3
        source, ctx = native(9, 10)
        a = uf.lazy_array(source, on_error="retry", readahead=0)
        begun = time.monotonic()
        assert by_system_call(a, 9) == errno.EFAULT
        assert time.monotonic() - begun >= 0.3 and ctx[6] > 2
        assert same(a, 0, 9) and same(a, 10)
        print("before", flush=True)
        print("still here", a[9 * PAGE])
        """)
    died(done)
    first, last = done.stderr.splitlines()
    assert first.endswith(f"byte {9 * 4096} cannot be had yet, and is asked for again: Input/output error")
    assert last.endswith(f"byte {9 * 4096} cannot be had: Input/output error")


def test_patience_lasts_half_a_minute(run: Run) -> None:
    good(
        run("""
        a = uf.lazy_array(uf.sources.Zero(), 1, on_error="retry")
        assert a._lazy().patience == 30 and uf.lazy_array(uf.sources.Zero(), 1)._lazy().patience == 0
        print("good")
        """)
    )


# -- prefetch and materialize -------------------------------------------------------------------------------


@failing
@pytest.mark.parametrize(
    "call", ["materialize()", "prefetch()", "prefetch(9)", "prefetch((slice(8, 11), 5))"]
)
def test_who_asks_for_them_is_told(run: Run, failure: str, call: str) -> None:
    """By an exception; the good pages come when they are touched. Nothing is said on stderr."""
    make, why = FAILURES[failure]
    said = good(
        run(
            dedent(make)
            + dedent("""
            for _ in range(2):
                try:
                    eval("a." + call)
                except uf.SourceError as error:
                    assert "lazy array" in str(error) and WHY in str(error), error
                    assert "bytes are missing" in str(error)
                else:
                    raise AssertionError("no SourceError")
            assert not a.resident[9]
            assert same(a.reshape(-1), 0, 9)
            a[:9].materialize()
            a.prefetch([3, 5])
            assert a.resident[:9].all() and not a.resident[9]
            print("good")
            """),
            options={},
            call=call,
            WHY=why,
        )
    )
    assert said == ""


def test_what_prefetch_could_not_have_comes_when_the_source_is_well(run: Run) -> None:
    good(
        run("""
        source, ctx = native(9, 10)
        a = uf.lazy_array(source)
        try:
            a.materialize()
        except uf.SourceError:
            ctx[3] = 0
        a.materialize()
        assert a.resident.all() and same(a)
        source, ctx = native(9, 10, times=5)
        b = uf.lazy_array(source, on_error="retry")
        b.materialize()
        assert ctx[6] == 5 and same(b)
        print("good")
        """)
    )


# -- the interpreter's end ----------------------------------------------------------------------------------

ENDS = {
    "the last line": "",
    "sys.exit": "sys.exit(0)",
    "sys.exit in a thread": "t = threading.Thread(target=sys.exit, args=(3,)); t.start(); t.join()",
    "an atexit handler that touches": "atexit.register(lambda: print(same(a), flush=True))",
    "os._exit": "os._exit(0)",
    "in a cycle": "knot = [a]; knot.append(knot); del a",
    "in a module": "sys.modules['kept'] = a; builtins.kept = a",
    "as an atexit handler's argument": "atexit.register(np.sum, a)",
    "a __del__ that touches": """
class Late:
    def __del__(self, a=a, right=int(data[20 * PAGE])):
        os.write(1, b"True\\n" if a[20 * PAGE] == right else b"False\\n")
late = builtins.late = Late()
""",
    "a thread that is not a daemon": """
threading.Thread(target=lambda: (time.sleep(0.1), print(same(a), flush=True))).start()
""",
}


@writes
@pytest.mark.parametrize("mode", ["r", "c", "r+"])
@pytest.mark.parametrize("end", ENDS)
def test_the_interpreter_ends_with_an_array(run: Run, end: str, mode: str) -> None:
    done = run(
        "import atexit, builtins\na = uf.lazy_array(written(), mode=MODE)\n"
        "right = data.copy()\nassert a[5 * PAGE] == data[5 * PAGE]\n"
        "if MODE != 'r': a[6 * PAGE] = data[6 * PAGE] = 7\n" + ENDS[end],
        MODE=mode,
    )
    assert done.returncode == 0, (done.returncode, done.stderr)
    assert done.stderr == ""
    assert done.stdout in ("", "True\n")
    assert ("touches" in end or "daemon" in end) == bool(done.stdout)


@writes
@pytest.mark.parametrize("end", ENDS)
def test_the_interpreters_end_writes_back(run: Run, tmp_path: Path, end: str) -> None:
    """All that was changed; but for os._exit, which ends at once."""
    run(
        "import atexit, builtins\na = uf.lazy_array(written(), mode='r+')\n"
        "a[5 * PAGE: 6 * PAGE] = 0; a[-1] = 0\n" + ENDS[end]
    )
    content = (tmp_path / "data").read_bytes()
    assert len(content) == 64 * 4096
    assert content.count(0) == (0 if end == "os._exit" else 4096 + 1)


@pytest.mark.parametrize("how", ["", "sys.exit(0)", "raise SystemExit", "os._exit(0)", "1 / 0"])
@pytest.mark.parametrize("kind", ["File", "Native", "limited"])
def test_daemon_threads_touch_until_the_end(run: Run, kind: str, how: str) -> None:
    """They are served, or gone. Of what they see every byte is right."""
    done = run(
        """
        source = native(ns=100_000)[0] if KIND == "Native" else uf.sources.Pattern(4)
        if KIND == "File":
            written()
            source = uf.sources.File(FILE)
        size = N * PAGE if KIND != "limited" else 16 << 20
        right = data if KIND != "limited" else source.expected(0, size)
        a = uf.lazy_array(source, size, memory_limit=1 << 20)
        def look(a, right, seed, begun):
            rng = np.random.default_rng(seed)
            while True:
                page = int(rng.integers(0, len(a) // PAGE)) * PAGE
                part = slice(page, page + PAGE)
                if a[page + 1] != right[page + 1] or not (a[part] == right[part]).all():
                    os.write(1, b"wrong\\n")
                if page % (4 * PAGE) == 0:
                    a.evict(slice(page, page + 4 * PAGE))
                begun.set()
        for seed in range(4):
            begun = threading.Event()
            threading.Thread(target=look, args=(a, right, seed, begun), daemon=True).start()
            begun.wait()
        """
        + how,
        KIND=kind,
    )
    assert done.stdout == "", (done.returncode, done.stderr)
    assert done.returncode == (1 if how == "1 / 0" else 0), (done.returncode, done.stderr)
    assert ("ZeroDivisionError" in done.stderr) if how == "1 / 0" else done.stderr == ""


# -- forks --------------------------------------------------------------------------------------------------


@writes
@pytest.mark.parametrize("mode", ["r", "c", "r+"])
def test_a_fork_child_does_not_have_it(run: Run, mode: str) -> None:
    """Neither the pages that were there nor the others. Its parent's array is unharmed."""
    said = good(
        run(
            """
            a = uf.lazy_array(written(), mode=MODE)
            a[:3 * PAGE].sum()
            if MODE != "r":
                a[:10] = data[:10] = 1
            def refused():
                view, calls = a[PAGE:], 0
                for call in (a.stats, a.materialize, a.prefetch, a.evict, a.flush, view.stats, view.evict,
                             lambda: a.resident, lambda: a.dirty, lambda: __import__("pickle").dumps(view),
                             lambda: a.prefetch(3, progress=print)):
                    try:
                        call()
                    except uf.ForkedError as error:
                        assert "fork child" in str(error)
                        calls += 1
                a.close()
                with a:
                    pass
                repr(a), a.shape, a.mode
                return calls == 11
            def opens_its_own():
                b = uf.lazy_array(FILE, mode=MODE)
                return MODE == "c" or same(b, 1)
            for action in (lambda: a[0], lambda: a[9 * PAGE], lambda: a[3 * PAGE:].sum(), a.tobytes):
                pid = fork(action)
                status = os.waitpid(pid, 0)[1]
                assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGSEGV, (action, status)
            for action in (refused, opens_its_own):
                assert ended_well(fork(action))
            read, write = os.pipe()
            pid = os.fork()
            if pid == 0:
                try:
                    os.write(write, a[5 * PAGE:6 * PAGE])
                except OSError as error:
                    os._exit(error.errno)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == errno.EFAULT
            assert same(a)
            if MODE == "r+":
                a[20] = data[20] = 2
                a.close()
                assert open(FILE, "rb").read() == data.tobytes()
            print("good", flush=True)
            os._exit(0)
            """,
            MODE=mode,
        )
    )
    assert said == ""


@writes
@pytest.mark.parametrize("end", ["sys.exit(0)", "del a; gc.collect(); sys.exit(0)", "a.close(); sys.exit(0)"])
def test_a_fork_child_that_ends_writes_nothing_back(run: Run, end: str) -> None:
    """Nor does it end what its parent's array is served by."""
    said = good(
        run(
            """
            a = uf.lazy_array(written(), mode="r+", memory_limit=1 << 20)
            a[:10] = 0
            threads = len(os.listdir("/proc/self/task"))
            pid = os.fork()
            if pid == 0:
                exec(END)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
            assert open(FILE, "rb").read() == data.tobytes()
            assert a.dirty[0] and same(a, 1)
            a.flush()
            assert len(os.listdir("/proc/self/task")) == threads
            data[:10] = 0
            assert open(FILE, "rb").read() == data.tobytes()
            print("good", flush=True)
            """,
            END=end,
        )
    )
    assert said == ""


def test_a_childs_child_and_its_own_array(run: Run) -> None:
    """Each process's arrays are its own, however deep."""
    good(
        run("""
        a = uf.lazy_array(uf.sources.Buffer(data))
        def descend(depth):
            mine = uf.lazy_array(uf.sources.Buffer(data), readahead=0)
            if not same(mine, 0, 5) or (depth and not ended_well(fork(lambda: descend(depth - 1)))):
                return False
            return same(mine)
        assert descend(3) and same(a)
        print("good")
        """)
    )


def test_a_fork_while_somebody_makes_an_array(run: Run) -> None:
    """The lock under which that is done may be taken; a child has a new one."""
    good(
        run("""
        going = True
        def make():
            while going:
                uf.lazy_array(uf.sources.Buffer(data), PAGE)[0]
        thread = threading.Thread(target=make)
        thread.start()
        for _ in range(30):
            assert ended_well(fork(lambda: same(uf.lazy_array(uf.sources.Buffer(data)))))
        going = False
        thread.join()
        print("good")
        """)
    )


# -- closed, and let go of ----------------------------------------------------------------------------------


@writes
@pytest.mark.parametrize("mode", ["r", "c", "r+"])
@pytest.mark.parametrize("how", ["a.close()", "view.close()", "a.__exit__(None, None, None)"])
def test_a_missing_page_after_closing(run: Run, mode: str, how: str) -> None:
    """What is there stays, with what it held."""
    done = run(
        """
        a = uf.lazy_array(written(), mode=MODE, readahead=0)
        view = a[PAGE:]
        assert same(a, 0, 3)
        if MODE != "r":
            a[2 * PAGE:2 * PAGE + 5] = data[2 * PAGE:2 * PAGE + 5] = 1
        exec(HOW)
        assert same(a, 0, 3) and (view[:2 * PAGE] == data[PAGE:3 * PAGE]).all()
        if MODE != "r":
            a[PAGE] = 9  # no more than memory now
            assert a[PAGE] == 9
        assert by_system_call(a, 5) == errno.EFAULT
        if MODE != "c":
            assert open(FILE, "rb").read() == data.tobytes()
        print("before", flush=True)
        print("still here", view[8 * PAGE], flush=True)
        """,
        MODE=mode,
        HOW=how,
    )
    died(done)


@writes
def test_a_write_to_a_missing_page_after_closing(run: Run) -> None:
    died(
        run("""
        a = uf.lazy_array(written(), mode="c")
        a.close()
        print("before", flush=True)
        a[8 * PAGE] = 1
        print("still here", a[8 * PAGE + 1], flush=True)
        """)
    )


@writes
@pytest.mark.parametrize("end", ["a.flush(False)", "a.close()", "a = None", "a.__reduce_ex__(5)"])
@pytest.mark.parametrize("read", [True, False], ids=["after a read", "unread"])
def test_a_change_as_soon_as_its_page_is_there(run: Run, end: str, read: bool) -> None:
    """It is written back, though who brought the page may not have noted yet that it is there."""
    good(
        run(
            """
            a, lost = None, 0
            source = native()[0]
            for number in range(3000):
                if a is None or a.closed:
                    a = uf.lazy_array(source, mode="r+", readahead=0)
                page, before = number % N, int(data[number % N * PAGE])
                assert not READ or a[page * PAGE] == before
                a[page * PAGE] = before ^ 255
                exec(END)
                lost += data[page * PAGE] != before ^ 255
                if a is not None and page == N - 1:
                    a.close()
            assert lost == 0, lost
            print("good")
            """,
            END=end,
            READ=read,
        )
    )


def test_closing_one_leaves_the_others(run: Run) -> None:
    said = good(
        run("""
        budget = uf.Budget(1 << 20)
        a, b, c = (uf.lazy_array(uf.sources.Buffer(data), memory_limit=budget) for _ in range(3))
        assert same(a) and same(b, 0, 10)
        a.close()
        assert same(b)
        b.close()
        del b
        gc.collect()
        assert same(c)
        deadline = time.monotonic() + 10  # a thread is awake a moment before its page is counted
        while budget.used != N * PAGE and time.monotonic() < deadline:
            time.sleep(0.001)
        assert budget.used == N * PAGE, budget
        print("good")
        """)
    )
    assert said == ""


def test_closing_while_threads_sleep_in_its_pages(run: Run) -> None:
    """They die of it rather than sleep for ever, or read what is not so."""
    done = run("""
        source, ctx = native(ns=300_000_000)
        a = uf.lazy_array(source, readahead=0)
        print("before", flush=True)
        def touch(page):
            if a[page * PAGE] != data[page * PAGE]:
                print("still here", flush=True)
        plain = a.view(np.ndarray)
        threads = [threading.Thread(target=uf.touch, args=(plain, np.array([i * PAGE], np.uint64)))
                   for i in range(3)]
        for thread in threads:
            thread.start()
        time.sleep(0.1)
        a.close()
        for thread in threads:
            thread.join()
        touch(40)
        """)
    died(done)


@pytest.mark.parametrize("how", ["del a", "a.close()", "del a, view"])
def test_let_go_of_while_it_is_brought(run: Run, how: str) -> None:
    """By a thread that has a view; which is told, or gets all of it."""
    said = good(
        run(
            """
            for ms in range(0, 60, 6):
                a = uf.lazy_array(native(ns=1_000_000)[0], readahead=0)
                view, result, begun = a[5:], [], threading.Event()
                def bring(view):
                    begun.set()
                    try:
                        view.prefetch(progress=lambda *_: None)
                    except uf.ClosedError:
                        result.append("closed")
                    else:
                        result.append(bool((view == data[5:]).all()))
                thread = threading.Thread(target=bring, args=(view,))
                thread.start()
                begun.wait()
                time.sleep(ms / 1000)
                exec(HOW)
                thread.join()
                assert result == [True] or (result == ["closed"] and HOW == "a.close()"), result
                a = view = None
            gc.collect()
            table = uf.lazy_array(uf.sources.Zero(), 1)._lazy()._service._userfaultfd.regions
            assert len(table) == 0, len(table)
            print("good")
            """,
            HOW=how,
        )
    )
    assert said == ""


# -- no memory ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shimmed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    """Children whose ioctl(2) is that of native/shim.c."""
    library = tmp_path_factory.mktemp("native") / "shim.so"
    source = Path(__file__).parent / "native/shim.c"
    command = ["cc", "-O1", "-shared", "-fPIC", "-pthread", "-o", library, source]
    subprocess.run(command, check=True, timeout=300)
    with pytest.MonkeyPatch.context() as patch:
        # Behind a sanitizer, which must come first.
        patch.setenv("LD_PRELOAD", f"{os.environ.get('LD_PRELOAD', '')} {library}".strip())
        opened = Nursery()
    with opened:
        yield opened


@pytest.mark.parametrize(
    "make",
    [
        "uf.lazy_array(uf.sources.Buffer(data))",
        "uf.lazy_array(uf.sources.Buffer(data), readahead=0, memory_limit=1 << 20)",
        pytest.param("uf.lazy_array(uf.sources.Buffer(data.copy()), mode='r+')", marks=writes),
        pytest.param("uf.lazy_array(uf.sources.Buffer(data), mode='c', on_error='retry')", marks=writes),
        "uf.lazy_array(uf.sources.Native(SHIM.shim_source, data, data.nbytes), page_bytes=4 * PAGE)",
    ],
    ids=["Buffer", "with a limit", "mode r+", "mode c", "Native"],
)
def test_no_memory_for_a_page(shimmed: Nursery, make: str) -> None:
    """Its thread sleeps until there is some; nothing is poisoned, and nothing reads as zeros."""
    in_a_child(
        lambda text: shimmed.run(text),
        SHIMMED
        + dedent("""
        a = eval(make)
        hits = fail("COPY", RECORDED["COPY", "no memory"])
        touchers = [Toucher(a._lazy()._region, page) for page in (3, 9, 40)]
        until(lambda: hits() > 20)
        assert all(toucher.is_alive() and toucher.got is None for toucher in touchers)
        stop()
        assert [toucher.result() for toucher in touchers] == [page_of(data, page) for page in (3, 9, 40)]
        assert (a == data).all()
        assert a.stats()["parked"] > 0 and a.stats()["failed"] == 0
        """),
        make=make,
    )


@pytest.mark.parametrize("source", ["Buffer(data)", "Native(SHIM.shim_source, data, data.nbytes)"])
@pytest.mark.parametrize("n", [1, 3])
def test_who_waits_for_memory_does_not_spin(shimmed: Nursery, source: str, n: int) -> None:
    """Also what the workers bring is tried once a millisecond."""
    in_a_child(
        lambda text: shimmed.run(text),
        SHIMMED
        + dedent("""
        a = uf.lazy_array(eval("uf.sources." + source), readahead=0)
        hits = fail("COPY", RECORDED["COPY", "no memory"])
        touchers = [Toucher(a._lazy()._region, page) for page in (3, 9, 40)[:n]]
        until(lambda: hits() > 20)
        at_most(hits, n)
        stop()
        assert [toucher.result() for toucher in touchers] == [page_of(data, page) for page in (3, 9, 40)[:n]]
        """),
        source=source,
        n=n,
    )


def test_no_memory_for_prefetch(shimmed: Nursery) -> None:
    """For a moment: it comes. For ten seconds: an error says so, and a touch waits on."""
    in_a_child(
        lambda text: shimmed.run(text),
        SHIMMED
        + dedent("""
        import userfault.backing
        userfault.backing._STALLED_SECONDS = 0.2
        a = uf.lazy_array(uf.sources.Buffer(data))
        hits = fail("COPY", RECORDED["COPY", "no memory"], times=5)
        a.materialize()
        assert hits() == 5 and (a == data).all()
        b = uf.lazy_array(uf.sources.Buffer(data))
        fail("COPY", RECORDED["COPY", "no memory"])
        try:
            b.materialize()
        except uf.UffdError as error:
            assert error.errno == ENOMEM and "could not be brought" in str(error), error
        else:
            raise AssertionError("no UffdError")
        toucher = Toucher(b._lazy()._region, 3)
        toucher.join(0.1)
        assert toucher.is_alive()
        stop()
        assert toucher.result() == page_of(data, 3) and (b == data).all()
        """),
    )


@pytest.mark.parametrize("call", ["COPY", "ZEROPAGE"])
def test_no_memory_for_zeros(shimmed: Nursery, call: str) -> None:
    """Also those wait: of them a writable array's are copied, to come protected."""
    in_a_child(
        lambda text: shimmed.run(text),
        SHIMMED
        + dedent("""
        a = uf.lazy_array(uf.sources.Zero(), 64 * PAGE, mode="c" if call == "COPY" else "r")
        hits = fail(call, RECORDED["COPY", "no memory"])
        toucher = Toucher(a._lazy()._region, 3)
        until(lambda: hits() > 5)
        assert toucher.is_alive()
        stop()
        assert toucher.result() == bytes(PAGE) and not a.any()
        """),
        call=call,
    )


@pytest.mark.skipif(
    os.geteuid() != 0 and os.environ.get("CI") != "true", reason="locking so much needs CAP_IPC_LOCK"
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_locked_memory_is_no_memory_of_zeros(run: Run, when: str) -> None:
    """mlockall(MCL_FUTURE) has new mappings filled at once: with zeros, if they are not registered yet."""
    good(
        run(
            """
            lock = lambda: ctypes.CDLL(None).mlockall(2)
            assert WHEN == "after" or lock() == 0
            a = uf.lazy_array(uf.sources.Buffer(data), mode="c", memory_limit=1 << 20)
            with uf.Userfaultfd() as u, uf.FaultService(u) as service:
                region = u.map(data.nbytes)
                service.serve(region, uf.sources.Buffer(data))
                assert WHEN == "before" or lock() == 0
                assert (a == data).all() and (region.array == data).all()
            print("good")
            """,
            WHEN=when,
        )
    )
