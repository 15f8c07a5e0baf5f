"""Lazy arrays that are written to: changes are private in mode "c", and go to the source in mode "r+"."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import userfault as uf
from children import run_storm
from support import Child

PAGE = uf.PAGE_SIZE
N = 64
STORM_SECONDS = 6

pytestmark = pytest.mark.usefixtures("needs_privilege")

# A source in memory whose calls can be made slow, or to fail. ctx: its fields, in this order, uint64 each.
NATIVE = """
#include <errno.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>
struct state {
    char *data; uint64_t fills, writes, written, fill_answer, write_answer, fill_us, write_us, second_us;
    uint64_t failing_from;
};
int fill(void *ctx, uint64_t offset, void *dst, size_t length)
{
    struct state *s = ctx;
    uint64_t number = __atomic_add_fetch(&s->fills, 1, __ATOMIC_SEQ_CST);
    if (number == 2 && s->second_us) { usleep(s->second_us); return -EIO; }
    usleep(s->fill_us);
    if (s->failing_from && offset + length > s->failing_from) return -EIO;
    memcpy(dst, s->data + offset, length);
    return (int)s->fill_answer;
}
int put(void *ctx, uint64_t offset, const void *src, size_t length)
{
    struct state *s = ctx;
    __atomic_add_fetch(&s->writes, 1, __ATOMIC_SEQ_CST);
    usleep(s->write_us);
    if (s->write_answer) return (int)s->write_answer;
    memcpy(s->data + offset, src, length);
    __atomic_add_fetch(&s->written, length, __ATOMIC_SEQ_CST);
    return 0;
}
"""

# For code in a child: `path`, a file of N pages of `data`; `file()` is what is in it now.
SET_UP = """
import errno, resource
path = {path!r}
N = {n}
data = np.random.default_rng(1).integers(1, 200, N * PAGE, dtype=np.uint8)
with open(path, "wb") as opened:
    opened.write(data.tobytes())

def file():
    return np.fromfile(path, np.uint8)

def written_by(threads):
    threads = [threading.Thread(target=run, args=args) for run, *args in threads]
    for thread in threads:
        thread.start()
    return threads

def store(address, value, length=1):
    # Without the GIL.
    ctypes.memset(address, value, length)

def raises(function, *numbers):
    try:
        function()
    except OSError as error:
        assert error.errno in numbers, error
        return True
    return False

class Native:
    names = ("data", "fills", "writes", "written", "fill_answer", "write_answer", "fill_us", "write_us",
             "second_us", "failing_from")

    def __init__(self, content, **fields):
        library = ctypes.CDLL({library!r})
        self.content = content.copy()
        self.fields = np.zeros(len(self.names), np.uint64)
        self.set(data=self.content.ctypes.data, **fields)
        self.source = uf.sources.Native(library.fill, self.fields, content.nbytes, write=library.put)

    def set(self, **fields):
        for name, value in fields.items():
            self.fields[self.names.index(name)] = value % 2**64

    def get(self, name):
        return int(self.fields[self.names.index(name)])
