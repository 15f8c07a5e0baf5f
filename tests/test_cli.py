"""The `userfault` command: what it accepts, what it prints, and how it ends."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from click.testing import CliRunner, Result

import userfault as uf
from userfault import opening
from userfault.cli import checks, machine, main, race
from userfault.cli.app import cli

MAIN = "from userfault.cli import main; main()"


def run(*arguments: str, before: str = "") -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, which a hang cannot outlive."""
    return subprocess.run(
        [sys.executable, "-c", f"{before}\n{MAIN}", *arguments], capture_output=True, text=True, timeout=60
    )


def demo(*arguments: str) -> dict[str, Any]:
    """The facts of a run that must end well."""
    done = run("demo", "--json", *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return dict(json.loads(done.stdout))


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli, arguments)


def check_figures(facts: dict[str, Any], pages: int) -> None:
    size = pages * uf.PAGE_SIZE
    loop = facts["python_loop"]
    assert facts["ok"] is True
    assert facts["pages"] == facts["pages_filled"] == pages
    assert facts["verified_bytes"] == loop["verified_bytes"] == size
    # A thread that is interrupted while it waits faults again: there can be more faults than pages.
    assert facts["records"] == facts["faults"] >= pages
    assert loop["records"] == loop["faults"] == loop["reads"] >= pages
    assert 0 < facts["reads"] <= facts["records"]
    assert facts["records_per_read"] == facts["records"] / facts["reads"]
    assert facts["seconds"] > 0
    assert loop["seconds"] > 0
    assert facts["ratio"] == pytest.approx(loop["seconds"] / facts["seconds"])
    assert 0 < facts["service_p50_ns"] <= facts["service_p99_ns"]


