"""The host's side of bench/lab, without a kernel, QEMU or a package manager."""

from __future__ import annotations

import importlib
import json
import os
import pathlib
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

LAB = pathlib.Path(__file__).resolve().parent.parent / "bench" / "lab"
NAMES = ("hook", "build", "boot", "report", "run", "suite")

SOURCE = """\
static ssize_t userfaultfd_read(struct file *file);

static ssize_t userfaultfd_read(struct file *file)
{
\tuserfaultfd_api(ctx);
\tfor (;;) {
\t}
}

static int userfaultfd_api(struct ctx *ctx,
\t\t\t   unsigned long arg)
{
\tfeatures = uffdio_api.features;
}
"""

# Stands in for QEMU: finds the run folder in its arguments and plays the guest.
FAKE_QEMU = """#!/bin/sh
for word; do case $word in
*mount_tag=lab-run*) run=${word#local,path=}; run=${run%%,mount_tag*} ;;
file:*) echo "console: kernel talks" >"${word#file:}"; console=${word#file:} ;;
esac; done
%s
"""
BOOTED = 'echo "Linux 6.1-test" >"$run/uname"; : >"$run/started"; '
JOB = '(sh "$run/job.sh" >>"$run/stdout" 2>>"$run/stderr"; echo $? >"$run/status")'


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> Iterator[SimpleNamespace]:
    """The lab's modules, imported as run.py imports them, and forgotten again."""
    known = {name: sys.modules.pop(name, None) for name in NAMES}
    monkeypatch.syspath_prepend(str(LAB))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in NAMES})
    for name, module in known.items():
        sys.modules.pop(name, None)
        if module is not None:
            sys.modules[name] = module


def test_the_hook_goes_where_its_anchors_are(lab: SimpleNamespace) -> None:
    lines = lab.hook.apply(SOURCE).splitlines()
    assert lines.index('#include "uffd_rfc.c"') + 2 == lines.index(
        "static ssize_t userfaultfd_read(struct file *file)"
    ), "before the definition, not before the prototype"
    test = lines.index("\tif (ctx->features & UFFD_RFC_FORMATS)")
    assert lines[test + 3] == "\tfor (;;) {"
    call = lines.index("\tif (uffd_rfc_api(ctx, buf, uffdio_api.api, &ret))")
    assert lines[call - 1] == "\tfeatures = uffdio_api.features;"
    added = [line for line in lines if line not in SOURCE.splitlines() and line]
    assert all("uffd_rfc" in line.lower() or line == "\t\tgoto out;" for line in added)


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("for (;;) {", "while (1) {", r"'for \(;;\) {' found 0 times in userfaultfd_read"),
        ("\tfor (;;) {\n", "\tfor (;;) {\n\tfor (;;) {\n", "found 2 times"),
        ("userfaultfd_api(struct", "userfaultfd_ipa(struct", r"userfaultfd_api\(\) 0 times"),
        ("features =", "f =", "found 0 times in userfaultfd_api"),
        ("\tuserfaultfd_api(ctx);", '#include "uffd_rfc.c"', "hooked already"),
    ],
)
def test_a_source_that_does_not_fit(lab: SimpleNamespace, old: str, new: str, complaint: str) -> None:
    with pytest.raises(lab.hook.AnchorError, match=complaint):
        lab.hook.apply(SOURCE.replace(old, new))


def test_options_that_kconfig_dropped(lab: SimpleNamespace) -> None:
    fragment = "# why\nCONFIG_A=y\nCONFIG_B=y\n# CONFIG_C is not set\n# CONFIG_D is not set\n"
    assert lab.build.unmet_options(fragment, "CONFIG_A=y\nCONFIG_B=y\n") == []
    assert lab.build.unmet_options(fragment, "CONFIG_A=y\nCONFIG_C=y\nCONFIG_BB=y\n") == [
        "CONFIG_B=y",
        "# CONFIG_C is not set (got CONFIG_C=y)",
    ]


def test_the_fragment_asks_for_what_the_lab_stands_on() -> None:
    fragment = (LAB / "kernel/config.fragment").read_text().splitlines()
    for option in ("USERFAULTFD", "9P_FS", "OVERLAY_FS", "MAGIC_SYSRQ", "RANDOM_TRUST_CPU"):
        assert f"CONFIG_{option}=y" in fragment


