"""From read to resolve nothing takes the GIL, allocates, or calls Python: read off the compiled code.

A Cython function that is `nogil` can still call Python where it raises, or where an argument is checked.
So the functions of the engine's threads are disassembled, and what they call by name is looked at.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from types import ModuleType

import pytest

import userfault._ahead
import userfault._books
import userfault._budget
import userfault._crew
import userfault._errno
import userfault._evict
import userfault._fill
import userfault._follow
import userfault._hold
import userfault._inline
import userfault._ioctl
import userfault._lease
import userfault._loop
import userfault._pager
import userfault._say
import userfault._serve
import userfault._served
import userfault._sigbus
import userfault._slab
import userfault._source
import userfault._space
import userfault._stage
import userfault._tree

MODULES = {
    userfault._loop: ("run_loop",),
    userfault._serve: ("serve", "chunk_start", "recheck", "take_whole"),
    userfault._inline: ("serve_own",),
    userfault._sigbus: ("on_sigbus", "take_sigbus"),
    userfault._stage: ("new_stage", "free_stage", "stage_is_huge", "is_prompt", "bring"),
    userfault._follow: ("hear", "ask", "find_room", "end_children"),
    userfault._books: ("decode_event", "keep_books", "find_grown", "copy_books", "poison_missing"),
    userfault._space: ("new_space", "free_space", "has_ended", "copy_of"),
    userfault._ahead: ("give", "set_goal", "take_orders", "advance"),
    userfault._fill: ("fill", "fail", "wake", "park", "count_latency", "fill_grown"),
    userfault._crew: ("hand", "run"),
    userfault._served: ("look_ahead", "resync", "first_missing", "missing_end"),
    userfault._hold: ("any_changed", "there", "gone", "take_out", "believe", "leave_budget"),
    userfault._budget: ("entry_of", "member_of", "block_of", "is_whole", "push", "pop"),
    userfault._evict: ("make_room", "change", "expect_change"),
    userfault._say: ("say", "say_why"),
    userfault._pager: ("keep_pager", "fill_from_pager", "write_to_pager", "sync_pager", "words_of_pager"),
    userfault._lease: ("lease_saw", "lease_saw_many", "lease_held", "lease_expire", "lease_end"),
    userfault._tree: (
        *("enter", "leave", "find", "before", "empty"),
        *("lock_tree", "unlock_tree", "insert", "cut", "set_payload", "list_range", "next_entry"),
    ),
    userfault._slab: ("slab_alloc", "slab_free"),
    userfault._errno: ("decide",),
    userfault._ioctl: (
        "uffd_copy",
        "uffd_move",
        "uffd_zeropage",
        "uffd_poison",
        "uffd_wake",
        "uffd_writeprotect",
    ),
    userfault._source: (
        "fill_from_file",
        "fill_from_cache",
        "fill_with_constant",
        "fill_with_pattern",
        *("write_to_buffer", "write_to_file", "sync_file"),
    ),
}
# What the threads may call of libc: system calls, memory, locks, and numbers as text for /proc. No malloc.
ALLOWED = {
    *("epoll_create1", "epoll_ctl", "epoll_wait", "getrlimit", "setrlimit"),
    *(
        "read",
        "write",
        "ioctl",
        "ppoll",
        "pread",
        "preadv64v2",
        "pwrite",
        "fdatasync",
        "open",
        "close",
        "madvise",
        "mincore",
    ),
    *(
        "mmap",
        "munmap",
        "mprotect",
        "process_vm_readv",
        "syscall",
        "getpid",
        "gettid",
        "clock_gettime",
        "sysconf",
    ),
    *("usleep", "sched_yield", "sched_getcpu", "sched_getaffinity", "sched_setaffinity", "__sched_cpucount"),
    *("pthread_mutex_init", "pthread_mutex_lock", "pthread_mutex_unlock"),
    *("pthread_cond_wait", "pthread_cond_signal", "pthread_cond_broadcast"),
    *("pthread_self", "pthread_sigmask", "sigaction", "sigemptyset", "raise"),
    *("posix_spawn", "waitid", "kill"),  # vfork: glibc's malloc and fork handlers have no part in it
    *("memcpy", "memset", "memmove", "strchr", "strrchr", "strtol", "strtoll", "snprintf", "strlen"),
    *("__errno_location", "abort"),
}

FUNCTION = re.compile(r"^[0-9a-f]+ <(.+)>:$")
CALL = re.compile(r"\b(?:call|jmp)\s+[0-9a-f]+ <([^>+]+)>")


def calls(path: str) -> dict[str, set[str]]:
    """What each function of a shared library calls by name, or jumps to."""
    command = ["objdump", "-d", "--no-show-raw-insn", path]
    lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    found: dict[str, set[str]] = {}
    name = ""
    for line in lines.splitlines():
        if match := FUNCTION.match(line):
            name = match[1]
            found[name] = set()
        elif name and (match := CALL.search(line)):
            found[name].add(match[1])
    return found


def reached(graph: dict[str, set[str]], roots: set[str]) -> set[str]:
    """The functions of other libraries that the roots call, directly or not."""
    seen, left, foreign = set(roots), list(roots), set()
    while left:
        for callee in graph.get(left.pop(), ()):
            if callee.endswith("@plt"):
                foreign.add(callee.removesuffix("@plt").removesuffix("64"))
            elif callee not in seen:
                seen.add(callee)
                left.append(callee)
    return foreign


@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump, which comes with every compiler")
@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__.partition("._")[2])
def test_the_threads_call_no_python(module: ModuleType) -> None:
    name = module.__name__.rpartition(".")[2]
    graph = calls(str(module.__file__))
    pattern = rf"__pyx_f_9userfault_{len(name)}{name}_({'|'.join(MODULES[module])})(\.\w+)*"
    roots = {function for function in graph if re.fullmatch(pattern, function)}
    assert len(roots) >= len(MODULES[module]), roots
    assert reached(graph, roots) <= ALLOWED