@pytest.mark.usefixtures("needs_uffd")
def test_demo_serves_every_page_and_checks_every_byte() -> None:
    facts = demo("--size", "8M", "--threads", "2")
    check_figures(facts, (8 << 20) // uf.PAGE_SIZE)
    assert facts["threads"] == 2
    assert facts["file"] is None
    assert facts["file_bytes"] == 8 << 20


@pytest.mark.usefixtures("needs_uffd")
def test_demo_of_one_page_shows_what_was_negotiated() -> None:
    facts = demo("--size", "1", "--threads", "64")
    check_figures(facts, 1)
    negotiation = facts["negotiation"]
    with uf.Userfaultfd() as u:
        assert negotiation["opened_by"] == u.opened_by
        assert negotiation["api"] == u.api
    # An RFC kernel is asked for nothing, and says by itself what it does.
    agreed = set(negotiation["agreed"]) if negotiation["api"] == "msg" else set()
    assert set(negotiation["asked"]) == {*negotiation["refused"], *agreed}


@pytest.mark.usefixtures("needs_uffd")
@pytest.mark.parametrize(("size", "pages"), [(None, 6), ("2M", 6), (str(2 * uf.PAGE_SIZE), 2)])
def test_demo_of_a_file_that_ends_within_a_page(tmp_path: Path, size: str | None, pages: int) -> None:
    file = tmp_path / "file"
    file.write_bytes(os.urandom(5 * uf.PAGE_SIZE + 123))
    facts = demo("--file", str(file), *(["--size", size] if size else []))
    check_figures(facts, pages)
    assert facts["file"] == str(file)
    assert facts["file_bytes"] == 5 * uf.PAGE_SIZE + 123


@pytest.mark.usefixtures("needs_uffd")
def test_demo_for_people() -> None:
    done = run("demo", "--size", "1M")
    assert done.returncode == 0, done.stderr
    for text in ("asked", "refused", "agreed", "records per read()", "faults/s", "p99", "Python loop"):
        assert text in done.stdout
    assert "1,048,576" in done.stdout


@pytest.mark.usefixtures("needs_uffd")
def test_demo_ends_when_the_python_loop_dies() -> None:
    broken = "import os\ndef fail(*_): raise OSError(5, 'out of order')\nos.preadv = fail"
    done = run("demo", "--size", "1M", "--json", before=broken)
    assert done.returncode == 1
    assert json.loads(done.stdout) == {"ok": False, "error": "the Python loop failed: [Errno 5] out of order"}
    assert "out of order" in done.stderr


@pytest.mark.usefixtures("needs_uffd")
def test_demo_ends_when_no_page_is_served() -> None:
    deaf = (
        "from userfault.cli import python_loop, race\n"
        "race._STUCK_SECONDS = 0.5\n"
        "python_loop.PythonLoop._serve = lambda self, file: None"
    )
    done = run("demo", "--size", "1M", before=deaf)
    assert done.returncode == 1
    assert "a page is not being served" in done.stderr


@pytest.mark.usefixtures("needs_uffd")
def test_demo_fails_when_a_byte_is_wrong() -> None:
    liar = "import os\ntrue = os.preadv\nos.preadv = lambda f, b, o: true(f, b, o ^ 4096)"
    done = run("demo", "--size", "1M", "--json", before=liar)
    assert done.returncode == 1
    assert json.loads(done.stdout)["ok"] is False
    assert re.search(r"byte \d+ is 0x", done.stderr)


def test_demo_of_what_cannot_be_served(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    for file, why in ((str(tmp_path / "empty"), "is empty"), ("/dev/zero", "not a regular file")):
        result = invoke("demo", "--file", file)
        assert result.exit_code == 1
        assert why in result.stderr


@pytest.mark.parametrize("size", ["many", "12Q", "-4096", "1.5M", "0", "0G", "²K"])
def test_demo_of_a_bad_size(size: str) -> None:
    result = invoke("demo", f"--size={size}")
    assert result.exit_code == 2
    assert "--size" in result.stderr


@pytest.mark.parametrize("arguments", [("--threads", "0"), ("--threads", "65"), ("--file", "/no/such/file")])
def test_demo_of_bad_arguments(arguments: tuple[str, str]) -> None:
    result = invoke("demo", *arguments)
    assert result.exit_code == 2
    assert arguments[0] in result.stderr


def test_demo_of_a_size_beyond_memory() -> None:
    result = invoke("demo", "--size", "1000000G")
    assert result.exit_code == 1
    assert "choose a smaller --size" in result.stderr


@pytest.mark.parametrize("wrong", [0, 4999, 5000, 8191])
def test_verify_finds_the_first_wrong_byte(tmp_path: Path, wrong: int) -> None:
    file = tmp_path / "file"
    data = np.zeros(8192, np.uint8)
    data[:5000] = 7
    file.write_bytes(data[:5000].tobytes())
    assert race.verify(data, str(file), lambda name, pages: None) == 8192
    data[wrong] += 1
    with pytest.raises(race.DemoError, match=rf"byte {wrong} is"):
        race.verify(data, str(file), lambda name, pages: None)


KEYS = {"ok", "kernel", "opened_by", "user_mode_only", "api", "apis", "ioctls", "features", "checks"}
NAMES = {
    *("open.device", "open.syscall", "open.user-mode-only", "device.permissions"),
    *("sysctl.vm.unprivileged_userfaultfd", "capabilities", "seccomp", "no_new_privs", "kernel", "api"),
    *("page.base", "page.transparent_huge", "page.hugetlb", "memory", "sysctl.vm.max_map_count"),
    *("rlimit.nofile", "header"),
    *(f"feature.{flag.name}" for flag in uf.Feature),
}


def doctor() -> tuple[int, dict[str, Any]]:
    result = invoke("doctor", "--json")
    facts = json.loads(result.stdout)
    assert facts.keys() == KEYS
    assert sorted(check["name"] for check in facts["checks"]) == sorted(NAMES)
    for check in facts["checks"]:
        assert check.keys() == {"name", "status", "detail", "remedy"}
        assert check["status"] in ("ok", "missing", "limited")
        assert bool(check["remedy"]) == (check["status"] != "ok"), check
    return result.exit_code, facts


@pytest.mark.usefixtures("needs_uffd")
def test_doctor_where_pages_can_be_served() -> None:
    code, facts = doctor()
    assert code == 0
    assert facts["ok"] is True
    with uf.Userfaultfd() as u:
        assert (facts["api"], facts["opened_by"]) == (u.api, u.opened_by)
    people = invoke("doctor")
    assert people.exit_code == 0
    assert "Pages can be served" in people.output


@pytest.fixture
def nothing_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under a seccomp profile without userfaultfd."""

    def refuse() -> NoReturn:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(opening, "_WAYS", dict.fromkeys(opening._WAYS, refuse))


@pytest.mark.usefixtures("nothing_opens")
def test_doctor_where_nothing_opens() -> None:
    code, facts = doctor()
    assert code == 1
    assert (facts["ok"], facts["api"], facts["opened_by"], facts["apis"]) == (False, None, None, [])
    status = {check["name"]: check["status"] for check in facts["checks"]}
    assert {status[name] for name in NAMES if name.startswith(("open.", "feature."))} == {"missing"}
    people = invoke("doctor")
    assert people.exit_code == 1
    assert "No page can be served here" in people.output
    assert "vm.unprivileged_userfaultfd=1" in people.output
    assert "seccomp" in people.output


@pytest.mark.usefixtures("nothing_opens")
def test_demo_where_nothing_opens() -> None:
    result = invoke("demo", "--size", "1", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["ok"] is False
    for way in opening._WAYS:
        assert f"{way}: EPERM" in result.stderr
    assert "vm.unprivileged_userfaultfd=1" in result.stderr


def capabilities(features: uf.Feature | None, *working: str) -> uf.Capabilities:
    ways = tuple(
        opening.Way(name, True, "", "") if name in working else opening.Way(name, False, "EPERM", "mend it")
        for name in opening._WAYS
    )
    return uf.Capabilities((uf.Api.MSG,), features, None, uf.Ioctl(0), ways)


def test_a_missing_feature_names_the_kernel_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "kernel_version", lambda: (6, 1))
    found = {check.name: check for check in checks.features(capabilities(uf.Feature.THREAD_ID))}
    assert found["feature.THREAD_ID"].status == "ok"
    assert found["feature.MOVE"].remedy == "Linux 6.8 or later"
    assert "CONFIG_HAVE_ARCH_USERFAULTFD_WP" in found["feature.PAGEFAULT_FLAG_WP"].remedy


def test_every_feature_has_its_kernel() -> None:
    assert checks.SINCE.keys() == set(uf.Feature)


def test_user_mode_only_is_a_limit() -> None:
    found = {check.name: check for check in checks.opening(capabilities(uf.Feature(0), "user-mode-only"))}
    assert found["open.user-mode-only"].status == "limited"
    assert found["open.syscall"].remedy == "mend it"


def test_the_header_is_searched_for_constants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "userfaultfd.h"
    monkeypatch.setattr(checks, "_HEADER", str(file))
    assert checks.header().status == "missing"
    defines = [f"UFFD_FEATURE_{flag.name}" for flag in uf.Feature]
    defines += [f"UFFDIO_{flag.name}" for flag in uf.Ioctl]
    file.write_text("".join(f"#define {name}\t1\n" for name in defines))
    assert checks.header().status == "ok"
    file.write_text("".join(f"#define {name}\t1\n" for name in defines if name != "UFFDIO_MOVE"))
    assert checks.header().detail == "lacks UFFDIO_MOVE"


def test_help_and_version() -> None:
    assert {"demo", "doctor"} <= set(invoke("--help").output.split())
    version = invoke("--version")
    assert version.exit_code == 0
    assert version.output.startswith("userfault ")


@pytest.mark.parametrize("package", ["click", "rich"])
def test_without_the_extra(
    package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in list(sys.modules):
        if name.startswith("userfault.cli.") or name.partition(".")[0] == package:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "pip install 'userfault[cli]'" in error
