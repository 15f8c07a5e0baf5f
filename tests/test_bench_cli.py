"""`userfault bench`: its arguments, small native runs, the plots, and the comparison with a baseline."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import arrays_workloads
import baseline
import compare
import lab_read
import serve_contenders
import serve_turns
import userfault as uf
from userfault.cli import (
    bench,
    bench_array_report,
    bench_report,
    bench_script,
    bench_serve_report,
    bench_stores_report,
)
from userfault.cli.app import cli
from userfault.plot import array_cost, read_cost, stores_cost

ROOT = Path(__file__).parents[1]
MAIN = "from userfault.cli import main; main()"


def run(
    *arguments: str, command: str = "read", cwd: Path = ROOT, before: str = "", timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, which a hang cannot outlive."""
    path = str(Path(uf.__file__).parents[1])
    return subprocess.run(
        [sys.executable, "-c", f"{before}\n{MAIN}", "bench", command, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": path},
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--wires", "v3"], "'v3' is no wire"),
        (["--wires", ""], "'' is no wire"),
        (["--batches", "0"], "'0' is not a number of records"),
        (["--batches", "1,4097"], "'4097' is not a number of records"),
        (["--batches", "x"], "'x' is not a number of records"),
        (["--rounds", "0"], "not in the range"),
        (["--json", "/no/such/folder/f.json"], "no such folder"),
        (["--plot", "/no/such/folder/f.png"], "no such folder"),
        (["--plot", "f.gif"], "must end in .png, .svg or .pdf"),
    ],
)
def test_what_it_does_not_accept(arguments: list[str], says: str) -> None:
    result = CliRunner().invoke(cli, ["bench", "read", *arguments])
    assert result.exit_code == 2
    assert says in " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--rounds", "0"], "not in the range"),
        (["--json", "/no/such/folder/f.json"], "no such folder"),
        (["--plot", "f.gif"], "must end in .png, .svg or .pdf"),
    ],
)
@pytest.mark.parametrize("command", ["serve", "array", "stores"])
def test_what_the_others_do_not_accept(command: str, arguments: list[str], says: str) -> None:
    result = CliRunner().invoke(cli, ["bench", command, *arguments])
    assert result.exit_code == 2
    assert says in " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize("command", ["read", "serve", "array", "stores"])
def test_outside_a_checkout_it_says_so(command: str, tmp_path: Path) -> None:
    done = run(command=command, cwd=tmp_path)
    assert done.returncode == 1
    assert "clone the project" in done.stderr


def test_the_checkout_is_found_from_below() -> None:
    assert bench_script.checkout(ROOT / "bench" / "lab") == ROOT / "bench"


@pytest.mark.parametrize("command", ["read", "serve", "array", "stores"])
def test_without_matplotlib_it_says_what_to_install(command: str) -> None:
    done = run("--plot", "x.png", command=command, before="import sys; sys.modules['matplotlib'] = None")
    assert done.returncode == 1
    assert done.stderr.strip().endswith("pip install 'userfault[plot]'")
    assert len(done.stderr.splitlines()) == 1


def test_what_does_not_end_is_stopped(tmp_path: Path) -> None:
    script = tmp_path / "slow.py"
    script.write_text("import time; time.sleep(60)")
    with pytest.raises(bench_script.BenchError, match=r"slow\.py did not end within 0.5 s"):
        bench_script.run([str(script)], 0.5)


def test_of_a_failure_the_reason_is_shown(tmp_path: Path) -> None:
    script = tmp_path / "wrong.py"
    script.write_text("raise RuntimeError('no such luck')")
    with pytest.raises(bench_script.BenchError, match=r"^RuntimeError: no such luck$"):
        bench_script.run([str(script)], 60)


@pytest.mark.usefixtures("needs_uffd")
def test_a_small_native_run(tmp_path: Path) -> None:
    document, picture = tmp_path / "f.json", tmp_path / "f.png"
    done = run("--batches", "64,1", "--rounds", "2", "--json", str(document), "--plot", str(picture))
    assert done.returncode == 0, done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG\r\n")
    facts = json.loads(document.read_text())
    assert facts["batches"] == [1, 64]
    assert facts["rounds"] == 2
    assert "lab" not in facts
    rows = {(row["source"], row["api"], row["batch"]): row for row in facts["native"]}
    spoken = uf.probe().apis
    expected = {("pipe", api, batch) for api in bench.WIRES for batch in (1, 64)}
    assert set(rows) == expected | {("crowd", str(api), batch) for api in spoken for batch in (1, 64)}
    for row in facts["native"]:
        assert min(row["ours_ns"], row["c_ns"], row["struct_ns"]) > 0
        assert row["ours_ns_per_record"] == pytest.approx(row["ours_ns"] / row["batch"])
        assert row["ours_to_c"] == pytest.approx(row["ours_ns"] / row["c_ns"])
        assert row["pending"] >= (1024 if row["source"] == "crowd" else row["batch"])
    for word in ("ratio to C", "os.read+struct", "pipe"):
        assert word in done.stdout


