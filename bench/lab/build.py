"""Builds the lab's kernel: Debian's 6.1 source, our file, our hook, our options.

Everything is kept under the cache folder, never in the repository: the unpacked
source (so that a rebuild after an edit is incremental) and one folder for each
image, named by the hash of all that went into it.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import hook

HERE = pathlib.Path(__file__).resolve().parent
SOURCE_PACKAGE = "linux-source-6.1"
TARBALL = pathlib.Path(f"/usr/src/{SOURCE_PACKAGE}.tar.xz")
PACKAGES = (
    "qemu-system-x86",
    SOURCE_PACKAGE,
    "gcc",
    "make",
    "libc6-dev",
    "flex",
    "bison",
    "bc",
    "libelf-dev",
    "xz-utils",
)
# One user, host and date for every build: the same inputs give the same image.
MAKE = (
    "make",
    "ARCH=x86_64",
    "KBUILD_BUILD_USER=lab",
    "KBUILD_BUILD_HOST=lab",
    "KBUILD_BUILD_VERSION=1",
    "KBUILD_BUILD_TIMESTAMP=2015-03-18 19:35:31 UTC",
)


class LabError(Exception):
    """What stops the lab before the guest's command ran; shown without a traceback."""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A built image and what it was made of."""

    image: pathlib.Path
    key: str
    sha256: str
    source: str
    gcc: str
    release: str
    seconds: float


def say(text: str) -> None:
    """The lab talks on stderr: stdout belongs to the guest's command."""
    print(f"lab: {text}", file=sys.stderr, flush=True)


def cache_folder() -> pathlib.Path:
    """Where sources, images and runs are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = pathlib.Path(base) / "userfault-lab"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def installed_version(package: str) -> str:
    """The installed version of a Debian package, or the empty string."""
    query = ["dpkg-query", "-W", "-f", "${db:Status-Abbrev} ${Version}", package]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise LabError("dpkg-query not found: the lab builds on Debian and its kin only") from None
    state, _, version = answer.stdout.partition(" ")
    return version.strip() if state.startswith("ii") else ""


def require_packages() -> None:
    """Name what is missing; install it only when LAB_APT=1 asks for that."""
    if platform.machine() != "x86_64":
        raise LabError(f"the lab builds natively for x86_64; this machine is {platform.machine()}")
    missing = [p for p in PACKAGES if not installed_version(p)]
    if not missing:
        return
    install = ["apt-get", "install", "-y", "--no-install-recommends", *missing]
    if os.geteuid() != 0:
        install.insert(0, "sudo")
    if os.environ.get("LAB_APT") != "1":
        raise LabError(
            f"Debian packages missing: {' '.join(missing)}\n"
            f"     install them yourself:  {' '.join(install)}\n"
            "     or have it done:        LAB_APT=1 in the environment"
        )
    say(" ".join(install))
    subprocess.run(install, check=True, stdout=sys.stderr)
    still = [p for p in missing if not installed_version(p)]
    if still:
        raise LabError(f"apt-get ran, but these are still missing: {' '.join(still)}")


def inputs() -> dict[str, str]:
    """All that decides what the image is."""

    def digest(path: pathlib.Path) -> str:
        return hashlib.sha256(path.read_bytes()).hexdigest()

    gcc = subprocess.run(["gcc", "--version"], capture_output=True, text=True, check=True)
    return {
        "source": f"{SOURCE_PACKAGE} {installed_version(SOURCE_PACKAGE)}",
        "gcc": gcc.stdout.splitlines()[0],
        "make": " ".join(MAKE),
        "uffd_rfc.c": digest(HERE / "kernel/uffd_rfc.c"),
        "config.fragment": digest(HERE / "kernel/config.fragment"),
        "hook.py": digest(HERE / "hook.py"),
    }


def key_of(parts: dict[str, str]) -> str:
    """The name of an image; the guest shows it in `uname -r`."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def unmet_options(fragment: str, config: str) -> list[str]:
    """Lines of the fragment that the final .config does not hold.

    Kconfig drops an option whose dependencies are missing without a word. An
    option that is to be off may also be absent.
    """
    final = set(config.splitlines())
    unmet = []
    for line in fragment.splitlines():
        off = re.fullmatch(r"# (CONFIG_\w+) is not set", line)
        if off:
            kept = [have for have in final if have.startswith(off[1] + "=")]
            unmet += [f"{line} (got {kept[0]})"] if kept else []
        elif line.startswith("CONFIG_") and line not in final:
            unmet.append(line)
    return unmet


