"""No page of a lazy array needs the GIL to come: whoever touches it may hold it.

Each way of touching runs in a process of its own, over an array of which no page is there, and is compared.
"""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent

import pytest

import lazies
import userfault as uf
from support import Child, needs

pytestmark = pytest.mark.usefixtures("needs_privilege")

SET_UP = """
import faulthandler, hashlib, pickle, weakref, zlib

expected = np.zeros_like(data) if KIND == "Zero" else data
order = np.random.default_rng(1).permutation(N)

def source():
    if KIND == "Zero":
        return uf.sources.Zero()
    if KIND == "Buffer":
        return uf.sources.Buffer(data)
    if KIND == "Native":
        return native(ns=1_000_000)[0]
    file = os.open(written(), os.O_RDONLY)
    if KIND == "cold":
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)
    return uf.sources.File(FILE)

def lazy(mode="r", **options):
    array = uf.lazy_array(source(), N * PAGE, mode=mode, **options)
    assert not array.resident.any()
    return array

def right(array, pages):
    "Element by element, each a touch with the GIL held."
    return all(array[page * PAGE + 7] == expected[page * PAGE + 7] for page in pages)
"""

TOUCHES = {
    "an element": """
        a = lazy()
        assert right(a, range(N))
        """,
    "elements at random, no read-ahead": """
        a = lazy(readahead=0)
        assert right(a, order)
        """,
    "item and iteration": """
        assert lazy()[:: PAGE // 3].tolist() == expected[:: PAGE // 3].tolist()
        assert [int(x) for x in lazy()[::1000]] == expected[::1000].tolist()
        assert lazy().item(5 * PAGE) == expected[5 * PAGE]
        """,
    "ufuncs": """
        assert (np.sqrt(lazy()) == np.sqrt(expected)).all()
        a, b = lazy(), lazy()
        assert (a.view("<u4") * 3 + b.view("<u4")[::-1] == expected.view("<u4") * 3
                + expected.view("<u4")[::-1]).all()
        """,
    "small ufuncs": """
        # Too few elements for numpy to let go of the GIL.
        a = lazy()
        for page in order:
            part = slice(page * PAGE, page * PAGE + 4)
            assert (a[part] + 1 == expected[part] + 1).all()
        """,
    "reductions": """
        for reduce in (np.sum, np.max, np.median, np.count_nonzero, np.argmin):
            assert reduce(lazy()) == reduce(expected)
        """,
    "reductions in 8 threads": """
        a = lazy()
        pieces = [slice(i * N // 8 * PAGE, (i + 1) * N // 8 * PAGE) for i in range(8)]
        together(*(lambda p=p: a[p].sum() == expected[p].sum() for p in pieces))
        b = lazy()
        together(*[lambda: b.sum() == expected.sum()] * 8)
        """,
    "bytes": """
        assert bytes(lazy()) == lazy().tobytes() == bytearray(lazy()) == expected.tobytes()
        """,
    "tofile": """
        lazy().tofile(FILE + ".copy")
        assert (np.fromfile(FILE + ".copy", np.uint8) == expected).all()
        """,
    "os.write": """
        a = lazy()
        file = os.open(FILE + ".copy", os.O_CREAT | os.O_WRONLY)
        for page in range(0, N, 4):
            assert os.pwrite(file, a[page * PAGE:(page + 4) * PAGE], page * PAGE) == 4 * PAGE
        assert (np.fromfile(FILE + ".copy", np.uint8) == expected).all()
        """,
    "a socket": """
        import socket
        ours, theirs = socket.socketpair()
        got = bytearray()
        def receive():
            while len(got) < N * PAGE:
                got.extend(theirs.recv(1 << 16))
            return True
        a = lazy()
        together(receive, lambda: ours.sendall(a) is None)
        assert bytes(got) == expected.tobytes()
        """,
    "readinto": """
        # The kernel writes to pages that are missing.
        content = np.arange(N * PAGE, dtype="<u4").view(np.uint8)[: 40 * PAGE - 100]
        content.tofile(FILE + ".other")
        a = lazy("c")
        with open(FILE + ".other", "rb", buffering=0) as file:
            assert file.readinto(a[50:]) == len(content)
        right = expected.copy()
        right[50:][: len(content)] = content
        assert (a == right).all()
        """,
    "memoryview": """
        view = memoryview(lazy())
        for page in order:
            assert view[page * PAGE:(page + 1) * PAGE - 5] == expected[page * PAGE:(page + 1) * PAGE - 5].data
        assert memoryview(lazy()).tobytes() == expected.tobytes()
        assert memoryview(lazy())[3 * PAGE] == expected[3 * PAGE]
        """,
    "hashes": """
        # These let go of the GIL.
        assert hashlib.sha256(lazy()).digest() == hashlib.sha256(expected).digest()
        assert zlib.crc32(lazy()) == zlib.crc32(expected)
        """,
    "a copy that is pickled": """
        assert (pickle.loads(pickle.dumps(np.array(lazy()))) == expected).all()
        assert pickle.dumps(lazy().view(np.ndarray)) == pickle.dumps(expected)
        """,
    "sort in place": """
        a = lazy("c").view("<u4")
        a.sort()
        assert (a == np.sort(expected.view("<u4"))).all()
        """,
    "writes at random": """
        a, right = lazy("c", readahead=0), expected.copy()
        for page in order:
            a[page * PAGE + 9] = right[page * PAGE + 9] = page
        assert (a == right).all()
        """,
    "writes in 8 threads": """
        a, right = lazy("c"), expected + 1
        def write(part):
            a[part::8] += 1
            return True
        together(*(lambda i=i: write(i) for i in range(8)))
        assert (a == right).all()
        """,
    "fancy indexing": """
        index = np.random.default_rng(2).integers(0, N * PAGE, 5000)
        assert (lazy()[index] == expected[index]).all()
        assert (lazy()[expected > 100] == expected[expected > 100]).all()
        assert (np.take(lazy(), index) == expected[index]).all()
        a = lazy("c")
        a[index] = 0
        assert not a[index].any() and a.sum() == expected.sum() - expected[np.unique(index)].sum()
        """,
    "a signal handler": """
        a, b, done, pages = lazy(readahead=0), lazy(readahead=0), [], iter(order)
        def handle(*_):
            for page in pages:
                done.append(right(a, [page]))
                break
        signal.signal(signal.SIGALRM, handle)
        signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
        while len(done) < N:
            assert right(b, range(N))
            b.evict()
        signal.setitimer(signal.ITIMER_REAL, 0)
        assert done == [True] * N and (a == expected).all()
        """,
    "tracebacks of all threads": """
        # Of running threads CPython's watchdog must make none: see test_tracebacks_of_who_sleeps_in_a_fault.
        a, output = lazy(readahead=0), open(FILE + ".dump", "w+")
        faulthandler.enable(output)
        def dump():
            while a.resident.sum() < N:
                faulthandler.dump_traceback(output)
                sys._current_frames()
            return True
        together(dump, *(lambda i=i: right(a, order[i::4]) for i in range(4)))
        faulthandler.disable()
        assert (a == expected).all()
        """,
    "__del__ in gc": """
        a, done = lazy(readahead=0), []
        class Knot:
            def __init__(self, page):
                self.page, self.me = page, self
            def __del__(self):
                done.append(right(a, [self.page]))
        gc.disable()
        for page in order:
            Knot(page)
        assert not a.resident.any()
        gc.collect()
        assert done == [True] * N
        """,
    "a weakref's callback": """
        a, done = lazy(readahead=0), []
        class Thing:
            pass
        things = [Thing() for _ in order]
        refs = [weakref.ref(thing, lambda _, page=page: done.append(right(a, [page])))
                for thing, page in zip(things, order)]
        things[0].others = things  # in a cycle, which the collector finds
        del things
        gc.collect()
        assert done == [True] * N
        """,
    "forks in another thread": """
        a = lazy(readahead=0)
        def forks():
            for _ in range(20):
                pid = os.fork()
                if pid == 0:
                    os._exit(0)
                if os.waitpid(pid, 0)[1] != 0:
                    return False
            return True
        together(forks, *(lambda i=i: right(a, order[i::2]) for i in range(2)))
        assert (a == expected).all()
        """,
    "subprocesses in another thread": """
        a = lazy(readahead=0)
        thread = threading.Thread(target=lambda: done.append(right(a, order)))
        done = []
        thread.start()
        for options in ({}, {"preexec_fn": lambda: None}, {"start_new_session": True}, {"close_fds": False}):
            assert subprocess.run(["echo", "x"], capture_output=True, check=True, **options).stdout == b"x\\n"
        thread.join()
        assert done == [True] and (a == expected).all()
        """,
    "a tiny switch interval": """
        sys.setswitchinterval(1e-6)
        a, going = lazy(readahead=0), True
        def spin():
            n = 0
            while going:
                n += 1
            return True
        def touch(i):
            global going
            good = right(a, order[i::4]) and (a[i::4] == expected[i::4]).all()
            going = going and a.resident.sum() < N
            return bool(good)
        together(spin, spin, *(lambda i=i: touch(i) for i in range(4)))
        """,
    "arrays that come and go": """
        # Their last view dies in one thread while others touch, evict and prefetch.
        a = lazy(readahead=0)
        def make():
            parts = [slice(page * PAGE + 3, page * PAGE + 12) for page in order[:20]]
            return all((uf.lazy_array(source(), N * PAGE)[part] == expected[part]).all() for part in parts)
        def evict():
            for page in order:
                a.evict(slice(page * PAGE, (page + 3) * PAGE))
                a.prefetch(slice(page * PAGE, page * PAGE + 1))
            return True
        together(make, evict, *(lambda i=i: right(a, order[i::2]) for i in range(2)))
        assert (a == expected).all()
        """,
    "a callback of C": """
        # qsort(3) calls back to Python, which touches, with a frame of C between.
        a, pages = lazy(readahead=0), (ctypes.c_int * N)(*order.tolist())
        compare = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_int), ctypes.POINTER(ctypes.c_int))
        def key(page):
            assert right(a, [page])
            return page
        ctypes.CDLL(None).qsort(pages, N, 4, compare(lambda x, y: key(x[0]) - key(y[0])))
        assert list(pages) == list(range(N))
        # And PyDLL, which holds the GIL while it reads.
        b = lazy()
        ctypes.pythonapi.PyBytes_FromStringAndSize.restype = ctypes.py_object
        copied = ctypes.pythonapi.PyBytes_FromStringAndSize(ctypes.c_void_p(b.ctypes.data),
                                                            ctypes.c_ssize_t(N * PAGE))
        assert copied == expected.tobytes()
        """,
}
WRITES = ("readinto", "sort in place", "writes at random", "writes in 8 threads", "fancy indexing")
KINDS = ("Zero", "Buffer", "File", "cold", "Native")


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lazies.built(tmp_path_factory.mktemp("native"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "touch",
    [
        pytest.param(name, marks=needs(uf.Feature.PAGEFAULT_FLAG_WP) if name in WRITES else ())
        for name in TOUCHES
    ],
)
def test_a_touch(child: Child, library: Path, tmp_path: Path, touch: str, kind: str) -> None:
    code = SET_UP + dedent(TOUCHES[touch]) + "print('good')"
    done = lazies.run(child, code, library, tmp_path / "data", KIND=kind)
    assert (done.stdout, done.stderr) == ("good\n", ""), done.returncode


def test_tracebacks_of_who_sleeps_in_a_fault(child: Child, library: Path, tmp_path: Path) -> None:
    """By faulthandler's watchdog, and by its signal handler in the thread that sleeps, and holds the GIL."""
    done = lazies.run(
        child,
        """
        import faulthandler
        a, output = uf.lazy_array(native(ns=300_000_000)[0], readahead=0), open(FILE + ".dump", "w+")
        def touch():
            return a[9 * PAGE]
        faulthandler.enable(output)
        faulthandler.register(signal.SIGALRM, output)
        faulthandler.dump_traceback_later(0.1, file=output)
        threading.Thread(target=lambda: by_system_call(a, 3)).start()
        signal.setitimer(signal.ITIMER_REAL, 0.05, 0.1)
        got = touch()
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        assert got == data[9 * PAGE]
        text = open(FILE + ".dump").read()
        assert "Timeout (" in text and text.count("in touch") >= 2, text
        assert text.count("in by_system_call") >= 2, text
        print("good")
        """,
        library,
        tmp_path / "data",
    )
    assert (done.stdout, done.stderr) == ("good\n", ""), done.returncode


# -- where only user-mode faults are delivered -------------------------------------------------------------

# A process that may open no other userfaultfd, as that of an ordinary user. setresuid(2) also makes its
# /proc/self another's (PR_SET_DUMPABLE), which it is not for such a user.
ORDINARY = """
import warnings
os.umask(0)
written()
array_of = {"File": uf.sources.File(FILE), "Buffer": uf.sources.Buffer(data), "Native": native()[0]}
copy = os.open(FILE + ".copy", os.O_CREAT | os.O_RDWR)
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE
if not uf.probe().user_mode_only:
    print("privileged")
    sys.exit()
"""


@pytest.mark.parametrize("kind", ["File", "Buffer", "Native"])
def test_user_mode_only(child: Child, library: Path, tmp_path: Path, kind: str) -> None:
    """A touch works; a system call fails with EFAULT until the page is there."""
    code = (
        ORDINARY
        + """
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    a = uf.lazy_array(array_of[KIND], readahead=0)
(warning,) = caught
assert warning.category is RuntimeWarning and warning.filename == "<child>", warning
for word in ("EFAULT", "prefetch", "materialize", "/dev/userfaultfd"):
    assert word in str(warning.message), warning
assert a[3 * PAGE] == data[3 * PAGE] and same(a, 8, 10)
assert by_system_call(a, 3) == data[3 * PAGE:4 * PAGE].tobytes()
assert by_system_call(a, 5) == errno.EFAULT
for part, works in ((a, False), (a[8 * PAGE:10 * PAGE], True), (a[9 * PAGE:11 * PAGE], False)):
    os.ftruncate(copy, 0)
    os.lseek(copy, 0, os.SEEK_SET)
    with open(copy, "wb", closefd=False) as file:
        try:
            part.tofile(file)
            assert works and os.pread(copy, 9 * PAGE, 0) == part.tobytes()
        except uf.UnsupportedError as error:
            assert not works and error.errno == errno.EFAULT and "materialize()" in str(error), error
a.prefetch(slice(5 * PAGE, 6 * PAGE))
assert by_system_call(a, 5) == data[5 * PAGE:6 * PAGE].tobytes()
a.materialize()
assert all(by_system_call(a, page) == data[page * PAGE:(page + 1) * PAGE].tobytes() for page in range(N))
with open(copy, "wb", closefd=False) as file:
    a.tofile(file)
assert os.pread(copy, N * PAGE, 0) == data.tobytes()
np.array(a).tofile(os.devnull)
print("good")
"""
    )
    done = lazies.run(child, code, library, tmp_path / "data", KIND=kind)
    if done.stdout == "privileged\n":
        pytest.skip("an ordinary user may open a userfaultfd with privilege here")
    assert (done.stdout, done.stderr) == ("good\n", ""), done.returncode
