"""What the distributions carry, and that an outside extension can be built on the package."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import userfault as uf

ROOT = Path(__file__).parents[1]

CLIENT = """
from libc.stdint cimport uint64_t
from userfault cimport _abi
from userfault._ioctl cimport uffd_wake
from userfault._regions cimport RegionTable
from userfault._tree cimport enter, entry_t, find, leave


def where(RegionTable table, uint64_t address):
    cdef entry_t found
    cdef bint held
    cdef int ticket
    with nogil:
        ticket = enter(&table.tree)
        held = find(&table.tree, address, &found)
        leave(&table.tree, ticket)
    return (found.id, address - found.base) if held else None


def record_bytes():
    return sizeof(_abi.v1_record), sizeof(_abi.v2_record), sizeof(_abi.msg_record)


def wake_nothing():
    return uffd_wake(-1, 0, 0)
"""

SETUP = """
from setuptools import Extension, setup
from Cython.Build import cythonize
setup(name="client", ext_modules=cythonize([Extension("client", ["client.pyx"])]))
"""


def test_an_outside_extension_cimports_the_package(tmp_path: Path) -> None:
    (tmp_path / "client.pyx").write_text(CLIENT)
    (tmp_path / "setup.py").write_text(SETUP)
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=tmp_path, check=True, timeout=300
    )
    code = f"""
import client, userfault as uf
table = uf.RegionTable()
table.add(0x1000, 0x2000)
assert client.where(table, 0x2004) == (0, 0x1004)
assert client.where(table, 0x3000) is None
assert client.record_bytes() == (8, 16, 32)
assert client.wake_nothing() == -{9}  # EBADF
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=60)


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[set[str], set[str]]:
    """The names in the sdist, and in the wheel that is built from it."""
    out = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "build", "-o", str(out), str(ROOT)], check=True, timeout=900)
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    with tarfile.open(sdist) as tar:
        from_sdist = {name.partition("/")[2] for name in tar.getnames()}
    with zipfile.ZipFile(wheel) as archive:
        return from_sdist, set(archive.namelist())


def test_what_the_distributions_carry(distributions: tuple[set[str], set[str]]) -> None:
    sdist, wheel = distributions
    modules = [path.stem for path in (ROOT / "pyx").glob("*.pyx")]
    package = [
        path.relative_to(ROOT / "python").as_posix()
        for path in (ROOT / "python/userfault").rglob("*.py*")
        if path.suffix in (".py", ".pyi")
    ]
    package += [f"userfault/{path.name}" for path in (ROOT / "python/userfault").glob("*.pxd")]
    package.append("userfault/py.typed")
    for name in package:
        assert name in wheel
        assert f"python/{name}" in sdist
    for module in modules:
        assert f"pyx/{module}.pyx" in sdist
        assert any(name.startswith(f"userfault/{module}.") and name.endswith(".so") for name in wheel)
    for name in ("setup.py", "pyproject.toml", "pyx/_search.h", "LICENSE", "README.md", "tests/conftest.py"):
        assert name in sdist
    assert not [
        name
        for name in sdist
        if name.endswith((".so", ".c")) and not name.startswith(("bench/", "tests/native/"))
    ]
    assert not [name for name in wheel if name.endswith((".pyx", ".c", ".h"))]


def test_every_compiled_module_has_a_stub() -> None:
    package = Path(uf.__file__).parent
    for compiled in package.glob("*.so"):
        assert (package / f"{compiled.name.partition('.')[0]}.pyi").exists(), compiled.name