def write_if_changed(path: pathlib.Path, text: str) -> None:
    """Keeps the time stamp, and with it make's work, when nothing changed."""
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def run_logged(argv: list[str], tree: pathlib.Path, log: pathlib.Path) -> None:
    """A build step; its output is shown only when it fails."""
    with log.open("ab") as out:
        out.write(f"\n$ {' '.join(argv)}\n".encode())
        out.flush()
        # Below everything else: a lab build must not disturb what runs beside it.
        nice = ["nice", "-n", "10", *argv]
        done = subprocess.run(nice, cwd=tree, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
    if done.returncode:
        tail = log.read_text(errors="replace").splitlines()[-40:]
        raise LabError("\n".join([*tail, f"{argv[0]} failed; the whole log: {log}"]))


@contextmanager
def locked(path: pathlib.Path) -> Iterator[None]:
    """One build at a time; a second lab run waits for the first one's image."""
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def unpack(cache: pathlib.Path, version: str) -> pathlib.Path:
    """The source tree for one version of the source package, unpacked once."""
    tree = cache / f"tree-{re.sub(r'[^0-9A-Za-z.+-]', '_', version)}"
    if not tree.exists():
        say(f"unpacking {TARBALL}")
        fresh = tree.with_suffix(".new")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
        # A third of the source is register tables of one graphics driver.
        skip = "--exclude=*/drivers/gpu/drm/amd/include"
        untar = ["tar", "-xf", str(TARBALL), "-C", str(fresh), "--strip-components=1", skip]
        subprocess.run(untar, check=True)
        shutil.copy2(fresh / "fs/userfaultfd.c", fresh / "userfaultfd.c.pristine")
        fresh.rename(tree)
    return tree


def configure(tree: pathlib.Path, fragment: str, log: pathlib.Path) -> None:
    """tinyconfig plus the fragment, then proof that the fragment arrived."""
    run_logged([*MAKE, "tinyconfig"], tree, log)
    with (tree / ".config").open("a") as config:
        config.write(fragment)
    run_logged([*MAKE, "olddefconfig"], tree, log)
    unmet = unmet_options(fragment, (tree / ".config").read_text())
    if unmet:
        raise LabError("options that did not reach the final .config:\n  " + "\n  ".join(unmet))


def ensure_kernel() -> Kernel:
    """The image for the present inputs, from the cache or built now."""
    require_packages()
    parts = inputs()
    key = key_of(parts)
    cache = cache_folder()
    home = cache / f"kernel-{key}"
    with locked(cache / "lock"):
        if not (home / "kernel.json").exists():
            build_into(home, key, parts)
    facts = json.loads((home / "kernel.json").read_text())
    image = home / "bzImage"
    if hashlib.sha256(image.read_bytes()).hexdigest() != facts["sha256"]:
        raise LabError(f"{image} is not what was built; remove {home}")
    return Kernel(image=image, **facts)


def build_into(home: pathlib.Path, key: str, parts: dict[str, str]) -> None:
    """Unpack, hook, configure, make; `home` appears only when all of it worked."""
    started = time.monotonic()
    cache = home.parent
    tree = unpack(cache, parts["source"])
    log = cache / "build.log"
    log.write_text("")
    try:
        hooked = hook.apply((tree / "userfaultfd.c.pristine").read_text())
    except hook.AnchorError as error:
        raise LabError(f"the hook does not fit {parts['source']}: {error}") from None
    write_if_changed(tree / "fs/userfaultfd.c", hooked)
    write_if_changed(tree / "fs/uffd_rfc.c", (HERE / "kernel/uffd_rfc.c").read_text())
    configure(tree, (HERE / "kernel/config.fragment").read_text(), log)
    jobs = f"-j{len(os.sched_getaffinity(0))}"
    say(f"building kernel {key} ({jobs}; minutes the first time, seconds after an edit)")
    run_logged([*MAKE, jobs, f"LOCALVERSION=-uffd-rfc-{key}", "bzImage"], tree, log)

    fresh = home.with_suffix(".new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    image = tree / "arch/x86/boot/bzImage"
    shutil.copy2(image, fresh / "bzImage")
    shutil.copy2(tree / ".config", fresh / "config")
    shutil.copy2(log, fresh / "build.log")
    facts = {
        "key": key,
        "sha256": hashlib.sha256(image.read_bytes()).hexdigest(),
        "source": parts["source"],
        "gcc": parts["gcc"],
        "release": (tree / "include/config/kernel.release").read_text().strip(),
        "seconds": round(time.monotonic() - started, 1),
    }
    (fresh / "kernel.json").write_text(json.dumps(facts, indent=1) + "\n")
    fresh.rename(home)
    say(f"built {facts['release']} in {facts['seconds']} s")


if __name__ == "__main__":
    try:
        print(ensure_kernel().image)
    except LabError as stop:
        say(str(stop))
        sys.exit(3)
