"""A lazy array of a source in Python: its pager gives every byte right or says why not, whatever happens.

What may hang runs in a process of its own. A pager takes a fifth of a second of the processor to start.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import pytest

import pagers
import userfault as uf
from children import run_storm
from support import Child, needs

pytestmark = pytest.mark.usefixtures("needs_privilege")
writes = needs(uf.Feature.PAGEFAULT_FLAG_WP)

Run = Callable[..., "subprocess.CompletedProcess[str]"]
HERE = Path(__file__).parent


@pytest.fixture
def run(child: Child, tmp_path: Path) -> Run:
    """Run code after `pagers.SET_UP`, with LOG and FILE that are not there yet."""

    def run(code: str, **names: object) -> subprocess.CompletedProcess[str]:
        given = {"TESTS": str(HERE), "LOG": str(tmp_path / "log"), "FILE": str(tmp_path / "file"), **names}
        lines = [f"{name} = {value!r}" for name, value in given.items()]
        return child("\n".join([*lines, pagers.SET_UP, dedent(code)]), timeout=30)

    return run


def good(done: subprocess.CompletedProcess[str]) -> str:
    """It came to its end; what it had to say on stderr."""
    assert done.stdout.endswith("good\n"), (done.returncode, done.stdout, done.stderr)
    assert done.returncode == 0, (done.returncode, done.stderr)
    return done.stderr


def died(done: subprocess.CompletedProcess[str]) -> str:
    """Of touching what cannot be had, and not before it should; what was said."""
    assert (done.stdout, -done.returncode) == ("before\n", signal.SIGBUS), (done.returncode, done.stderr)
    return done.stderr


# -- bytes ---------------------------------------------------------------------------------------------------


def test_every_byte_by_whole_chunks_and_each_once(run: Run) -> None:
    """Smaller than a page, no whole number of pages, larger than a huge page, larger than the array; opened
    by many threads at once, and touched by many in any order, with the GIL."""
    good(
        run("""
        SIZES = {  # of a chunk: of the source
            1000: 300_000, 5000: 300_001, CHUNK: 4 << 20, 1 << 20: (4 << 20) + 12, 5 << 20: 12 << 20,
            9 << 30: 3 << 20,
        }
        arrays = {}
        def opens(chunk_bytes, nbytes):
            source = Words(nbytes, chunk_bytes, f"{LOG}{chunk_bytes}")
            arrays[chunk_bytes] = uf.lazy_array(source, workers=4, readahead=0)
        threads = [threading.Thread(target=opens, args=item) for item in SIZES.items()]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        wrong = []
        def touches(array, seed):
            right = words(0, array.nbytes)
            for at in (np.random.default_rng(seed).permutation(-(-array.nbytes // PAGE)) * PAGE).tolist():
                if array[at] != right[at]:
                    wrong.append(at)
        for chunk_bytes, array in arrays.items():
            threads = [threading.Thread(target=touches, args=(array, seed)) for seed in range(8)]
            [thread.start() for thread in threads]
            [thread.join() for thread in threads]
            assert not wrong and right(array), chunk_bytes
            calls = sorted(call[1:] for call in pagers.notes(f"{LOG}{chunk_bytes}"))
            assert sum(nbytes for _, nbytes in calls) == array.nbytes, calls
            at = 0
            for offset, nbytes in calls:
                assert offset == at and offset % chunk_bytes == 0, calls
                at += nbytes
                assert at % chunk_bytes == 0 or at == array.nbytes, calls
            array.close()
        print("good")
        """)
    )


def test_several_chunks_at_once(run: Run) -> None:
    """By faults in several threads, and by one prefetch."""
    good(
        run("""
        HUGE = 2 << 20
        array = uf.lazy_array(functools.partial(pagers.Gathered, 5 * HUGE, 4), workers=4, readahead=0)
        chunks = range(0, 8, 2)  # neighbours may be asked for by one call
        threads = [threading.Thread(target=by_system_call, args=(array, i * CHUNK)) for i in chunks]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        assert all((array[i * CHUNK :][:CHUNK] == words(i * CHUNK, CHUNK)).all() for i in chunks)
        array.prefetch(slice(HUGE, 5 * HUGE))
        assert (array[HUGE:] == words(HUGE, 4 * HUGE)).all()
        print("good")
        """)
    )


def test_read_ahead_goes_on_into_the_next_chunks(run: Run) -> None:
    good(
        run("""
        array = uf.lazy_array(Words(16 * CHUNK, log=LOG), readahead=4 * CHUNK // PAGE)
        array[0]
        assert comes(lambda: array.resident[: 4 * CHUNK // PAGE].all())
        assert sum(nbytes for _, _, nbytes in pagers.notes(LOG)) in (4 * CHUNK, 5 * CHUNK)
        assert right(array)
        assert all(offset % CHUNK == 0 == nbytes % CHUNK for _, offset, nbytes in pagers.notes(LOG))
        print("good")
        """)
    )


def test_what_else_serves_from_a_pager(run: Run) -> None:
    """A region of a service, two arrays at once, and arrays and pagers that were pickled."""
    good(
        run("""
        with uf.Pager(Words(4 * CHUNK), workers=2) as pager:
            with uf.Userfaultfd() as u, uf.FaultService(u) as service:
                region = u.map(4 * CHUNK)
                service.serve(region, pager)
                assert right(region.array)
                region.close()
            first, second = uf.lazy_array(pager), uf.lazy_array(pager, offset=CHUNK)
            assert first[CHUNK + 5] == second[5]
            first.close()
            assert (second == words(CHUNK, 3 * CHUNK)).all() and pager.pid
            third, again = pickle.loads(pickle.dumps((second, pager)))
            assert len({pager.pid, again.pid, pager_of(third).pid}) == 3
            assert (third == words(CHUNK, 3 * CHUNK)).all()
            assert comes(lambda: third.stats()["pages"] == 48) and pager_of(third).stats()["answered"] >= 3
        assert pager.closed and not pager.pid and not again.closed
        del third, again
        second.close()
        assert no_children()
        print("good")
        """)
    )


@writes
@pytest.mark.parametrize("buffers", [False, True])
def test_changes_are_written_back_under_a_limit(run: Run, buffers: bool) -> None:
    """While reads are under way. In mode "c" they are not."""
    good(
        run(
            """
            N = 64 * CHUNK
            with open(FILE, "wb") as file:
                file.write(words(0, N))
            make = functools.partial(pagers.Store, FILE, LOG, 0.0005, BUFFERS)
            array = uf.lazy_array(make, mode="r+", memory_limit=1 << 20, workers=2)
            private = uf.lazy_array(pager_of(array), mode="c")
            assert right(private[: 4 * CHUNK])
            private[: 2 * CHUNK] = 0
            def writes(i):
                for number in np.random.default_rng(i).permutation(np.arange(i, N // CHUNK, 8)).tolist():
                    at = number * CHUNK
                    assert array[at + 5] == words(at, 8)[5]
                    array[at : at + CHUNK] = words(at, CHUNK, 1)
            threads = [threading.Thread(target=writes, args=(i,)) for i in range(8)]
            [thread.start() for thread in threads]
            [thread.join() for thread in threads]
            assert right(array, 1) and array.stats()["evicted"] and len(pagers.notes(LOG)) > 10
            array.flush()
            assert right(np.fromfile(FILE, np.uint8), 1)
            assert not private[: 2 * CHUNK].any() and right(private[2 * CHUNK :][: CHUNK]) is False
            array[-8:] = 7
            array.close()
            assert (np.fromfile(FILE, np.uint8)[-8:] == 7).all()
            print("good")
            """,
            BUFFERS=buffers,
        )
    )


@writes
def test_a_source_that_only_reads_cannot_be_written_to(run: Run) -> None:
    good(
        run("""
        with uf.Pager(Words(CHUNK)) as pager:
            assert "cannot be written to" in failure(lambda: uf.lazy_array(pager, mode="r+"), uf.SourceError)
            assert "has 65536 bytes" in failure(lambda: uf.lazy_array(pager, 70_000), uf.SourceError)
        print("good")
        """)
    )


# -- sources that fail ---------------------------------------------------------------------------------------


def test_a_source_fails_in_its_own_words(run: Run) -> None:
    """In SourceError, and on stderr when a page is touched; its other chunks, and the pager, are well."""
    said = good(
        run("""
        n = len(pagers.TRICKS)
        array = uf.lazy_array(pagers.Odd((n + 2) * CHUNK), workers=2, readahead=0)
        pid = pager_of(array).pid
        for i, (_, told) in enumerate(pagers.TRICKS, 1):
            text = failure(lambda: array.prefetch(slice(i * CHUNK, i * CHUNK + 1)), uf.SourceError)
            assert told in text and "its source failed: " in text and text.isprintable(), (told, text)
            assert by_system_call(array, i * CHUNK + 8 * i) == errno.EFAULT
        assert right(array[:CHUNK]) and array[-1] == words(array.nbytes - 8, 8)[-1]
        assert pager_of(array).pid == pid
        print("good")
        """)
    )
    lines = [line for line in said.splitlines() if "cannot be had" in line]
    assert len(lines) == len(pagers.TRICKS), said
    for i, (line, (_, told)) in enumerate(zip(lines, pagers.TRICKS, strict=True), 1):
        assert line.startswith("userfault: lazy array uint8 ("), line
        assert f": byte {i * pagers.CHUNK + 8 * i // 4096 * 4096} cannot be had: " in line, line
        assert told in line, (told, line)
        assert line.isprintable(), line
    assert "chunk 2 is corrupt" in said[: said.index(lines[1])]  # its traceback


def test_what_a_terminal_obeys_is_not_shown(run: Run) -> None:
    """Of a pager that says what it likes: a message is characters, also where it is cut."""
    shown = "".join(pagers.RUDE.values())
    said = good(
        run(f"""
        array = uf.lazy_array(pagers.Rude(4 * CHUNK), workers=2, readahead=0)
        assert {shown!r} in failure(lambda: array.prefetch(slice(CHUNK, CHUNK + 1)), uf.SourceError)
        assert by_system_call(array, 2 * CHUNK) == errno.EFAULT
        assert right(array[:CHUNK])
        print("good")
        """)
    )
    (line,) = [line for line in said.splitlines() if "cannot be had" in line]
    # 240 bytes of the name, the last of them half a character.
    name = r"lazy array uint8 \(262144,\) of Pager\(\?\\udcffé+\?"
    assert re.fullmatch(rf"userfault: {name}: byte 131072 cannot be had: {re.escape(shown)}=+\?", line)


def test_a_failure_that_cannot_be_shown_is_told(run: Run) -> None:
    """The pager has no stderr any more."""
    said = good(
        run("""
        array = uf.lazy_array(pagers.NoStderr(3 * CHUNK))
        assert by_system_call(array, CHUNK) == errno.EFAULT
        assert right(array[:CHUNK]) and right(array[2 * CHUNK :]) is False
        print("good")
        """)
    )
    assert "cannot be had: ValueError: nobody hears it" in said


def test_touching_what_fails_is_a_sigbus(run: Run) -> None:
    said = died(
        run("""
        array = uf.lazy_array(pagers.Sick(LOG, 99))
        assert right(array[:CHUNK])
        print("before", flush=True)
        print("still here", array[CHUNK])
        """)
    )
    assert "byte 65536 cannot be had: OSError: [Errno 5] it is not well" in said


def test_what_failed_is_asked_for_again(run: Run) -> None:
    said = good(
        run("""
        array = uf.lazy_array(pagers.Sick(LOG, 2), on_error="retry")
        assert array[CHUNK] == words(CHUNK, 8)[0] and right(array)
        print("good")
        """)
    )
    assert "cannot be had yet, and is asked for again: OSError: [Errno 5] it is not well" in said


@pytest.mark.parametrize("how", ["exit", "segfault"])
def test_a_source_that_ends_its_process(run: Run, how: str) -> None:
    """Once it is started again; again and again, its pages fail, also those that it would have given."""
    said = died(
        run(
            """
            array = uf.lazy_array(pagers.Deadly(LOG, 1, HOW))
            pid = pager_of(array).pid
            assert right(array)
            assert pager_of(array).stats()["starts"] == 2 and pager_of(array).pid != pid
            array.close()
            os.remove(LOG)
            array = uf.lazy_array(pagers.Deadly(LOG, 99, HOW), restarts=2)
            assert right(array[:CHUNK])
            text = failure(lambda: array.prefetch(slice(CHUNK, CHUNK + 1)), uf.SourceError)
            assert text.count("2 times in a row without having given a page") == 1, text
            assert pager_of(array).closed and not pager_of(array).pid
            assert pager_of(array).stats()["starts"] == 3, pager_of(array).stats()
            assert by_system_call(array, 2 * CHUNK) == errno.EFAULT and right(array[:CHUNK])
            assert no_children()
            print("before", flush=True)
            print("still here", array[3 * CHUNK])
            """,
            HOW=how,
        )
    )
    why = {"exit": "its pager exited with status 3", "segfault": "its pager was killed by signal 11"}[how]
    assert said.count(f"cannot be had: {why}, 2 times in a row") == 2, said


# -- making a source -----------------------------------------------------------------------------------------


def test_functions_that_make_a_source(run: Run) -> None:
    """Here they are asked for nothing; what they raise there is told."""
    good(
        run("""
        os.environ["LEFT"] = "right"
        sys.path.append(os.path.dirname(FILE))
        with open(os.path.dirname(FILE) + "/elsewhere.py", "w") as file:
            file.write("import os, pagers\\nclass Own(pagers.Words):\\n    def __init__(self):\\n"
                       "        super().__init__(8 * len(os.environ['LEFT']))\\n")
        import elsewhere
        array = uf.lazy_array(elsewhere.Own)
        assert right(array) and array.nbytes == 40
        array.close()
        sys.path.pop()
        for make, told in {
            pagers.refuse: "PermissionError: [Errno 13] the bucket is private",
            pagers.refuse_and_stay: "RuntimeError: half of it was made",
            pagers.nothing: "is not a page source",
            pagers.endless: "nbytes=1180591620717411303424",
            elsewhere.Own: "ModuleNotFoundError: No module named 'elsewhere'",
        }.items():
            text = failure(lambda: uf.Pager(make), uf.SourceError)
            assert told in text, text
        for wrong in (5, object(), b"bytes"):
            assert "read_into" in failure(lambda: uf.Pager(wrong), TypeError)
        gc.collect()
        assert no_children()
        print("good")
        """)
    )


# One of a script, with nothing but pickle or with cloudpickle.
SCRIPT = """
import os, sys
sys.path[:0] = {path!r}
if {without!r}:
    sys.modules["cloudpickle"] = None
import userfault as uf
from pagers import Words, words
os.chdir({folder!r})
class Mine(Words):
    pass
def refused(source):
    try:
        uf.Pager(source).close()
    except uf.SourceError as error:
        print(error)
print(uf.lazy_array(Words(8192)).tobytes() == words(0, 8192).tobytes())
refused(Mine(8))
refused(lambda: Words(8))
mine = Mine(8)
mine.lock = __import__("threading").Lock()
refused(mine)
"""


@pytest.mark.parametrize("without", [True, False], ids=["pickle", "cloudpickle"])
def test_what_a_script_defines(tmp_path: Path, without: bool) -> None:
    """Run by an isolated Python, whose options the pager has; it imports nothing from the current folder."""
    if not without:
        pytest.importorskip("cloudpickle")
    (tmp_path / "json.py").write_text("raise SystemExit('from the current folder')")
    (tmp_path / "code").mkdir()
    script = tmp_path / "code/script.py"
    path = [str(HERE), *(entry for entry in sys.path if entry)]
    script.write_text(SCRIPT.format(path=path, without=without, folder=str(tmp_path)))
    command = [sys.executable, *([] if without else ["-I"]), "-Werror", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    first, *lines = done.stdout.splitlines()
    assert first == "True"
    if without:
        assert "a pager cannot import what a script or notebook defines" in lines[0]
        assert "pip install 'userfault[pager]'" in lines[0]
        assert "cannot be pickled for its pager" in lines[1]
    assert "cannot be pickled for its pager" in lines[-1]
    assert "functools.partial" in lines[-1]
    assert len(lines) == (3 if without else 1)


# -- pagers that die -----------------------------------------------------------------------------------------


def test_killed_at_any_moment(run: Run) -> None:
    """While it starts, idle, at a request, and after it gave a page and before it said so; the process holds
    the GIL in its fault."""
    good(
        run("""
        array = uf.lazy_array(pagers.Slow(64 * CHUNK), workers=2, restarts=2, readahead=0)
        pager = pager_of(array)
        assert array[0] == words(0, 8)[0]
        os.kill(pager.pid, signal.SIGKILL)
        assert array[CHUNK] == words(CHUNK, 8)[0]
        threading.Timer(0.05, os.kill, (pager.pid, signal.SIGKILL)).start()
        array.prefetch(slice(2 * CHUNK, 4 * CHUNK))
        # The second start is killed while it starts, the third gives a page.
        first = pager.pid
        os.kill(first, signal.SIGKILL)
        assert comes(lambda: pager.pid not in (0, first))
        os.kill(pager.pid, signal.SIGKILL)
        assert array[4 * CHUNK] == words(4 * CHUNK, 8)[0]
        assert right(array[: 5 * CHUNK]) and pager.stats()["starts"] == 5
        array.close()
        array = uf.lazy_array(pagers.Abrupt(3 * CHUNK, log=LOG), workers=2, readahead=0)
        assert array[0] == words(0, 8)[0]
        assert array[CHUNK] == words(CHUNK, 8)[0]
        assert right(array) and pager_of(array).stats()["starts"] == 2
        array.close()
        assert no_children()
        print("good")
        """)
    )


def test_killed_idle_it_is_not_given_up(run: Run) -> None:
    """More often than `restarts` says: nobody wanted anything."""
    good(
        run("""
        array = uf.lazy_array(functools.partial(pagers.made, LOG), restarts=3)
        pager = pager_of(array)
        for starts in (1, 2, 3):
            assert comes(lambda: len(pagers.notes(LOG)) == starts)
            time.sleep(0.1)  # it is ready a moment later
            os.kill(pager.pid, signal.SIGKILL)
        assert right(array)
        print("good")
        """)
    )


@writes
@pytest.mark.parametrize("buffers", [False, True])
def test_killed_while_it_writes(run: Run, buffers: bool) -> None:
    """What it had half written is written again. Pagers that write are not given up, though nobody reads.
    What it kept to itself until a flush is lost, and the flush says so."""
    said = good(
        run(
            """
            with open(FILE, "wb") as file:
                file.truncate(6 << 20)
            make = functools.partial(pagers.Store, FILE, LOG, 0.0, BUFFERS, 2)
            array = uf.lazy_array(make, mode="r+", workers=2)
            array[:] = words(0, array.nbytes)
            if BUFFERS:
                assert "not yet made durable" in failure(array.flush, OSError)
                array[:] = words(0, array.nbytes)
            array.flush()
            assert right(np.fromfile(FILE, np.uint8))
            assert len({pid for *_, pid in pagers.notes(LOG)}) == 2 == pager_of(array).stats()["starts"]
            array.close()
            print("good")
            """,
            BUFFERS=buffers,
        )
    )
    assert not said


@writes
def test_pagers_that_only_write_are_not_given_up(run: Run) -> None:
    """Each is killed after it wrote and while it is to write more."""
    good(
        run("""
        with open(FILE, "wb") as file:
            file.truncate(6 << 20)
        make = functools.partial(pagers.Store, FILE, LOG, 0.1)
        array = uf.lazy_array(make, mode="r+", workers=2, restarts=1)
        pager = pager_of(array)
        array[:] = words(0, array.nbytes)
        def kills():
            for n in (2, 4):  # its second write begins
                if comes(lambda: len(pagers.notes(LOG)) >= n):
                    os.kill(pager.pid, signal.SIGKILL)
        thread = threading.Thread(target=kills)
        thread.start()
        array.flush()
        thread.join()
        assert right(np.fromfile(FILE, np.uint8)) and pager.stats()["starts"] == 3
        print("good")
        """)
    )


def test_a_stopped_pager_only_delays(run: Run) -> None:
    """But it does not hold up the end of its array, nor of its process."""
    good(
        run("""
        array = uf.lazy_array(Words(4 * CHUNK), readahead=0)
        pid = pager_of(array).pid
        os.kill(pid, signal.SIGSTOP)
        other = fork(lambda: time.sleep(0.3) or os.kill(pid, signal.SIGCONT) is None)  # it needs no GIL
        assert array[0] == words(0, 8)[0] and pager_of(array).pid == pid
        assert ended_well(other)
        os.kill(pid, signal.SIGSTOP)
        got = []
        touches = threading.Thread(target=lambda: got.append(by_system_call(array, CHUNK)))
        brings = threading.Thread(
            target=lambda: got.append(failure(array.prefetch, (uf.ClosedError, uf.SourceError)))
        )
        touches.start(), brings.start()
        time.sleep(0.1)
        array.close()
        touches.join(), brings.join()
        assert errno.EFAULT in got and over(pid) and no_children()
        print("good")
        """)
    )


def test_who_waits_for_children_and_who_ignores_them(run: Run) -> None:
    """Somebody else's waitpid() may have the pager's end; nobody's may."""
    good(
        run("""
        def reap():
            while True:
                try:
                    os.waitpid(-1, 0)
                except ChildProcessError:
                    time.sleep(0.001)
        threading.Thread(target=reap, daemon=True).start()
        for ignored in (False, True):
            if ignored:
                signal.signal(signal.SIGCHLD, signal.SIG_IGN)
            array = uf.lazy_array(Words(4 * CHUNK), restarts=4)
            pager = pager_of(array)
            assert right(array[:CHUNK])
            for starts in (2, 3):  # the last at the very beginning
                os.kill(pager.pid, signal.SIGKILL)
                assert comes(lambda: pager.stats()["starts"] == starts and pager.pid)
            assert right(array)
            pid = pager.pid
            array.close()
            assert over(pid)
        print("good")
        """)
    )


def test_no_descriptor_is_left_for_a_new_pager(run: Run) -> None:
    """Then there is none, and that is told; nothing hangs."""
    said = good(
        run("""
        import resource
        array = uf.lazy_array(Words(4 * CHUNK), restarts=2)
        assert right(array[:CHUNK])
        pid, read_write = pager_of(array).pid, os.pipe()
        resource.setrlimit(resource.RLIMIT_NOFILE, (5, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        os.kill(pid, signal.SIGKILL)
        try:
            os.write(read_write[1], array[CHUNK:CHUNK + 8].data)
        except OSError as error:
            assert error.errno == errno.EFAULT
        assert pager_of(array).closed
        array.close()
        assert no_children()
        print("good")
        """)
    )
    assert "cannot be had: " in said
    assert "2 times in a row" in said


def test_a_hostile_pager(run: Run) -> None:
    """It writes what it likes where it is asked and answers: what it gives may be wrong, but the process goes
    on, and ends it."""
    good(
        run("""
        for seed in (1, 2):
            array = uf.lazy_array(functools.partial(pagers.Hostile, 64 * CHUNK, seed), workers=3, readahead=0)
            pager = pager_of(array)
            def touches(seed):
                for page in np.random.default_rng(seed).permutation(1024).tolist():
                    by_system_call(array, page * PAGE)
            def asks():
                while not pager.closed:
                    pager.stats(), pager.explain(errno.EIO), pager.pid
                    time.sleep(0.001)
            threads = [threading.Thread(target=touches, args=(seed,)) for seed in range(4)]
            threads.append(threading.Thread(target=asks))
            [thread.start() for thread in threads]
            time.sleep(0.7)
            array.close()
            [thread.join() for thread in threads]
            assert no_children()
        print("good")
        """)
    )


# -- its process ---------------------------------------------------------------------------------------------


def test_it_ends_with_its_process(run: Run) -> None:
    """However that ends, also while the pager is stopped, or starts, or the kernel does not see to it."""
    good(
        run("""
        ENDS = {
            "return": lambda: True, "_exit": lambda: os._exit(1), "abort": os.abort,
            "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
            "execv": lambda: os.execv("/bin/true", ["true"]),
        }
        import resource
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        pids = []
        for i, ends in enumerate(ENDS.values()):
            read, write = os.pipe()
            def opens():
                global array
                array = uf.lazy_array(pagers.unbound if i == 0 else pagers.Slow(4 * CHUNK))
                pid = pager_of(array).pid
                if i % 2:
                    os.kill(pid, signal.SIGSTOP)
                os.write(write, b"%d" % pid)
                if i == 2:
                    array[0], os.kill(pid, signal.SIGKILL)
                    comes(lambda: pager_of(array).pid not in (0, pid))
                    os.write(write, b" %d" % pager_of(array).pid)
                return ends()
            pids.append((fork(opens), read))
            os.close(write)
        for pid, read in pids:
            os.waitpid(pid, 0)
            for number in os.read(read, 99).split():
                assert comes(lambda: over(int(number))), number
        print("good")
        """)
    )


def test_a_fork_child_leaves_it_alone(run: Run) -> None:
    said = good(
        run("""
        array = uf.lazy_array(Words(4 * CHUNK))
        pager = pager_of(array)
        pid = pager.pid
        def child():
            global array, pager
            assert failure(pager.stats, uf.ForkedError) and failure(array.prefetch, uf.ForkedError)
            pager.close()
            array.close()
            del array, pager
            gc.collect()
            own = uf.lazy_array(Words(CHUNK))
            return right(own)
        assert ended_well(fork(child))
        assert pager.pid == pid and right(array) and pager.stats()["starts"] == 1
        print("good")
        """)
    )
    assert not said


def test_control_c_is_for_the_process(run: Run) -> None:
    """While the pager runs, and while it starts; and in the middle of a prefetch, which is not waited for."""
    good(
        run("""
        def interrupted(function, after, calls=0):
            def interrupts():
                time.sleep(after)
                comes(lambda: len(pagers.notes(LOG)) >= calls)
                os.killpg(0, signal.SIGINT)
            def starts():
                threading.Thread(target=interrupts).start()
                function()
            failure(starts, KeyboardInterrupt)
        array = uf.lazy_array(pagers.Slow(1024 * CHUNK, log=LOG), workers=2, readahead=0)
        pid = pager_of(array).pid
        interrupted(lambda: time.sleep(20), 0.05)
        interrupted(array.prefetch, 0, 4)
        assert 0 < array.resident.sum() < len(array.resident) // 2
        assert pager_of(array).pid == pid
        assert array[-1] == words(1024 * CHUNK - 8, 8)[-1]
        interrupted(lambda: uf.Pager(Words(8)), 0.02)
        array.close()
        gc.collect()
        assert comes(no_children)
        print("good")
        """)
    )


def test_it_leaves_nothing_behind(run: Run) -> None:
    """Descriptors, threads, mappings, processes. The first array opens what stays."""
    good(
        run("""
        def there():
            with open("/proc/self/maps") as maps:
                shared = maps.read().count("memfd:userfault")
            return [len(os.listdir(f"/proc/self/{name}")) for name in ("fd", "task")] + [shared]
        first = None
        for i in range(5):
            array = uf.lazy_array(Words(4 * CHUNK), workers=2)
            assert array[0] == words(0, 8)[0]
            if i % 2:
                array.close()
            del array
            if i == 2:
                assert failure(lambda: uf.lazy_array(Words(CHUNK), 70_000), uf.SourceError)
            gc.collect()
            first = first or there()
        assert comes(lambda: there() <= first), (first, there())
        assert no_children()
        print("good")
        """)
    )


def test_a_pager_has_no_descriptors_but_its_own(run: Run) -> None:
    """Also where the process has none, and hands on what it should not."""
    good(
        run("""
        def opens(closed):
            given = {number: "/dev/null" if number in (0, *closed) else os.readlink(f"/proc/self/fd/{number}")
                     for number in range(3)}
            for number in closed:
                os.close(number)
            array = uf.lazy_array(Words(4 * CHUNK))
            folder = f"/proc/{pager_of(array).pid}/fd"
            has = {int(name): os.readlink(f"{folder}/{name}") for name in os.listdir(folder)}
            assert [has.pop(number) for number in range(3)] == list(given.values()), has
            assert list(has.values()) == ["anon_inode:[pidfd]"], has
            time.sleep(0.1)  # and it lives
            return right(array) and pager_of(array).stats()["starts"] == 1
        import resource
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        while (inherited := os.dup(1)) < 1100:  # more than select() can tell apart
            os.set_inheritable(inherited, True)
        for closed in ((), (0,), (1,), (1, 2), (0, 1, 2)):
            assert ended_well(fork(lambda: opens(closed))), closed
        print("good")
        """)
    )


# -- the storm -----------------------------------------------------------------------------------------------


@writes
def test_a_storm(tmp_path: Path) -> None:
    """A few moments of `python tests/pager_storm.py`."""
    told = run_storm([str(HERE / "pager_storm.py"), "--kills", "15", "--json"], tmp_path, 120)
    assert told["kills"] == 15
    assert told["bytes_checked"]


def test_a_reopened_array_ends_its_pager(run: Run) -> None:
    good(
        run("""
        array = pickle.loads(pickle.dumps(uf.lazy_array(Words(4 * CHUNK), dtype="u8")))
        assert right(array)
        array.close()
        assert no_children()
        shared = uf.Pager(Words(4 * CHUNK))
        for _ in range(2):
            array = uf.lazy_array(shared)
            assert right(array)
            array.close()
        shared.close()
        assert no_children()
        print("good")
        """)
    )


def test_a_pager_that_is_of_no_use_is_refused(run: Run) -> None:
    """In a fork child, which has none of its memory, and after close(), which says so."""
    good(
        run("""
        pager = uf.Pager(pagers.Odd(8 * CHUNK))
        array = uf.lazy_array(pager, readahead=0)
        failure(lambda: array.prefetch(slice(CHUNK, CHUNK + 1)), uf.SourceError)
        shared = lambda: "userfault pager (deleted)" in open("/proc/self/maps").read()
        def does_nothing_to_us():
            told = failure(lambda: uf.lazy_array(pager), uf.ForkedError)
            pager.close()
            return "fork child" in told and not shared()
        assert shared() and ended_well(fork(does_nothing_to_us))
        pid = pager.pid
        assert right(array[:CHUNK]) and pid == pager.pid
        pager.close()
        missing = slice(2 * CHUNK, 2 * CHUNK + 1)
        assert "its pager was closed" in failure(lambda: array.prefetch(missing), uf.SourceError)
        assert "make another" in failure(lambda: uf.lazy_array(pager), uf.SourceError)
        print("good")
        """)
    )


def test_arrays_of_one_pager_that_are_pickled_together(run: Run) -> None:
    good(
        run("""
        array = uf.lazy_array(Words(4 * CHUNK), dtype="u8")
        whole, part = pickle.loads(pickle.dumps((array, array[CHUNK // 8:])))
        whole.close()
        assert (part == array[CHUNK // 8:]).all() and right(array)
        print("good")
        """)
    )


def test_no_credentials_are_told(run: Run) -> None:
    said = died(
        run("""
        array = uf.lazy_array(functools.partial(pagers.failing, CHUNK, password="hunter2"))
        assert repr(array).endswith(f"of Pager(failing({CHUNK}))>"), repr(array)
        assert "hunter2" not in failure(array.materialize, uf.SourceError)
        print("before", flush=True)
        array[0]
        """)
    )
    assert "cannot be had" in said
    assert "hunter2" not in said


def test_what_a_source_prints_is_seen(run: Run) -> None:
    """Also in a pipe, and when the pager is killed."""
    done = run("""
        os.environ.pop("PYTHONUNBUFFERED", None)
        with uf.lazy_array(pagers.Printing(CHUNK)) as array:
            assert right(array)
        print("good")
        """)
    good(done)
    assert "reading 0\n" in done.stdout