def test_the_licence_of_the_kernel_file() -> None:
    first = (LAB / "kernel/uffd_rfc.c").read_text().splitlines()[0]
    assert first == "// SPDX-License-Identifier: GPL-2.0"


def test_every_input_names_another_image(lab: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab.build, "installed_version", lambda package: "6.1.1-1")
    parts = lab.build.inputs()
    assert {"source", "gcc", "uffd_rfc.c", "config.fragment", "hook.py"} <= set(parts)
    keys = {lab.build.key_of(parts | {name: "other"}) for name in parts}
    assert len(keys) == len(parts)
    assert lab.build.key_of(parts) not in keys


def test_missing_packages_are_named_and_not_installed(
    lab: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr(lab.build.subprocess, "run", lambda argv, **_: ran.append(argv))
    monkeypatch.setattr(lab.build.platform, "machine", lambda: "x86_64")
    have = {"gcc", "make"}
    monkeypatch.setattr(lab.build, "installed_version", lambda p: "1" if p in have else "")
    monkeypatch.delenv("LAB_APT", raising=False)
    with pytest.raises(lab.build.LabError, match=r"missing: qemu-system-x86 linux-source-6.1 .*\n"):
        lab.build.require_packages()
    assert ran == []
    monkeypatch.setenv("LAB_APT", "1")
    with pytest.raises(lab.build.LabError, match="still missing"):
        lab.build.require_packages()
    assert ran[0][-len(lab.build.PACKAGES) + 2 :] == [p for p in lab.build.PACKAGES if p not in have]


def test_a_failed_step_shows_the_end_of_its_log(lab: SimpleNamespace, tmp_path: pathlib.Path) -> None:
    with pytest.raises(lab.build.LabError, match=r"(?s)no such rule.*build\.log"):
        lab.build.run_logged(["sh", "-c", "echo no such rule; exit 2"], tmp_path, tmp_path / "build.log")


def make_job(lab: SimpleNamespace, **changes: Any) -> Any:
    settings = {"command": ["true"], "cwd": pathlib.Path("/"), "env": {}} | changes
    return lab.boot.Job(**settings)


def test_the_machine(lab: SimpleNamespace, tmp_path: pathlib.Path) -> None:
    job = make_job(lab, params={"v1_api": "0xAA"})
    line = lab.boot.qemu_line(pathlib.Path("/k"), tmp_path / "a,b", job)
    assert "tcg,thread=multi" in line
    assert "-enable-kvm" not in line
    assert any("path=/,mount_tag=lab-root" in word and "readonly=on" in word for word in line)
    assert any("a,,b,mount_tag=lab-run" in word for word in line), "QEMU's own quoting"
    assert "userfaultfd.v1_api=0xAA" in line[-1].split()
    counted = lab.boot.qemu_line(pathlib.Path("/k"), tmp_path, make_job(lab, icount=True))
    assert "shift=0,sleep=off" in counted
    assert counted[counted.index("-smp") + 1] == "1"


def test_the_job_survives_the_shell(lab: SimpleNamespace, tmp_path: pathlib.Path) -> None:
    tricky = "a 'b' \"c\" $HOME `id` \\ *"
    job = make_job(lab, command=["printf", "%s|%s", tricky, "x"], cwd=tmp_path, env={"A": tricky})
    script = lab.boot.job_script(job)
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True)
    assert done.stdout == f"{tricky}|x"
    job = make_job(lab, command=["sh", "-c", 'printf %s "$A"'], cwd=tmp_path, env={"A": tricky})
    done = subprocess.run(["sh", "-c", lab.boot.job_script(job)], capture_output=True, text=True)
    assert done.stdout == tricky


@pytest.fixture
def whole_run(
    lab: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: pathlib.Path,
    capfd: pytest.CaptureFixture[str],
) -> Any:
    """run.main() with a fake machine: its exit status, its report, its output."""

    def play(guest: str, *argv: str) -> tuple[int, dict[str, Any], Any]:
        fake = tmp_path / "bin" / "qemu-system-x86_64"
        fake.parent.mkdir(exist_ok=True)
        fake.write_text(FAKE_QEMU % guest)
        fake.chmod(0o755)
        monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
        kernel = lab.build.Kernel(pathlib.Path("/k"), "0" * 12, "f" * 64, "source", "gcc", "6.1-test", 1.0)
        monkeypatch.setattr(lab.build, "ensure_kernel", lambda: kernel)
        target = tmp_path / "report.json"
        junit = tmp_path / "report.xml"
        status = lab.run.main(["--json", str(target), "--junit", str(junit), *argv])
        return status, json.loads(target.read_text()), capfd.readouterr()

    return play