"""


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    if not shutil.which("cc"):
        pytest.skip("a Native source needs a C compiler")
    folder = tmp_path_factory.mktemp("native")
    (folder / "state.c").write_text(NATIVE)
    line = ["cc", "-shared", "-fPIC", "-o", str(folder / "state.so"), str(folder / "state.c")]
    subprocess.run(line, check=True, timeout=100)
    return str(folder / "state.so")


def run(child: Child, tmp_path: Path, code: str, library: str = "", n: int = N, **names: Any) -> str:
    """Run the code, which must come to its end; what it said on stderr."""
    path = str(tmp_path / "data")
    given = "".join(f"{name} = {value!r}\n" for name, value in names.items())
    set_up = SET_UP.format(path=path, n=n, library=library)
    done = child(set_up + given + textwrap.dedent(code) + '\nprint("good")\n', timeout=40)
    assert done.stdout == "good\n", (done.returncode, done.stdout, done.stderr)
    assert done.returncode == 0, (done.returncode, done.stderr)
    return str(done.stderr)


# -- mode "c" --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("touched", [False, True], ids=["missing", "there"])
@pytest.mark.parametrize("how", ["store", "readv", "readinto"])
def test_a_page_is_dirty_just_when_it_was_written_to(
    child: Child, tmp_path: Path, how: str, touched: bool
) -> None:
    """By eight threads, each with pages of its own, and by the kernel for them."""
    run(
        child,
        tmp_path,
        """
        a = uf.lazy_array(path, mode="c", readahead=8)
        if touched:
            a.sum()
        pages = np.sort(np.random.default_rng(2).permutation(N)[:40])

        def write(mine):
            r, w = os.pipe()
            for page in mine.tolist():
                at = int(page) * PAGE + page % 7
                if how == "store":
                    store(a.ctypes.data + at, 250, 3)
                elif how == "readv":
                    os.write(w, bytes([250] * 3))
                    assert os.readv(r, [memoryview(a)[at:at + 3]]) == 3
                else:
                    with open("/dev/zero", "rb", buffering=0) as zeros:
                        assert zeros.readinto(memoryview(a)[at:at + 3]) == 3

        for thread in written_by((write, pages[k::8]) for k in range(8)):
            thread.join()
        a.sum()  # reading makes nothing dirty
        expected = np.zeros(N, bool)
        expected[pages] = True
        assert (a.dirty == expected).all(), np.flatnonzero(a.dirty != expected)
        assert a.stats()["changed"] == 40, a.stats()["changed"]
        model = data.copy()
        for page in pages:
            model[page * PAGE + page % 7:][:3] = 0 if how == "readinto" else 250
        assert (a == model).all()
        a.flush()
        a.evict()
        assert (a.dirty == expected).all()
        assert (a == model).all()
        a.close()
        assert (file() == data).all()
        """,
        how=how,
        touched=touched,
    )


@pytest.mark.parametrize("limit", [None, 1 << 20])
@pytest.mark.parametrize("kind", ["File", "Buffer", "Native"])
def test_changes_are_private_even_if_the_source_can_be_written_to(
    child: Child, tmp_path: Path, library: str, kind: str, limit: int | None
) -> None:
    run(
        child,
        tmp_path,
        """
        memory = bytearray(data)
        native = Native(data)
        source = {
            "File": lambda: uf.sources.File(path, writable=True),
            "Buffer": lambda: uf.sources.Buffer(memory),
            "Native": lambda: native.source,
        }[kind]()
        a = uf.lazy_array(source, mode="c", memory_limit=limit)
        a[: 8 * PAGE] = 250
        a.sum()  # more than the limit
        a.evict()
        a.flush()
        assert a.dirty.sum() == 8
        assert (a[: 8 * PAGE] == 250).all()
        a.close()
        del a
        assert (file() == data).all()
        assert memory == data.tobytes()
        assert (native.content == data).all() and native.get("writes") == 0
        """,
        library,
        1024 if limit else N,
        kind=kind,
        limit=limit,
    )


# -- mode "r+": what is written, and when ----------------------------------------------------------------


def test_a_flush_writes_the_changed_pages_and_no_others(child: Child, tmp_path: Path) -> None:
    run(
        child,
        tmp_path,
        """
        a = uf.lazy_array(path, mode="r+")
        a.materialize()
        # What is written from outside stays where nothing was changed.
        with open(path, "r+b") as other:
            other.write(bytes(N * PAGE))
        changed = [0, 1, 2, 7, 30, 31, N - 1]
        for page in changed:
            a[page * PAGE + page] = 250
        a.flush()
        assert a.stats()["written"] == len(changed)
        assert not a.dirty.any()
        expected = np.zeros((N, PAGE), np.uint8)
        for page in changed:
            expected[page] = data[page * PAGE:][:PAGE]
            expected[page, page] = 250
        assert (file().reshape(N, PAGE) == expected).all()
        a.flush()
        a.evict()
        assert a.stats()["written"] == len(changed)
        a[5] = 251  # changed again after it was written and let go of
        assert a.dirty.nonzero()[0].tolist() == [0]
        a.flush()
        assert file()[5] == 251 and a.stats()["written"] == len(changed) + 1
        """,
    )


def test_neighbours_are_written_in_one_call(child: Child, tmp_path: Path, library: str) -> None:
    run(
        child,
        tmp_path,
        """
        native = Native(data)
        a = uf.lazy_array(native.source, mode="r+")
        for first, end in ((3, 9), (10, 11), (40, 64)):
            a[first * PAGE:end * PAGE] = 250
        a.flush()
        assert native.get("writes") == 3
        assert native.get("written") == (6 + 1 + 24) * PAGE
        assert (native.content == a).all()
        """,
        library,
    )


@pytest.mark.skipif(not shutil.which("strace"), reason="needs strace")
@pytest.mark.parametrize(("fsync", "expected"), [(True, 1), (False, 0)])
def test_a_flush_is_durable(tmp_path: Path, fsync: bool, expected: int) -> None:
    path = tmp_path / "data"
    path.write_bytes(bytes(8 * PAGE))
    code = f"""
