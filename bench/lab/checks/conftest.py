"""Every check runs in a forked child with a deadline.

A fault that nobody serves sleeps for ever, and a check that is wrong about the
kernel is one that leaves such a fault behind. A child also gives each check a
process of its own, with one thread and no other memory registered.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import select
import signal
import sys
import traceback
from typing import Any

import pytest

DEADLINE = 60.0


HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE))  # for raw_uffd, whatever the import mode


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "wire(name): the wire format a check is about")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Any other kernel has no v1 and v2. This hook sees the items of all folders."""
    if os.environ.get("LAB_KERNEL") != os.uname().release:
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="needs the kernel of bench/lab/run.py"))


def run_isolated(call: Any, arguments: dict[str, Any]) -> str:
    """Run `call` in a child; the text of its failure, or nothing."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setsid()
            os.close(reader)
            call(**arguments)
            status = 0
        except BaseException:
            os.write(writer, traceback.format_exc().encode()[-4000:])
        finally:
            os._exit(status)
    os.close(writer)
    # Its end, not that of the pipe: processes that it leaves behind hold the pipe.
    ended = os.pidfd_open(pid)
    expired = not select.select([ended], [], [], DEADLINE)[0]
    for kill in (os.killpg, os.kill):  # should its setsid() be still to come
        with contextlib.suppress(ProcessLookupError):
            kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    os.close(ended)
    text = b""
    while chunk := os.read(reader, 65536):
        text += chunk
    os.close(reader)
    if expired:
        return f"no end after {DEADLINE:g} s: killed"
    return text.decode(errors="replace") or ("" if status == 0 else f"wait status {status}")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool:
    names = pyfuncitem._fixtureinfo.argnames
    failure = run_isolated(pyfuncitem.obj, {name: pyfuncitem.funcargs[name] for name in names})
    if failure:
        pytest.fail(failure, pytrace=False)
    return True
