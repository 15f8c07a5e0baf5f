"""The constants that the project defines by value, against the kernel header of this machine."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from userfault import _consts

# RFC names that no released header has, and names of our own.
OURS = ("UFFD_API_V2", "UFFD_BIT_", "UFFD_PAGEFAULT", "UFFD_FORK", "UFFD_V2_TYPE_SHIFT", "UFFDIO_MODE_")


def header_names() -> dict[str, tuple[str, int]]:
    """Header spelling to (our name, our value)."""
    names = {}
    for name, value in vars(_consts).items():
        if name.startswith("NR_"):
            names["_UFFDIO_" + name[3:]] = (name, value)
        elif name.startswith(("UFFD", "USERFAULTFD")) and not (
            name.startswith(OURS) and not name.startswith("UFFD_PAGEFAULT_FLAG")
        ):
            names[name] = (name, value)
    for call in ("COPY", "ZEROPAGE", "CONTINUE", "POISON", "MOVE"):
        names[f"UFFDIO_{call}_MODE_DONTWAKE"] = ("UFFDIO_MODE_DONTWAKE", _consts.UFFDIO_MODE_DONTWAKE)
    return names


def test_values_equal_the_headers(tmp_path: Path) -> None:
    compiler = shutil.which("cc")
    if compiler is None or not Path("/usr/include/linux/userfaultfd.h").exists():
        pytest.skip("needs a C compiler and <linux/userfaultfd.h> (linux-libc-dev)")
    names = header_names()
    lines = [
        "#include <stdio.h>",
        "#include <sys/ioctl.h>",
        "#include <linux/userfaultfd.h>",
        "int main(void) {",
    ]
    for name in names:
        lines += [f"#ifdef {name}", f'printf("{name} %llu\\n", (unsigned long long)({name}));', "#endif"]
    source = tmp_path / "print.c"
    source.write_text("\n".join([*lines, "return 0; }"]))
    subprocess.run([compiler, str(source), "-o", str(tmp_path / "print")], check=True)
    printed = subprocess.run([str(tmp_path / "print")], capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in (line.split() for line in printed.splitlines())}
    assert len(found) > 30
    assert found == {name: names[name][1] for name in found}
