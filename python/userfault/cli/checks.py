"""What `userfault doctor` looks at: each check says how it stands, and what mends it."""

from __future__ import annotations

import grp
import os
import pwd
import re
import resource
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import userfault as uf
from userfault.cli import machine
from userfault.cli.units import human
from userfault.opening import DEVICE

Status: TypeAlias = Literal["ok", "missing", "limited"]

_SYSCTL = "/proc/sys/vm/unprivileged_userfaultfd"
_HEADER = "/usr/include/linux/userfaultfd.h"
_THP = "/sys/kernel/mm/transparent_hugepage"
_HUGETLB = Path("/sys/kernel/mm/hugepages")
_DEFAULT_MAX_MAP_COUNT = 65530
_ENOUGH_FILES = 1024
_OPEN_FIRST = "mend one of open.*, then ask again"
_CAPABILITIES = {"CAP_SYS_PTRACE": 19, "CAP_SYS_ADMIN": 21}

_F = uf.Feature
# The Linux that brought each, by its release notes and ioctl_userfaultfd(2).
SINCE = {
    _F.EVENT_FORK: (4, 11),
    _F.EVENT_REMAP: (4, 11),
    _F.EVENT_REMOVE: (4, 11),
    _F.EVENT_UNMAP: (4, 11),
    _F.MISSING_HUGETLBFS: (4, 11),
    _F.MISSING_SHMEM: (4, 11),
    _F.SIGBUS: (4, 14),
    _F.THREAD_ID: (4, 14),
    _F.PAGEFAULT_FLAG_WP: (5, 7),
    _F.MINOR_HUGETLBFS: (5, 13),
    _F.MINOR_SHMEM: (5, 14),
    _F.EXACT_ADDRESS: (5, 18),
    _F.WP_HUGETLBFS_SHMEM: (5, 19),
    _F.WP_UNPOPULATED: (6, 4),
    _F.POISON: (6, 6),
    _F.WP_ASYNC: (6, 7),
    _F.MOVE: (6, 8),
}
# What else a kernel must have been built with.
_BUILT_WITH = {
    _F.PAGEFAULT_FLAG_WP: "CONFIG_HAVE_ARCH_USERFAULTFD_WP",
    _F.MINOR_HUGETLBFS: "CONFIG_HAVE_ARCH_USERFAULTFD_MINOR",
    _F.MINOR_SHMEM: "CONFIG_HAVE_ARCH_USERFAULTFD_MINOR",
    _F.WP_HUGETLBFS_SHMEM: "CONFIG_PTE_MARKER_UFFD_WP",
    _F.WP_UNPOPULATED: "CONFIG_PTE_MARKER_UFFD_WP",
    _F.WP_ASYNC: "CONFIG_PTE_MARKER_UFFD_WP",
}


class Check(NamedTuple):
    """One thing looked at. `remedy` is empty when there is nothing to mend."""

    name: str
    status: Status
    detail: str
    remedy: str = ""


def opening(capabilities: uf.Capabilities) -> Iterator[Check]:
    """The ways of opening, and what decides over them."""
    full = not capabilities.user_mode_only
    for way in capabilities.ways:
        if not way.works:
            yield Check(f"open.{way.name}", "missing", way.reason, way.remedy)
        elif way.name == "user-mode-only" and not full:
            detail = "works, but faults taken inside system calls fail with EFAULT"
            yield Check(f"open.{way.name}", "limited", detail, "mend open.device or open.syscall")
        else:
            yield Check(f"open.{way.name}", "ok", "works")
    yield _device()
    yield _sysctl(full)
    yield _privilege(full)
    yield _seccomp(any(way.works for way in capabilities.ways))
    yield _no_new_privs(full)