@pytest.mark.usefixtures("needs_uffd")
def test_a_quick_run_of_serve(tmp_path: Path) -> None:
    document, picture = tmp_path / "f.json", tmp_path / "f.png"
    options = ["--quick", "--rounds", "1", "--json", str(document), "--plot", str(picture)]
    done = run(*options, command="serve")
    assert done.returncode == 0, done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG\r\n")
    facts = json.loads(document.read_text())
    assert facts["rounds"] == 1
    assert facts["quick"]
    workloads = {"random", "sequential", "ranges", "pending", "fill", "idle"}
    workloads |= set() if uf.probe().user_mode_only else {"close"}
    assert {row["workload"] for row in facts["serve"]} == workloads
    touched = {
        (row["backing"], row["touchers"], row["contender"])
        for row in facts["serve"]
        if row["workload"] == "random"
    }
    assert touched == {
        (backing, touchers, contender)
        for backing in serve_contenders.BACKINGS
        for touchers in (1, 4, 16, 64)
        for contender in serve_contenders.CONTENDERS
        if touchers == 1 or contender not in (serve_contenders.PINNED, serve_contenders.PAIR)
    }
    goals = [figure["met"] for row in facts["serve"] for figure in row["figures"] if figure["goal"]]
    assert f"{sum(goals)} of {len(goals)} goals are met." in done.stdout


@pytest.mark.usefixtures("needs_uffd")
def test_a_quick_run_of_serve_inline(tmp_path: Path) -> None:
    document, picture = tmp_path / "f.json", tmp_path / "f.png"
    options = [
        "--mode",
        "inline",
        "--quick",
        "--rounds",
        "1",
        "--json",
        str(document),
        "--plot",
        str(picture),
    ]
    done = run(*options, command="serve")
    assert done.returncode == 0, done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG\r\n")
    facts = json.loads(document.read_text())
    assert facts["mode"] == "inline"
    assert {row["workload"] for row in facts["serve"]} == {"random", "sequential"}
    touched = {row["contender"] for row in facts["serve"] if row["workload"] == "random"}
    assert touched == set(serve_contenders.INLINE_CONTENDERS)
    assert "goals are met." in done.stdout


@pytest.mark.usefixtures("needs_uffd")
def test_a_quick_run_of_array(tmp_path: Path) -> None:
    document, picture = tmp_path / "f.json", tmp_path / "f.png"
    options = ["--quick", "--rounds", "1", "--json", str(document), "--plot", str(picture)]
    done = run(*options, command="array")
    assert done.returncode == 0, done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG\r\n")
    facts = json.loads(document.read_text())
    assert facts["rounds"] == 1
    assert facts["quick"]
    found: dict[tuple[str, str], set[str]] = {}
    for row in facts["array"]:
        found.setdefault((row["workload"], row["case"]), set()).add(row["contender"])
    assert found == {
        ("scan", "sum of all"): {"lazy", "lazy, 2 MiB", "fromfile", "memmap"},
        ("scan", "first element"): {"lazy", "lazy, 2 MiB", "fromfile", "memmap"},
        ("gather", "1,000 elements"): {
            *("lazy", "lazy, inline", "lazy, pair", "lazy, prefetch"),
            *("fromfile", "memmap"),
        },
        ("threads", "random pages, 4 threads"): {"lazy", "memmap", "pread in C", "os.pread"},
        ("limit", "scan"): {"limited", "no limit"},
        ("limit", "random pages"): {"limited", "no limit"},
        ("limit", "resident, scan"): {"limited"},
        ("limit", "resident, 8 threads"): {"limited"},
        ("inflate", "sum of all"): {"lazy", "all, Python", "all, C"},
        ("inflate", "1,000 elements"): {"lazy", "lazy, prefetch", "all, Python", "all, C"},
    }
    figures = [figure for row in facts["array"] for figure in row["figures"]]
    assert any("limit of 3.2 MiB" in figure["what"] for figure in figures)  # a tenth of the little
    goals = [figure["met"] for figure in figures if figure["goal"]]
    assert len(goals) == 8
    assert f"{sum(goals)} of {len(goals)} goals are met." in done.stdout


