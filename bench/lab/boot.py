"""Boots a kernel under QEMU, without KVM and without an image, and runs one job.

The guest's root is the host's, shared read-only over 9p with memory laid over
it. Results come back as files in a second, writable share, the run folder: the
console can neither delay them nor mix with them.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
import shlex
import subprocess
import sys
import threading
import time
from typing import BinaryIO

HERE = pathlib.Path(__file__).resolve().parent
INIT = HERE / "guest/init.sh"
BOOT_LIMIT = 120.0
NINEP = "trans=virtio,version=9p2000.L,msize=262144"
# What the kernel says when it found fault with itself, whatever the job says.
COMPLAINT = re.compile(r"WARNING: CPU|BUG: |Oops|Kernel panic|general protection|refcount_t:")


@dataclasses.dataclass(frozen=True)
class Job:
    """What to run, and on what machine."""

    command: list[str]
    cwd: pathlib.Path
    env: dict[str, str]
    params: dict[str, str] = dataclasses.field(default_factory=dict)
    icount: bool = False
    memory: str = "2G"
    timeout: float = 600.0


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a boot went. `status` is the command's, None when it never ended."""

    status: int | None
    problem: str
    uname: str
    cmdline: str
    console: str
    boot_seconds: float
    total_seconds: float


def kernel_line(job: Job) -> str:
    """The kernel's command line; the double quotes allow blanks in the path."""
    words = [
        f"root=lab-root rootfstype=9p rootflags={NINEP},cache=loose ro",
        # A panic resets the machine, and -no-reboot makes a reset the end of QEMU.
        "console=ttyS0 panic=-1 oops=panic",
        # All of TCG's virtual CPUs read one clock; the kernel cannot know that.
        "tsc=reliable",
        *(f"userfaultfd.{name}={value}" for name, value in job.params.items()),
        f'init="{INIT}"',
    ]
    if job.icount:
        # No random layout; and the virtual clock's rate given, not measured.
        words[2] += " tsc_early_khz=1000000 norandmaps"
    return " ".join(words)


def qemu_line(image: pathlib.Path, run: pathlib.Path, job: Job) -> list[str]:
    """QEMU's arguments: TCG only, since KVM is of no use where the host is a guest."""
    cpus = ["-accel", "tcg,thread=multi", "-smp", "2"]
    if job.icount:
        # One instruction is one virtual nanosecond, and idle time takes none.
        cpus = ["-accel", "tcg", "-smp", "1", "-icount", "shift=0,sleep=off"]
        cpus += ["-rtc", "base=2025-01-01,clock=vm"]
    root = "local,path=/,mount_tag=lab-root,security_model=none,readonly=on,multidevs=remap"
    share = f"local,path={str(run).replace(',', ',,')},mount_tag=lab-run,security_model=none"
    return [
        *("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-no-reboot"),
        *("-display", "none", "-monitor", "none", "-serial", f"file:{run / 'console.log'}"),
        *cpus,
        *("-cpu", "max", "-m", job.memory, "-kernel", str(image)),
        *("-virtfs", root, "-virtfs", share),
        *("-append", kernel_line(job)),
    ]


def job_script(job: Job) -> str:
    """The shell script that the guest's init runs."""
    lines = [f"export {name}={shlex.quote(value)}" for name, value in job.env.items()]
    lines += [f"cd {shlex.quote(str(job.cwd))} || exit 126", f"exec {shlex.join(job.command)}"]
    return "\n".join(lines) + "\n"


class Relay(threading.Thread):
    """Copies what the guest appends to a file to one of our own streams, live."""

    def __init__(self, path: pathlib.Path, sink: BinaryIO) -> None:
        super().__init__(daemon=True)
        self.path, self.sink, self.ended = path, sink, threading.Event()

    def run(self) -> None:
        with self.path.open("rb") as source:
            while True:
                last = self.ended.is_set()
                while chunk := source.read(65536):
                    self.sink.write(chunk)
                    self.sink.flush()
                if last:
                    return
                self.ended.wait(0.05)


def read(path: pathlib.Path) -> str:
    """The text of a file that may be missing."""
    return path.read_text(errors="replace") if path.exists() else ""


def wait(qemu: subprocess.Popen[bytes], run: pathlib.Path, job: Job) -> tuple[str, float]:
    """Until the machine is off or its time is up; what went wrong, and the boot time."""
    started = time.monotonic()
    booted = 0.0
    while qemu.poll() is None:
        spent = time.monotonic() - started
        if not booted and (run / "started").exists():
            booted = spent
        if spent > job.timeout:
            return f"the job was still running after {job.timeout:g} s", booted
        if not booted and spent > BOOT_LIMIT:
            return f"the guest did not boot within {BOOT_LIMIT:g} s", booted
        time.sleep(0.02)
    if qemu.returncode:
        return f"QEMU ended with status {qemu.returncode}", booted
    if not (run / "status").exists():
        return "the machine went down before the job had ended", booted
    return "", booted


def boot(image: pathlib.Path, run: pathlib.Path, job: Job) -> Outcome:
    """One boot, from power-on to power-off. Never raises for what the guest does."""
    (run / "job.sh").write_text(job_script(job))
    (run / "stdout").touch()
    (run / "stderr").touch()
    relays = [
        Relay(run / "stdout", sys.stdout.buffer),
        Relay(run / "stderr", sys.stderr.buffer),
    ]
    started = time.monotonic()
    with (run / "qemu.log").open("wb") as log:
        qemu = subprocess.Popen(qemu_line(image, run, job), stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        for relay in relays:
            relay.start()
        problem, booted = wait(qemu, run, job)
    finally:
        qemu.kill()
        qemu.wait()
        for relay in relays:
            relay.ended.set()
            relay.join()
    console = read(run / "console.log")
    complaints = [line for line in console.splitlines() if COMPLAINT.search(line)]
    if complaints and not problem:
        problem = f"the kernel complained: {complaints[0].strip()}"
    status = read(run / "status").strip()
    return Outcome(
        status=int(status) if status else None,
        problem=problem,
        uname=read(run / "uname").strip(),
        cmdline=read(run / "cmdline").strip(),
        console=console + read(run / "qemu.log"),
        boot_seconds=round(booted, 1),
        total_seconds=round(time.monotonic() - started, 1),
    )
