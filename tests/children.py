"""Processes of their own for code that may hang, crash, or exit.

Each is forked off one process that has imported numpy and userfault and done nothing else: on an emulated
processor these imports take seconds. It ends as any interpreter does, finalization included.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

from support import SLOWER, Child

# What a child's code finds imported and defined.
PREAMBLE = """
import ctypes, gc, json, mmap, os, select, signal, sys, threading, time
import numpy as np
import userfault as uf
PAGE = uf.PAGE_SIZE

def settles(service, counter, value):
    # A fault's thread is awake a moment before the engine has counted it.
    deadline = time.monotonic() + 30
    while int(service.stats()[counter]) != value and time.monotonic() < deadline:
        time.sleep(0.001)
    return int(service.stats()[counter]) == value

def fork(function):
    # A child that ends with 0 when the function answers that all is well.
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        code = 0 if function() else 2
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
    finally:
        os._exit(code)

def ended_well(pid):
    return os.waitpid(pid, 0)[1] == 0

def together(*functions):
    # In threads, all at once; each must answer that all is well.
    answers = []
    threads = [threading.Thread(target=lambda function=function: answers.append(function()))
               for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [True] * len(functions), answers

def gone(service):
    # One that has ended is followed for a while.
    deadline = time.monotonic() + 30
    while service.children and time.monotonic() < deadline:
        time.sleep(0.005)
    return service.children == 0
"""

# What a child does first whose regions are to be served: EVENTS says whether its children are followed.
SERVED = """
import concurrent.futures, errno, multiprocessing, pickle, subprocess

N = 64
data = np.random.default_rng(0).integers(1, 256, N * PAGE, dtype=np.uint8)

def opened(features="all"):
    return uf.Userfaultfd(WIRE, features if WIRE == "msg" else None)

def same(array, first=0, end=N):
    return bool((array[first * PAGE:end * PAGE] == data[first * PAGE:end * PAGE]).all())

def own_service(features="all"):
    # In a child: a userfaultfd, a service and memory of its own.
    with opened(features) as u, uf.FaultService(u) as service:
        region = u.map(N * PAGE)
        service.serve(region, uf.sources.Buffer(data))
        return same(region.array)

def died_of(pid, *signals):
    status = os.waitpid(pid, 0)[1]
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) in signals

def has_ended(pid):
    # Somebody else's child.
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.005)
    return False

u = opened("all" if EVENTS else None)
service = uf.FaultService(u)
region = u.map(N * PAGE)
service.serve(region, uf.sources.Buffer(data), readahead=0)
array = region.array
"""

NURSERY = """
for line in sys.stdin:
    request = json.loads(line)
    pid = os.fork()
    if pid == 0:
        break
    ended = os.pidfd_open(pid)
    in_time = bool(select.select([ended], [], [], request["timeout"])[0])
    for kill in (os.killpg, os.kill):  # all that it left behind, too
        try:
            kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.close(ended)
    print(json.dumps([in_time, status]), flush=True)
else:
    os._exit(0)
os.setsid()
for number, name in enumerate(("/dev/null", request["folder"] + "/stdout", request["folder"] + "/stderr")):
    opened = os.open(name, os.O_RDWR | os.O_CREAT)
    os.dup2(opened, number)
    os.close(opened)
WIRE, code = request["wire"], compile(request["code"], "<child>", "exec")
del line, request, pid, number, name, opened
exec(code)
"""


class Nursery:
    """Runs one child at a time."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PREAMBLE + NURSERY],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, code: str, wire: str = "auto", timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """Run Python code with WIRE set; killed, and TimeoutExpired, after `timeout` native seconds."""
        timeout *= min(SLOWER, 3)
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None
        assert stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            request = {"code": textwrap.dedent(code), "wire": wire, "folder": folder, "timeout": timeout}
            stdin.write(json.dumps(request) + "\n")
            stdin.flush()
            in_time, status = json.loads(stdout.readline())
            texts = [Path(folder, name).read_text() for name in ("stdout", "stderr")]
        if not in_time:
            raise subprocess.TimeoutExpired("child", timeout, *texts)
        return subprocess.CompletedProcess(["child"], status, *texts)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self.process:
            assert self.process.stdin is not None
            self.process.stdin.close()


def run_storm(line: list[str], folder: Path, seconds: float) -> Any:
    """Run a script that ends by itself, killed after so many seconds; what it says by JSON."""
    # Files, not pipes, which what hangs would hold open; and a session, to be killed as one.
    out, err = folder / "out", folder / "err"
    with (
        out.open("w") as stdout,
        err.open("w") as stderr,
        subprocess.Popen(
            [sys.executable, *line], stdout=stdout, stderr=stderr, start_new_session=True
        ) as process,
    ):
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"it hangs: {err.read_text()}")
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, err.read_text()
    return json.loads(out.read_text())


def run_served(child: Child, code: str, events: bool = True, timeout: float = 60, **names: Any) -> None:
    """Run the code after SERVED, with these names set; it must come to its end."""
    given = [f"{name} = {value!r}" for name, value in {"EVENTS": events, **names}.items()]
    done = child("\n".join([*given, SERVED, textwrap.dedent(code), 'print("good")']), timeout=timeout)
    assert done.stdout == "good\n", (done.returncode, done.stderr)