def test_goals_of_array_in_words_and_drawn(tmp_path: Path) -> None:
    seconds = {"lazy": np.array([0.2, 0.3]), "fromfile": np.array([0.4, 0.5]), "memmap": np.array([0.1, 0.1])}
    case = arrays_workloads.Case("scan", "sum of all", compare.Comparison(seconds), "ms", 1e3)
    rows = case.rows()
    rows["lazy"]["figures"] = [
        case.time("lazy", "fromfile", 0.5),
        case.percent("lazy", "fromfile", 60),
        case.more("lazy", "memmap", 100),
        case.time("lazy", "memmap"),
    ]
    assert rows["lazy"]["best"] == pytest.approx(200)
    assert rows["lazy"]["median"] == pytest.approx(250)
    figures = rows["lazy"]["figures"]
    assert [figure["value"] for figure in figures] == pytest.approx([0.55, 55, 150, 2.5])
    assert [figure["of_bests"] for figure in figures] == pytest.approx([0.5, 50, 100, 2])
    assert [figure["met"] for figure in figures] == [False, True, False, None]
    assert [figure["at"] for figure in figures[:3]] == pytest.approx([225, 270, 200])
    assert bench_array_report.verdict(list(rows.values())).splitlines() == [
        "1 of 3 goals are met.",
        "Missed: scan, sum of all: time of lazy / fromfile 0.55 (goal <= 0.5)",
        "Missed: scan, sum of all: lazy beyond memmap, % 150 (goal <= 100)",
    ]
    facts = {"kernel": "6.18", "processor": "some", "rounds": 2, "array": list(rows.values())}
    array_cost(facts, str(tmp_path / "array.png"))
    assert (tmp_path / "array.png").read_bytes().startswith(b"\x89PNG\r\n")


@pytest.mark.usefixtures("needs_uffd")
def test_a_small_run_of_stores(tmp_path: Path) -> None:
    for library in ("zarr", "dask.array", "scipy"):
        pytest.importorskip(library)
    document, picture = tmp_path / "f.json", tmp_path / "f.png"
    options = ["--bytes", str(4 << 20), "--rounds", "1", "--json", str(document), "--plot", str(picture)]
    done = run(*options, command="stores")
    assert done.returncode == 0, done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG\r\n")
    facts = json.loads(document.read_text())
    assert (facts["rounds"], facts["nbytes"]) == (1, 4 << 20)
    found: dict[tuple[str, str], set[str]] = {}
    for row in facts["stores"]["rows"]:
        found.setdefault((row["workload"], row["case"]), set()).add(row["contender"])
        assert 0 < row["best"] <= row["median"]
    lazy = {"lazy", "lazy, materialize"}
    every_array = {
        ("gather", "4 elements"): {
            "lazy",
            "lazy, prefetch",
            "zarr by turns",
            "zarr.vindex",
            "zarr, all first",
            "dask",
        },
        ("scan", "sum of all"): lazy | {"zarr, all first"},
        ("again", "sum"): lazy | {"ndarray"},
        ("again", "1,000,000 elements"): lazy | {"ndarray"},
    }
    assert found == {
        **{
            (kind, f"{name}: {case}"): by
            for name in ("1-D", "2-D")
            for (kind, case), by in every_array.items()
        },
        ("window", "uniform_filter, 256 x 256"): {"lazy", "lazy, prefetch", "zarr"},
        ("fault", "random pages, threads: 1"): {"lazy, Pager", "lazy, Buffer"},
        ("fault", "random pages, threads: 8"): {"lazy, Pager", "lazy, Buffer"},
        ("open", "open"): {"lazy", "lazy, Pager", "zarr.open"},
        ("open", "close"): {"lazy", "lazy, Pager"},
    }
    goals = [figure["met"] for row in facts["stores"]["rows"] for figure in row["figures"] if figure["goal"]]
    assert len(goals) == 12
    assert f"{sum(goals)} of {len(goals)} goals are met." in done.stdout