def _device() -> Check:
    name = "device.permissions"
    try:
        status = os.stat(DEVICE)
    except OSError as error:
        remedy = "Linux 6.1 and later have it; in a container pass --device /dev/userfaultfd"
        return Check(name, "missing", f"{DEVICE}: {error.strerror}", remedy)
    try:
        owner = f"{pwd.getpwuid(status.st_uid).pw_name}:{grp.getgrgid(status.st_gid).gr_name}"
    except KeyError:
        owner = f"{status.st_uid}:{status.st_gid}"
    detail = f"{stat.filemode(status.st_mode)} {owner}"
    if os.access(DEVICE, os.R_OK | os.W_OK):
        return Check(name, "ok", detail)
    detail = f"{detail}: not for user {os.geteuid()}"
    return Check(name, "limited", detail, f"sudo setfacl -m u:$USER:rw {DEVICE}")


def _sysctl(full: bool) -> Check:
    name = "sysctl.vm.unprivileged_userfaultfd"
    value = machine.text(_SYSCTL)
    if value is None:
        detail = "absent: Linux before 5.2, or without CONFIG_USERFAULTFD"
        remedy = "" if full else "a kernel with CONFIG_USERFAULTFD"
        return Check(name, "ok" if full else "limited", detail, remedy)
    if value == "1":
        return Check(name, "ok", "1: everybody may serve every fault")
    detail = "0: without privilege, only faults taken in user mode"
    remedy = "" if full else "sudo sysctl vm.unprivileged_userfaultfd=1 (to keep it: a file in /etc/sysctl.d)"
    return Check(name, "ok" if full else "limited", detail, remedy)


def _privilege(full: bool) -> Check:
    effective = int(machine.fields("/proc/self/status").get("CapEff", "0"), 16)
    has = {name: bool(effective >> bit & 1) for name, bit in _CAPABILITIES.items()}
    detail = ", ".join(f"{name} {'yes' if held else 'no'}" for name, held in has.items())
    # The kernel asks for the capability in the first user namespace, which maps every id to itself.
    confined = (machine.text("/proc/self/uid_map") or "").split() != ["0", "0", "4294967295"]
    if confined:
        detail += "; inside a user namespace, where they do not count"
    if has["CAP_SYS_PTRACE"] and not confined:
        return Check("capabilities", "ok", detail)
    what = "fork events need" if full else "the system call and fork events need"
    remedy = "run as root, with docker --cap-add SYS_PTRACE, or systemd AmbientCapabilities=CAP_SYS_PTRACE"
    return Check("capabilities", "limited", f"{detail}; {what} CAP_SYS_PTRACE", remedy)


def _seccomp(opens: bool) -> Check:
    mode = machine.fields("/proc/self/status").get("Seccomp", "0")
    if mode == "0":
        return Check("seccomp", "ok", "off")
    if opens:
        return Check("seccomp", "ok", f"mode {mode}, which lets userfaultfd through")
    remedy = "allow userfaultfd in the profile, e.g. docker --security-opt seccomp=profile.json"
    return Check("seccomp", "limited", f"mode {mode}: may be what refuses userfaultfd", remedy)


def _no_new_privs(full: bool) -> Check:
    if machine.fields("/proc/self/status").get("NoNewPrivs", "0") == "0":
        return Check("no_new_privs", "ok", "off")
    detail = "on: sudo and file capabilities have no effect in here"
    if full:
        return Check("no_new_privs", "ok", detail)
    remedy = "start it without no_new_privs, or mend the rest from outside"
    return Check("no_new_privs", "limited", detail, remedy)


def features(capabilities: uf.Capabilities) -> Iterator[Check]:
    """Every feature of msg; without an answer of the kernel's all count as missing."""
    kernel = machine.kernel_version()
    for feature, version in SINCE.items():
        name, since = f"feature.{feature.name}", f"Linux {version[0]}.{version[1]}"
        if capabilities.features is None:
            remedy = "a kernel that speaks msg" if capabilities.apis else _OPEN_FIRST
            yield Check(name, "missing", f"unknown (since {since})", remedy)
        elif feature in capabilities.features:
            yield Check(name, "ok", f"since {since}")
        elif kernel < version:
            yield Check(name, "missing", f"since {since}", f"{since} or later")
        else:
            remedy = f"a kernel with {_BUILT_WITH.get(feature, f'UFFD_FEATURE_{feature.name}')} built in"
            yield Check(name, "missing", f"since {since}, but not built into this kernel", remedy)