def line_of(**changes: Any) -> str:
    test = {"id": "t.py::test", "wire": "v2", "backend": "kernel", "outcome": "passed"}
    return json.dumps(test | {"seconds": 0.1, "message": "\x1b[1mwhy"} | changes)


def test_a_pass(whole_run: Any) -> None:
    status, told, output = whole_run(BOOTED + JOB, "--", "echo", "from the guest")
    assert (status, told["outcome"], told["reasons"]) == (0, "passed", [])
    assert told["uname"] == "Linux 6.1-test"
    assert told["kernel"]["sha256"] == "f" * 64
    assert output.out == "from the guest\n"


def test_the_exit_status_of_the_command(whole_run: Any) -> None:
    status, told, _ = whole_run(BOOTED + JOB, "--", "sh", "-c", "exit 9")
    assert (status, told["outcome"]) == (9, "failed")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"outcome": "skipped"}, "skipped: t.py::test"),
        ({"outcome": "xfailed"}, "xfailed: t.py::test"),
        ({"backend": "model"}, "ran on the model: t.py::test"),
    ],
)
def test_not_a_pass(whole_run: Any, tmp_path: pathlib.Path, changes: dict[str, str], reason: str) -> None:
    (tmp_path / "line").write_text(line_of() + "\n" + line_of(**changes) + "\n")
    guest = BOOTED + JOB + f'; cp "{tmp_path}/line" "$run/tests.jsonl"'
    status, told, _ = whole_run(guest, "--", "true")
    assert (status, told["reasons"]) == (1, [reason])
    suite = ET.parse(tmp_path / "report.xml").getroot()
    assert (suite.get("tests"), suite.get("failures")) == ("3", "2"), "the test, and the run"


def test_checks_that_did_not_run(whole_run: Any) -> None:
    status, told, _ = whole_run(BOOTED + 'echo 0 >"$run/status"')
    assert (status, told["reasons"]) == (1, ["no check ran"])


def test_a_job_without_end(whole_run: Any) -> None:
    status, told, output = whole_run(BOOTED + "exec sleep 60", "--timeout", "0.5", "--", "true")
    assert status == 124
    assert "still running" in told["reasons"][0]
    assert "kernel talks" in output.err


def test_a_boot_that_hangs(lab: SimpleNamespace, whole_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab.boot, "BOOT_LIMIT", 0.5)
    status, told, output = whole_run("exec sleep 60", "--", "true")
    assert status == 125
    assert "did not boot" in told["reasons"][0]
    assert "kernel talks" in output.err


@pytest.mark.parametrize("guest", [BOOTED, "exit 1"])
def test_a_machine_that_goes_down(whole_run: Any, guest: str) -> None:
    status, told, output = whole_run(guest, "--", "true")
    assert (status, told["outcome"]) == (125, "failed")
    assert "kernel talks" in output.err


def test_a_kernel_that_complains(whole_run: Any) -> None:
    guest = BOOTED + JOB + '; echo "[1.0] WARNING: CPU: 0 PID: 1 at fs/x.c" >>"$console"'
    status, told, _ = whole_run(guest, "--", "true")
    assert status == 1
    assert "WARNING" in told["reasons"][0]


def test_another_kernel(whole_run: Any) -> None:
    guest = BOOTED.replace("6.1-test", "6.18") + JOB
    status, told, _ = whole_run(guest, "--", "true")
    assert status == 1
    assert "not 6.1-test" in told["reasons"][0]


def test_the_last_runs_are_kept(lab: SimpleNamespace) -> None:
    for _ in range(9):
        last = lab.run.run_folder(None)
    assert last.exists()
    assert len(list(last.parent.iterdir())) == lab.run.KEPT_RUNS


def test_command_line(tmp_path: pathlib.Path) -> None:
    def run(*argv: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, str(LAB / "run.py"), *argv]
        return subprocess.run(line, capture_output=True, text=True, cwd=tmp_path)

    assert "linux-source-6.1" in run("--print-packages").stdout.split()
    assert run("--param", "v1_api", "--", "true").returncode == 2
    assert run("--param", "v1_api=0xAA").returncode == 2, "the checks expect the default"