def test_stores_says_which_library_it_needs() -> None:
    before = "import sys; sys.modules['scipy.ndimage'] = None; sys.path.insert(0, 'bench'); import stores"
    done = run(command="stores", before=before)
    assert done.returncode == 1
    assert done.stderr.strip() == "stores.py needs scipy: pip install zarr 'dask[array]' scipy"


def test_figures_of_stores_on_the_terminal_and_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = {"lazy": np.array([0.2, 0.3]), "zarr, all first": np.array([0.4, 0.5])}
    case = arrays_workloads.Case("scan", "1-D: sum of all", compare.Comparison(seconds), "ms", 1e3)
    rows = [row | {"peak_mib": 1024.0} for row in case.rows().values()]
    rows[0]["figures"] = [case.time("lazy", "zarr, all first", 0.5)]
    opened = {"workload": "open", "case": "open", "contender": "lazy", "unit": "ms", "best": 1.0}
    rows.append(opened | {"median": 2.0, "peak_mib": 0.0, "figures": []})
    about = {"name": "1-D", "shape": [4096], "chunks": [512], "dtype": "float64", "nbytes": 1 << 20}
    found = {"arrays": [about | {"compressed": 3.0}], "rows": rows}
    facts = bench_script.facts(rounds=2) | {"stores": found}
    bench_stores_report.show(facts)
    said = " ".join(capsys.readouterr().out.split())
    assert "1-D: 4,096 float64 in chunks of 512, 1 MiB, which zstd made 3.0 times as small" in said
    assert "Missed: scan, 1-D: sum of all: time of lazy / zarr, all first 0.55 (goal <= 0.5)" in said
    assert "Opening and closing" in said
    stores_cost(facts, str(tmp_path / "stores.png"))
    assert (tmp_path / "stores.png").read_bytes().startswith(b"\x89PNG\r\n")


def served_rows() -> list[dict[str, Any]]:
    """What serve.py might find: one goal met, one missed, and a ratio without a goal."""
    figures = [
        serve_turns.judged("speed of ours / (b) C", 10.0, (">=", 10)),
        serve_turns.judged("time of ours / memcpy", 1.2, ("<=", 1.15)),
        serve_turns.judged("speed of ours / (a) C", 3.0),
    ]
    row = {"workload": "random", "backing": "memory", "touchers": 1, "contender": "ours", "unit": "ns/page"}
    return [row | {"best": 900.0, "median": 1000.0, "figures": figures}]


def test_goals_in_words() -> None:
    assert [serve_turns.in_words(figure) for figure in served_rows()[0]["figures"]] == [
        "speed of ours / (b) C: 10.00 (goal >= 10: met)",
        "time of ours / memcpy: 1.20 (goal <= 1.15: MISSED)",
        "speed of ours / (a) C: 3.00",
    ]
    assert bench_serve_report.verdict(served_rows()).splitlines() == [
        "1 of 2 goals are met.",
        "Missed: random, memory, 1 touchers: time of ours / memcpy 1.20 (goal <= 1.15)",
    ]


def lab_facts() -> dict[str, Any]:
    """What the lab might find: v2 costs 25 instructions a record more in the kernel, and 30 a fault."""
    read = [
        {"api": api, "batch": batch, "c": kernel * batch, "struct": (kernel + 400) * batch}
        | {"kernel": kernel, "user": 2000 / batch}
        for api, per_record in (("v1", 200), ("v2", 225))
        for batch in (1, 512)
        for kernel in [per_record + 400 / batch]
    ]
    served = [
        {"api": api, "source": "zero", "touchers": 1, "records_per_read": 1.0, "fault": fault}
        for api, fault in (("v1", 7500.0), ("v2", 7530.0))
    ]
    found = {"kernel": "6.1.0-lab", "boots": 2, "read": read, "served": served}
    return {"wires": ["v1", "v2"], "batches": [1, 512], "lab": found}


def test_the_labs_figures_in_words() -> None:
    said = bench_report.verdict(lab_facts())
    assert "25 instructions more (201 to 226, +12%" in said
    assert "the user's side none" in said
    assert "+0.4% (7,500 to 7,530)" in said
    assert "12.7 times cheaper (v1: 2,600 to 205 instructions)" in bench_report.decoding(lab_facts())
    assert bench_report.verdict({"wires": ["v1", "v2"], "batches": [1]}) == ""