def system(api: uf.Api | None) -> Iterator[Check]:
    """Kernel, memory, pages and limits."""
    release, version = os.uname().release, machine.kernel_version()
    if version < (4, 3):
        yield Check("kernel", "missing", release, "Linux 4.3 or later")
    else:
        yield Check("kernel", "ok", release)
    if api is None:
        yield Check("api", "missing", "nothing can be asked until a userfaultfd opens", _OPEN_FIRST)
    else:
        yield Check("api", "ok", f'"auto" chooses {api}')
    yield Check("page.base", "ok", human(uf.PAGE_SIZE))
    yield from _huge_pages()
    yield _memory()
    count = machine.text("/proc/sys/vm/max_map_count")
    low = count is not None and int(count) < _DEFAULT_MAX_MAP_COUNT
    yield Check(
        "sysctl.vm.max_map_count",
        "limited" if low else "ok",
        f"{count} mappings a process" if count else "unknown",
        f"sudo sysctl vm.max_map_count={_DEFAULT_MAX_MAP_COUNT}" if low else "",
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = 0 <= soft < _ENOUGH_FILES
    limits = " of at most ".join("unlimited" if n == resource.RLIM_INFINITY else str(n) for n in (soft, hard))
    remedy = f"ulimit -n {_ENOUGH_FILES}" if few else ""
    yield Check("rlimit.nofile", "limited" if few else "ok", f"{limits} descriptors", remedy)
    yield header()


def _huge_pages() -> Iterator[Check]:
    choices = machine.text(f"{_THP}/enabled")
    size = machine.text(f"{_THP}/hpage_pmd_size")
    if choices is None:
        remedy = "a kernel with CONFIG_TRANSPARENT_HUGEPAGE"
        yield Check("page.transparent_huge", "missing", "not built into this kernel", remedy)
    else:
        chosen = re.search(r"\[(\w+)\]", choices)
        setting = chosen[1] if chosen else choices
        detail = f"{setting}, {human(int(size))}" if size else setting
        if setting == "never":
            remedy = f"echo madvise | sudo tee {_THP}/enabled"
            yield Check("page.transparent_huge", "limited", f"{detail}: large fills stay small pages", remedy)
        else:
            yield Check("page.transparent_huge", "ok", detail)
    sizes = sorted(
        (int(found[1]) * 1024, machine.text(f"{path}/nr_hugepages") or "0")
        for path in (_HUGETLB.iterdir() if _HUGETLB.is_dir() else ())
        if (found := re.fullmatch(r"hugepages-(\d+)kB", path.name))
    )
    if sizes:
        detail = ", ".join(f"{human(size)} ({reserved} reserved)" for size, reserved in sizes)
        yield Check("page.hugetlb", "ok", detail)
    else:
        remedy = "only for hugetlbfs: a kernel with CONFIG_HUGETLBFS"
        yield Check("page.hugetlb", "missing", "no sizes", remedy)


def _memory() -> Check:
    memory = machine.memory()
    if not {"MemTotal", "MemAvailable"} <= memory.keys():
        return Check("memory", "limited", "unknown: /proc/meminfo cannot be read", "mount /proc")
    return Check("memory", "ok", f"{human(memory['MemAvailable'])} available of {human(memory['MemTotal'])}")


def header() -> Check:
    """The C header: userfault itself does without."""
    text, name = machine.text(_HEADER), "header"
    remedy = "only for C programs: install newer kernel headers (Debian: linux-libc-dev)"
    if text is None:
        return Check(name, "missing", f"no {_HEADER}", remedy)
    wanted = [f"UFFD_FEATURE_{flag.name}" for flag in uf.Feature]
    wanted += [f"UFFDIO_{flag.name}" for flag in uf.Ioctl]
    defined = set(re.findall(r"#define\s+(\w+)", text))
    if lacking := [constant for constant in wanted if constant not in defined]:
        return Check(name, "limited", f"lacks {', '.join(lacking)}", remedy)
    return Check(name, "ok", _HEADER)
