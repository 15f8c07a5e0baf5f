"""The model of `userfault.rfc` against the kernel, record by record, on the same sequence of faults."""

from __future__ import annotations

import json
import random

import numpy as np

import userfault as uf
from support import LAB, PAGE, Child
from userfault._consts import DTYPES
from userfault.rfc import RfcModel

PAGES = 32
Step = tuple[str, int]


def script() -> list[Step]:
    """Each page read or written once; some of them written again, write-protected; forks in between."""
    chance = random.Random(15)
    pages = chance.sample(range(PAGES), PAGES)
    steps: list[Step] = [(chance.choice(("read", "write")), page) for page in pages[: PAGES // 2]]
    steps += [("protected write", page) for page in pages[: PAGES // 4]]
    steps += [(chance.choice(("read", "write")), page) for page in pages[PAGES // 2 :]]
    return [("fork", 0), *steps[:9], ("fork", 0), *steps[9:], ("fork", 0)]


# Prints a line a record: its bytes, the region's start, and whether a fork's descriptor is a userfaultfd of
# this process. The steps are made by a thread without the GIL, one after the other: os.fork() would wait for
# the reader with the GIL that the reader needs to come to read(). A child so made may wait for that GIL for
# ever, and is killed.
ON_THE_KERNEL = """
wanted = (uf.Feature.EVENT_FORK if FORKS else uf.Feature(0)) if WIRE == "msg" else None
u = uf.Userfaultfd(WIRE, wanted)
both = uf.RegisterMode.MISSING | uf.RegisterMode.WP
region = u.map({pages} * PAGE, both)
libc = ctypes.CDLL(None)
madvise = lambda advice: libc.madvise(ctypes.c_void_p(region.start), ctypes.c_size_t(region.length), advice)
reader = uf.EventReader(u)
array = region.array

def do(kind, page):
    address = region.start + page * PAGE
    if kind == "read":
        uf.touch(array, np.array([page * PAGE], np.uint64))
    elif kind == "fork":
        children.append(libc.fork())
        if children[-1] == 0:
            os._exit(0)
    else:
        ctypes.memset(address, 7, 1)

for kind, page in {steps}:
    if kind == "fork" and not FORKS:
        continue
    children, address = [], region.start + page * PAGE
    if kind == "protected write":
        u.writeprotect(address, PAGE)
    if kind == "fork":
        assert madvise(11) == 0  # MADV_DOFORK
    actor = threading.Thread(target=do, args=(kind, page))
    actor.start()
    records = reader.read(30)
    (record,) = records
    raw, live = record.tobytes(), None
    (translated,) = uf.as_v2(np.array([record]))
    if kind == "fork":
        live = os.readlink(f"/proc/self/fd/{{translated['arg']}}") == "anon_inode:[userfaultfd]"
    elif kind == "protected write":
        u.writeprotect(address, PAGE, protect=False)
    else:
        u.copy(address, bytes(PAGE))
    actor.join()
    for pid in children:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    if kind == "fork":
        (taken,) = uf.take_children(records)
        assert taken.fileno() == translated["arg"]
        taken.close()
        assert madvise(10) == 0  # MADV_DONTFORK
    print(json.dumps([raw.hex(), region.start, live]), flush=True)
assert len(reader.read(0)) == 0
"""

MAY_FORK = """
try:
    uf.Userfaultfd("msg", uf.Feature.EVENT_FORK).close()
    FORKS = True
except uf.UffdError:  # EPERM: needs CAP_SYS_PTRACE
    FORKS = False
"""


def relative(record: np.ndarray, start: int) -> list[int]:
    """All the words of one page fault, the last, its address and bits, from the start on."""
    *before, arg = record.view(np.uint64).tolist()
    return [*before, arg - start]


def test_the_kernel_and_the_model_tell_the_same(wire: str, child: Child) -> None:
    steps = script()
    forks = {"v1": "FORKS = False\n", "v2": "FORKS = True\n", "msg": MAY_FORK}[wire]
    done = child(forks + ON_THE_KERNEL.format(pages=PAGES, steps=steps))
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    with_forks = any(live is not None for *_, live in answers)
    if wire != "msg" or LAB:  # elsewhere msg may lack the privilege
        assert with_forks == (wire != "v1")
    if not with_forks:
        steps = [step for step in steps if step[0] != "fork"]

    spoken = "v2" if wire == "msg" else wire  # msg is compared as what v2 would say
    start = 0x7F0000000000
    with RfcModel(fork=True) as model:
        model.api({"v1": 0xAA, "v2": 0xAB}[spoken], 0)
        reader = uf.EventReader(model.fileno(), api=spoken)
        assert len(answers) == len(steps)
        for (kind, page), (raw, kernel_start, live) in zip(steps, answers, strict=True):
            from_kernel = np.frombuffer(bytes.fromhex(raw), DTYPES[wire])
            if wire == "msg":
                from_kernel = uf.as_v2(from_kernel)
            if kind == "fork":
                with model.fork() as forked:
                    (from_model,) = reader.read(0)
                    assert from_model["arg"] == forked.fileno()
                assert from_kernel["type"] == from_model["type"]
                assert live, "not a userfaultfd of the process that reads"
            else:
                model.fault(start + page * PAGE, write=kind != "read", wp=kind == "protected write")
                assert relative(from_kernel, kernel_start) == relative(reader.read(0), start), (kind, page)
