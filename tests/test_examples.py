"""The examples run as they stand, with little data, and print what they say they print."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import userfault as uf
from support import PAGE

EXAMPLES = Path(__file__).parents[1] / "examples"
MIB = 1 << 20

# What a module of this name on the path does to an example that asks for the real one.
MISSING = "raise ModuleNotFoundError(f'No module named {__name__!r}', name=__name__)\n"


def run(name: str, *arguments: object, without: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run an example, killed after two minutes; `without`: a folder with modules that are to be missing."""
    folders = [without, Path(uf.__file__).parents[1]] if without else [Path(uf.__file__).parents[1]]
    return subprocess.run(
        [sys.executable, "-W", "error", EXAMPLES / f"{name}.py", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders))},
        capture_output=True,
        text=True,
        timeout=120,
    )


def output(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr
    return done.stdout


def missing(folder: Path, module: str) -> Path:
    (folder / f"{module}.py").write_text(MISSING)
    return folder


def found(pattern: str, text: str) -> list[float]:
    """The numbers in a line of the output."""
    match = re.search(pattern, text)
    assert match, text
    return [float(number.replace(",", "")) for number in match.groups()]


def test_out_of_core_sort(needs_privilege: None) -> None:
    text = output(run("out_of_core_sort", "--bytes", 24 * MIB, "--memory", 4 * MIB))
    assert found(r"([\d,]+) numbers \(([\d.]+) MiB\) sorted", text) == [3 * MIB, 24]
    most, without, limit = found(r"RssAnon: ([\d.]+) MiB at the most, ([\d.]+) without; limit ([\d.]+)", text)
    assert limit == 4
    # Beside the pages there are the threads that bring them, and what numpy and rich are given meanwhile.
    assert 2 < most - without < limit + 8
    faults, written = found(r"([\d,]+) faults, ([\d,]+) pages written back", text)
    assert faults > 0
    assert written >= 2 * 24 * MIB / PAGE - 4 * MIB / PAGE  # both files, but for what sorting left as it was


@pytest.mark.parametrize("n", [1, 511, 1_000_003])
def test_out_of_core_sort_of_a_given_file(needs_privilege: None, tmp_path: Path, n: int) -> None:
    """Without rich, too."""
    numbers = np.random.default_rng(n).integers(-50, 50, n)  # many are the same
    path = tmp_path / "numbers.bin"
    numbers.tofile(path)
    bare = tmp_path / "without"
    bare.mkdir()
    text = output(run("out_of_core_sort", path, "--memory", MIB, without=missing(bare, "rich")))
    assert text.startswith(".")
    assert np.array_equal(np.fromfile(f"{path}.sorted", np.int64), np.sort(numbers))
    assert np.array_equal(np.sort(np.fromfile(path, np.int64)), np.sort(numbers))


@pytest.mark.parametrize("limit", [(), ("--memory", 8 * MIB)], ids=["no limit", "8 MiB"])
def test_virtual_array(needs_privilege: None, limit: tuple[object, ...]) -> None:
    pytest.importorskip("numba")
    text = output(run("virtual_array", "--touch", 64 * MIB, *limit))
    assert found(r"([\d,]+) bytes opened in", text) == [1 << 40]
    assert found(r"([\d,]+) MiB touched", text) == [64]
    faults, pages, let_go = found(
        r"([\d,]+) faults, ([\d,]+) pages computed, ([\d,]+) let go of\nclosed in", text
    )
    assert faults > 0
    # Its places are random: hardly two are the same. What is read ahead of each is no more than it is long.
    assert 60 * MIB / PAGE < pages < 4 * 64 * MIB / PAGE
    assert let_go > 50 * MIB / PAGE if limit else let_go == 0


def test_decompress(needs_privilege: None) -> None:
    pytest.importorskip("numba")
    text = output(run("decompress", "--bytes", 8 * MIB))
    nbytes, compressed = found(r"(\d+) MiB compressed to ([\d.]+)\n", text)
    assert nbytes == 8
    assert compressed < 4
    assert found(r"one number: (\d+) KiB decompressed", text) == [64]
    assert text.endswith("right\n")


@pytest.mark.parametrize("name", ["decompress", "virtual_array"])
def test_without_numba(name: str, tmp_path: Path) -> None:
    done = run(name, without=missing(tmp_path, "numba"))
    assert done.returncode == 1
    assert done.stderr == "this example compiles a function with numba: pip install numba\n"


def test_http_zarr(needs_privilege: None, tmp_path: Path) -> None:
    """The slice lies in four chunks of 256, and what was fetched is those."""
    pytest.importorskip("zarr")
    text = output(run("http_zarr", tmp_path / "slice.png"))
    array, part = found(r"([\d,]+) bytes in the array, ([\d,]+) in the slice", text)
    fetched, stored = found(r"([\d,]+) bytes fetched of ([\d,]+) stored", text)
    assert (array, part) == (4096 * 4096 * 8, 200 * 300 * 8)
    assert 0 < fetched < stored / 10
    assert (tmp_path / "slice.png").read_bytes().startswith(b"\x89PNG")