def test_the_labs_figures_drawn(tmp_path: Path) -> None:
    read_cost(lab_facts(), str(tmp_path / "lab.png"))
    assert (tmp_path / "lab.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_each_wire_has_a_boot_that_speaks_it() -> None:
    v1 = ["--param", "v1_api=0xAA"]
    assert lab_read.boots_for(["v1", "v2", "msg"]) == [(v1, ["v1", "v2"]), ([], ["v2", "msg"])]
    assert lab_read.boots_for(["v1"]) == [(v1, ["v1"])]
    assert lab_read.boots_for(["v2"]) == [([], ["v2"])]
    assert lab_read.boots_for(["msg"]) == [([], ["msg"])]


def test_boots_are_merged() -> None:
    rows = [{"api": "v2", "batch": 1, "c": c, "ours": 2000.0, "c_median": c} for c in (600.0, 603.0)]
    rows.append({"api": "v1", "batch": 1, "c": 500.0, "ours": 1000.0})
    v1, v2 = lab_read.merged(rows, ("api", "batch"))
    assert v1 == {"api": "v1", "batch": 1, "c": 500.0, "ours": 1000.0, "boots": 1, "spread": 0.0}
    assert v2 == {"api": "v2", "batch": 1, "c": 600.0, "ours": 2000.0, "boots": 2} | {
        "spread": pytest.approx(0.005)
    }
    rows = [{"api": "v1", "source": "zero", "fault": fault} for fault in (7500.0, 7400.0, 7600.0)]
    assert lab_read.merged(rows, ("api", "source"))[0]["fault"] == 7500.0


def entry(figures: dict[str, float], **toolchain: str) -> dict[str, Any]:
    return {"counted_by": "callgrind", "toolchain": toolchain, "instructions_per_call": figures}


def test_baseline_fails_only_above_five_percent() -> None:
    recorded = [entry({"read": 100.0, "lookup": 100.0}, python="3.11")]
    assert baseline.check(recorded, entry({"read": 105.0, "lookup": 50.0}, python="3.11"))[0] == 0
    status, lines = baseline.check(recorded, entry({"read": 105.1, "lookup": 100.0}, python="3.11"))
    assert status == 1
    assert lines[1:] == ["  read: 100.0 -> 105.1 instructions (+5.1%)"]


def test_baseline_fails_when_a_figure_is_gone() -> None:
    status, lines = baseline.check([entry({"read": 100.0})], entry({"new": 1.0}))
    assert status == 1
    assert "not counted any more" in lines[1]


def test_baseline_of_another_toolchain_is_not_compared() -> None:
    recorded = [entry({"read": 1.0}, python="3.11", cc="12"), entry({"read": 1.0}, python="3.10", cc="11")]
    status, lines = baseline.check(recorded, entry({"read": 9.0}, python="3.11", cc="13"))
    assert status == 0
    assert lines[1:] == ["  cc: 12 recorded, 13 here"]
    assert baseline.check([], entry({"read": 9.0}))[0] == 0


def test_baseline_holds_one_entry_a_toolchain() -> None:
    first, second = entry({"read": 1.0}, python="3.11"), entry({"read": 2.0}, python="3.12")
    entries = baseline.update(baseline.update([], first), second)
    assert entries == [first, second]
    again = entry({"read": 3.0}, python="3.11")
    assert baseline.update(entries, again) == [second, again]


def test_baseline_reads_callgrinds_files(tmp_path: Path) -> None:
    few, many = baseline.counted.FEW, baseline.counted.MANY
    # The first pair warmed up: the last of each name counts.
    for part, (calls, total) in enumerate([(few, 99_999), (many, 99_999), (few, 1_800), (many, 5_000)], 1):
        text = f"version: 1\ndesc: Trigger: Client Request: read/v1/8:{calls}\nsummary: {total}\n"
        (tmp_path / f"out.{part}").write_text(text)
    (tmp_path / "out.10").write_text("desc: Trigger: Program termination\nsummary: 5\n")
    assert baseline.parse(tmp_path) == {"read/v1/8": 100.0}


def test_the_recorded_baseline_is_whole() -> None:
    entries = json.loads(baseline.FILE.read_text())
    assert {recorded["counted_by"] for recorded in entries} == {"callgrind", "icount"}
    for recorded in entries:
        assert {"python", "numpy", "cython", "compiler", "cc"} <= recorded["toolchain"].keys()
        assert all(figure > 0 for figure in recorded["instructions_per_call"].values())
    keys = [(recorded["counted_by"], tuple(recorded["toolchain"].items())) for recorded in entries]
    assert len(set(keys)) == len(keys)