@pytest.fixture
def whole_suite(lab: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> Any:
    """suite.main() with boots that are played: each ends with a status and with tests of some wires."""

    def play(*boots: tuple[int, str]) -> tuple[int, dict[str, Any], list[list[str]]]:
        lines: list[list[str]] = []

        def run(argv: list[str]) -> int:
            status, wires = boots[len(lines)]
            lines.append(argv)
            told = {"outcome": "", "exit_status": status, "reasons": ["why"] if status else []}
            told |= {"wires": dict.fromkeys(wires.split(), 2), "uname": "", "cmdline": "", "seconds": {}}
            lab.report.write_json(pathlib.Path(argv[argv.index("--json") + 1]), told)
            return status

        monkeypatch.setattr(lab.run, "main", run)
        status = lab.suite.main(["--out", str(tmp_path / "out"), "--python", "/p"])
        return status, json.loads((tmp_path / "out/summary.json").read_text()), lines

    return play


def test_the_suite_runs_every_wire_on_two_boots(whole_suite: Any) -> None:
    status, told, lines = whole_suite((0, "- v1 v2 msg"), (0, "v2 msg"), (0, "v1 v2"))
    assert (status, told["outcome"], told["reasons"]) == (0, "passed", [])
    assert told["wires"] == {"-": 2, "v1": 4, "v2": 6, "msg": 4}
    assert "--" not in lines[0], "the checks"
    tried = ("v2,msg", "v1")
    for line, wires, these in zip(lines[1:], ("v2,msg", "v1,v2"), tried, strict=True):
        assert f"USERFAULT_WIRES={wires}" in line
        assert f"USERFAULT_TRIED={these}" in line
        assert ("v1_api=0xAA" in line) == (wires == "v1,v2")
        assert line[line.index("--") :][1:4] == ["python", "-m", "pytest"]


def test_the_suite_ends_as_its_first_failure(whole_suite: Any) -> None:
    status, told, lines = whole_suite((0, "v1 v2 msg"), (124, ""), (1, "v1"))
    assert (status, told["outcome"], len(lines)) == (124, "failed", 3)
    assert told["reasons"][:2] == ["v2-msg: why", "v1-v2: why"]
    assert {name: boot["exit_status"] for name, boot in told["boots"].items()} == {
        "checks": 0, "v2-msg": 124, "v1-v2": 1,
    }  # fmt: skip


def test_a_wire_without_a_test_is_no_pass(whole_suite: Any) -> None:
    status, told, _ = whole_suite((0, "v1 v2 msg"), (0, "v2 msg"), (0, "v2"))
    assert (status, told["outcome"], told["reasons"]) == (1, "failed", ["v1-v2: no test of v1"])


PLUGGED = """
import pytest
@pytest.mark.parametrize("api", ["v1", "v2"])
def test_param(api): pass
@pytest.mark.wire("msg")
def test_mark(): assert False, "so"
def test_skip(): pytest.skip("because")
@pytest.mark.xfail
def test_xfail(): assert False
def test_model(record_property):
    record_property("backend", "model")
    record_property("wire", "v2")
@pytest.fixture
def broken(): raise ValueError
def test_error(broken): pass
"""


def test_the_plugin_tells_every_test(tmp_path: pathlib.Path) -> None:
    (tmp_path / "test_it.py").write_text(PLUGGED)
    env = os.environ | {
        "PYTHONPATH": str(LAB / "guest"),
        "PYTEST_PLUGINS": "pytest_lab",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "LAB_OUT": str(tmp_path),
    }
    line = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull]
    subprocess.run([*line, str(tmp_path)], env=env, capture_output=True, cwd=tmp_path)
    tests = [json.loads(line) for line in (tmp_path / "tests.jsonl").read_text().splitlines()]
    assert {t["id"].split("::")[1]: (t["wire"], t["backend"], t["outcome"]) for t in tests} == {
        "test_param[v1]": ("v1", "kernel", "passed"),
        "test_param[v2]": ("v2", "kernel", "passed"),
        "test_mark": ("msg", "kernel", "failed"),
        "test_skip": ("", "kernel", "skipped"),
        "test_xfail": ("", "kernel", "xfailed"),
        "test_model": ("v2", "model", "passed"),
        "test_error": ("", "kernel", "error"),
    }