import os, userfault as uf
a = uf.lazy_array({str(path)!r}, mode="r+")
a[0] = 1
a.flush(fsync={fsync})
os._exit(0)
"""
    line = [
        "strace",
        "-f",
        "-e",
        "trace=fdatasync",
        "-o",
        str(tmp_path / "calls"),
        sys.executable,
        "-c",
        code,
    ]
    done = subprocess.run(line, timeout=60, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"strace does not run here: {done.stderr}")
    assert (tmp_path / "calls").read_text().count("fdatasync(") == expected


ENDS = {
    "evict": "a.evict()",
    "flush": "a.flush()",
    "close": "a.close()",
    "with": "exec('with a: pass')",
    "the array dies": "del a",
    "a view dies last": "view = a[3:5]; del a; assert (file() == data).all(); del view",
    "an ndarray dies last": "view = np.asarray(a)[7:]; del a; gc.collect(); assert (file() == data).all(); "
    "del view",
    "a memoryview dies last": "view = memoryview(a)[7:]; del a; gc.collect(); "
    "assert (file() == data).all(); view.release(); del view",
    "close after a view": "view = np.asarray(a)[7:]; a.close()",
}


@pytest.mark.parametrize(
    ("end", "kind"),
    [(end, "File") for end in ENDS]
    + [(end, kind) for end in ("close", "the array dies") for kind in ("Buffer", "Native")],
)
def test_what_writes_back(child: Child, tmp_path: Path, library: str, end: str, kind: str) -> None:
    run(
        child,
        tmp_path,
        f"""
        memory = np.array(data)
        native = Native(data)
        if kind == "Native":
            memory = native.content
        if kind != "File":
            file = lambda: memory
        a = uf.lazy_array({{
            "File": uf.sources.File(path, writable=True),
            "Buffer": uf.sources.Buffer(memory),
            "Native": native.source,
        }}[kind], mode="r+")
        expected = data.copy()
        for page in range(0, N, 3):
            a[page * PAGE + 5] = expected[page * PAGE + 5] = 250
        assert (file() == data).all()
        {ENDS[end]}
        assert (file() == expected).all()
        """,
        library,
        kind=kind,
    )


@pytest.mark.parametrize("how", ["", "sys.exit(0)", "raise SystemExit(0)"])
def test_an_interpreter_that_exits_writes_back(child: Child, tmp_path: Path, how: str) -> None:
    path = tmp_path / "data"
    path.write_bytes(bytes(8 * PAGE))
    done = child(
        f"a = uf.lazy_array({str(path)!r}, mode='r+')\na[3 * PAGE] = 9\nview = np.asarray(a)\n" + how
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert np.flatnonzero(np.fromfile(path, np.uint8)).tolist() == [3 * PAGE]


def test_a_fork_child_does_not_write_back(child: Child, tmp_path: Path) -> None:
    run(
        child,
        tmp_path,
        """
        a = uf.lazy_array(path, mode="r+")
        a[0] = 250
        pid = os.fork()
        if pid == 0:
            for call in (a.flush, a.evict, lambda: a.dirty):
                try:
                    call()
                    os._exit(3)
                except uf.ForkedError:
                    pass
            a.close()
            del a
            gc.collect()
            sys.stdout = open(os.devnull, "w")
            sys.exit(7)  # as any interpreter does
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
        assert (file() == data).all()
        assert a.dirty[0] and a[0] == 250
        a.close()
        assert file()[0] == 250
        """,
    )


def test_sources_that_cannot_be_written_to(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(bytes(PAGE))
    for source in (uf.sources.File(path), uf.sources.Buffer(bytes(PAGE)), uf.sources.Zero()):
        with pytest.raises(uf.SourceError, match="cannot be written to"):
            uf.lazy_array(source, PAGE, mode="r+")
    array = uf.lazy_array(path)
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1


def test_bytes_outside_the_array_are_never_written(child: Child, tmp_path: Path) -> None:
    """Its first and last page hold them; what is written there from outside survives."""
    run(
        child,
        tmp_path,
        """
        first, n = 2 * PAGE + 1000, 5 * PAGE + 17
        for page_bytes in (PAGE, 4 * PAGE):
            a = uf.lazy_array(path, n, offset=first, mode="r+", page_bytes=page_bytes)
            a.materialize()
            a[:] = 250
            with open(path, "r+b") as other:
                other.write(b"A" * first)
                other.seek(first + n)
                other.write(b"Z" * (N * PAGE - first - n))
            a.flush()
            a[:] = 251
            a.evict()
            a[0] = a[-1] = 252
            a.close()
            now = file()
            assert (now[:first] == ord("A")).all() and (now[first + n:] == ord("Z")).all()
            inside = now[first:first + n]
            assert inside[0] == inside[-1] == 252 and (inside[1:-1] == 251).all()
        # A source that ends within a page stays as long as it is.
        os.truncate(path, 3 * PAGE + 10)
        a = uf.lazy_array(path, mode="r+")
        a[-1] = 9
        a.close()
        assert len(file()) == 3 * PAGE + 10 and file()[-1] == 9
        """,
    )


# -- sources that fail -----------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", [-errno.ENOSPC, -errno.EIO, 5])
def test_a_write_that_fails_keeps_the_changes(
    child: Child, tmp_path: Path, library: str, answer: int
) -> None:
    """Any answer but 0 is a failure."""
    said = run(
        child,
        tmp_path,
        """
        native = Native(data, write_answer=answer)
        number = -answer if answer < 0 else errno.EIO
        a = uf.lazy_array(native.source, mode="r+", memory_limit=1 << 20)
        a[: 3 * PAGE] = 250
        for call in (a.flush, a.evict, a.close, a.flush):
            assert raises(call, number)
            assert a.dirty[:3].all() and not a.dirty[3:].any()
            assert (a[: 3 * PAGE] == 250).all()
        assert a.stats()["written"] == 0 and (native.content == data).all()
        a.sum()  # to make room, what is not changed goes
        native.set(write_answer=0)
        a.close()
        assert (native.content[: 3 * PAGE] == 250).all()
        assert (native.content[3 * PAGE:] == data[3 * PAGE:]).all()
        """,
        library,
        1024,
        answer=answer,
    )
    assert "cannot be written back, and stays in memory" in said
    assert os.strerror(-answer if answer < 0 else errno.EIO) in said


def test_a_file_that_may_not_be_written_so_far(child: Child, tmp_path: Path) -> None:
    run(
        child,
        tmp_path,
        """
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        a = uf.lazy_array(path, mode="r+")
        a[:] = 250
        resource.setrlimit(resource.RLIMIT_FSIZE, (10 * PAGE + 5, resource.RLIM_INFINITY))
        assert raises(a.flush, errno.EFBIG)
        assert raises(a.close, errno.EFBIG)
        assert a.dirty.all() and (a == 250).all()
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        a.close()
        assert (file() == 250).all()
        """,
    )


def test_changes_that_are_lost_with_the_last_view_are_told_of(
    child: Child, tmp_path: Path, library: str
) -> None:
    said = run(
        child,
        tmp_path,
        """
        native = Native(data, write_answer=-errno.ENOSPC)
        a = uf.lazy_array(native.source, mode="r+")
        a[0] = 250
        del a
        """,
        library,
    )
    assert "changes are lost: No space left on device" in said


def test_a_page_that_did_not_come_is_not_written_back(child: Child, tmp_path: Path, library: str) -> None:
    """Its neighbours are: it was to be written by a system call, which told its caller."""
    run(
        child,
        tmp_path,
        """
        native = Native(data, failing_from=4 * PAGE)
        for source, stored in (
            (native.source, lambda: native.content),
            (uf.sources.File(path, writable=True), file),
        ):
            a = uf.lazy_array(source, mode="r+", readahead=0)
            a[: 4 * PAGE] = 250
            if stored is file:
                os.truncate(path, 4 * PAGE)
            r, w = os.pipe()
            os.write(w, b"xxx")
            assert raises(lambda: os.readv(r, [memoryview(a)[4 * PAGE:4 * PAGE + 3]]), errno.EFAULT)
            assert a.dirty.nonzero()[0].tolist() == [0, 1, 2, 3], (source, a.dirty.nonzero())
            a.close()
            assert (stored()[: 4 * PAGE] == 250).all()
        """,
        library,
    )


def test_a_page_that_came_although_another_try_failed(child: Child, tmp_path: Path, library: str) -> None:
    """Two threads bring it: one prefetches, a worker serves the fault, fails later, and leaves it alone."""
    run(
        child,
        tmp_path,
        """
        native = Native(data, fill_us=200000, second_us=400000)
        a = uf.lazy_array(native.source, mode="r+", readahead=0)
        thread, = written_by([(a.prefetch, slice(0, PAGE))])
        while native.get("fills") == 0:
            time.sleep(0.001)
        assert a[5] == data[5] and native.get("fills") == 2
        thread.join()
        service = a._backing._service
        deadline = time.monotonic() + 30
        while service.stats()["existing"] == 0 and time.monotonic() < deadline:
            time.sleep(0.001)
        assert service.stats()["existing"]
        a[5] = 250
        assert a.dirty[0]
        native.set(fill_us=0)
        a.evict()
        assert a[5] == 250 and native.content[5] == 250
        """,
        library,
    )


# -- races -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("against", ["flush", "evict", "limit", "resident"])
def test_no_write_is_lost(child: Child, tmp_path: Path, library: str, against: str) -> None:
    """Threads count up bytes of their own in every page, while others write the pages back all the time."""
    run(
        child,
        tmp_path,
        """
        native = Native(np.zeros(N * PAGE, np.uint8), fill_us=10, write_us=50)
        a = uf.lazy_array(native.source, mode="r+", memory_limit=1 << 20 if against == "limit" else None)
        base, until = a.ctypes.data, time.monotonic() + 2
        counted = np.zeros((4, N), np.uint8)
        sys.setswitchinterval(1e-5)

        def count_up(k):
            rng = np.random.default_rng(k)
            while time.monotonic() < until:
                for page in rng.integers(0, N, 50).tolist():
                    at = page * PAGE + k * 8
                    # It may have gone since, and must come back as it was.
                    assert a[at] == counted[k, page], (k, page)
                    counted[k, page] += 1
                    store(base + at, int(counted[k, page]))

        def disturb():
            while time.monotonic() < until:
                if against == "evict":
                    a.evict()
                elif against == "resident":
                    a.evict(slice(0, N * PAGE // 2))
                    a.resident
                else:
                    a.flush()

        failed = []
        threading.excepthook = lambda args: failed.append(args.exc_value)
        for thread in written_by([*[(count_up, k) for k in range(4)], (disturb,), (disturb,)]):
            thread.join()
        assert not failed, failed
        a.flush()
        assert counted.any()
        for k in range(4):
            assert (native.content[k * 8::PAGE] == counted[k]).all()
        assert native.get("writes")
        """,
        library,
        # The one with a limit is of more pages than that.
        512 if against == "limit" else N,
        against=against,
    )


def test_a_flush_after_the_first_write(child: Child, tmp_path: Path) -> None:
    """A page that just came may not have been noted as being there when its writer goes on, and flushes."""
    run(
        child,
        tmp_path,
        """
        memory = np.zeros(N * PAGE, np.uint8)
        a = uf.lazy_array(uf.sources.Buffer(memory), mode="r+", readahead=0)
        for page in range(N):
            a[page * PAGE] = 1
            a.flush()
            assert memory[page * PAGE] == 1, page
        """,
        n=4096,
    )


def test_looking_what_is_there_while_pages_come(child: Child, tmp_path: Path) -> None:
    """A page that comes while the kernel is asked is not taken for missing, and its changes for nobody's."""
    run(
        child,
        tmp_path,
        """
        for limit in (None, 16 << 20):
            memory = np.zeros(N * PAGE, np.uint8)
            a = uf.lazy_array(uf.sources.Buffer(memory), mode="r+", readahead=0, memory_limit=limit)
            sys.setswitchinterval(1e-5)
            done = []

            def look():
                while not done:
                    a.resident

            threads = written_by([(look,), (look,)])
            for page in np.random.default_rng(3).permutation(N).tolist():
                a[page * PAGE] = 1
            done.append(True)
            for thread in threads:
                thread.join()
            a.flush()
            lost = np.flatnonzero(memory[::PAGE] != 1)
            assert not len(lost), lost
        """,
        n=6144,
    )


def test_locked_memory_stays(child: Child, tmp_path: Path) -> None:
    """madvise(MADV_DONTNEED) refuses what mlock(2) locks: that is not gone, and its changes count."""
    run(
        child,
        tmp_path,
        """
        a = uf.lazy_array(path, mode="r+")
        libc = ctypes.CDLL(None, use_errno=True)
        a.sum()
        assert libc.mlock(ctypes.c_void_p(a.ctypes.data), ctypes.c_size_t(8 * PAGE)) == 0
        a.evict()
        a[0] = 250
        assert a.dirty[0]
        a.flush()
        assert file()[0] == 250
        """,
    )


def test_an_array_ends_while_its_blocks_are_in_somebodys_hands(
    child: Child, tmp_path: Path, library: str
) -> None:
    """Of several arrays, which makes room once another's source has written."""
    run(
        child,
        tmp_path,
        """
        budget = uf.Budget(1 << 20)
        native = Native(data, write_us=200000)
        other = uf.lazy_array(uf.sources.Pattern(), 1 << 19, memory_limit=budget)
        written = uf.lazy_array(native.source, mode="r+", memory_limit=budget)
        more = uf.lazy_array(path, mode="r+", memory_limit=budget)
        for page in range(0, 128, 4):  # in turn
            written[page * PAGE] = 250
            other[page * PAGE]
        written[1 << 19:] = 250
        thread, = written_by([(more.prefetch, slice(0, 1 << 19))])
        while native.get("writes") == 0:
            time.sleep(0.001)
        native.set(write_us=0)
        other.close()
        del other
        thread.join()
        written.close()
        assert (native.content[1 << 19:] == 250).all()
        more.close()
        assert budget.used == 0
        """,
        library,
        256,
    )


def test_a_budget_of_the_parents_is_not_a_fork_childs(child: Child, tmp_path: Path) -> None:
    run(
        child,
        tmp_path,
        """
        budget = uf.Budget(1 << 20)
        a = uf.lazy_array(path, mode="r+", memory_limit=budget)
        a[:] = 250
        def own():
            try:
                uf.lazy_array(uf.sources.Pattern(), 1 << 21, memory_limit=budget)
            except uf.ForkedError:
                b = uf.lazy_array(uf.sources.Pattern(), 1 << 21, memory_limit=1 << 20)
                return (b == uf.sources.Pattern().expected(0, 1 << 21)).all()
        assert ended_well(fork(own))
        assert (file() == data).all()
        a.close()
        assert (file() == 250).all()
        """,
    )


def test_the_storm(tmp_path: Path) -> None:
    """`python tests/lazy_storm.py --help`: as long as you like."""
    script = str(Path(__file__).with_name("lazy_storm.py"))
    told = run_storm([script, "--seed", "7", "--seconds", str(STORM_SECONDS)], tmp_path, STORM_SECONDS + 150)
    assert told["operations"]["reopen"]


def test_a_signal_handler_that_flushes(child: Child) -> None:
    """Whichever lock the interrupted flush holds, the handler's own comes to its end."""
    done = child(
        """
        store = np.zeros(4 * PAGE, np.uint8)
        a = uf.lazy_array(uf.sources.Buffer(store), mode="r+")
        n = 0
        def handler(*_):
            global n
            a[n] += 1
            a.flush()
            n += 1
            signal.setitimer(signal.ITIMER_REAL, 0.0002)  # no handler interrupts another
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 0.0002)
        while n < 500:
            a[PAGE] = 1
            a.flush()
        signal.setitimer(signal.ITIMER_REAL, 0)
        a.close()
        assert (store[:500] == 1).all() and store[PAGE] == 1
        print("good")
        """
    )
    assert done.stdout == "good\n", (done.returncode, done.stderr)
