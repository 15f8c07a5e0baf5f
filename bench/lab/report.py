"""What a lab run says when it is over: a verdict with reasons, JSON, JUnit."""

from __future__ import annotations

import json
import pathlib
import xml.etree.ElementTree as ET
from typing import Any

HANG = 124
NO_BOOT = 125


def read_tests(path: pathlib.Path) -> list[dict[str, Any]]:
    """One JSON object a line, appended by the guest as each test ended."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line]


def reasons(status: int | None, problem: str, tests: list[dict[str, Any]]) -> list[str]:
    """Why a run is not a pass; empty when it is one.

    A skipped test proves nothing about the kernel, and neither does one that
    ran against the model: both count as failures here.
    """
    why = [problem] if problem else []
    if status:
        why.append(f"the command's exit status was {status}")
    for test in tests:
        if test["outcome"] != "passed":
            why.append(f"{test['outcome']}: {test['id']}")
        elif test["backend"] != "kernel":
            why.append(f"ran on the {test['backend']}: {test['id']}")
    return why


def exit_status(status: int | None, problem: str, why: list[str]) -> int:
    """The command's own status where it has one, and never 0 without a pass."""
    if status:
        return status
    if status is None:
        return HANG if "still running" in problem else NO_BOOT
    return 1 if why else 0


def wires(tests: list[dict[str, Any]]) -> dict[str, int]:
    """How many tests each wire format had; tests without one count under '-'."""
    count: dict[str, int] = {}
    for test in tests:
        name = test["wire"] or "-"
        count[name] = count.get(name, 0) + 1
    return count


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A run's document, as `write_json` left it."""
    document: dict[str, Any] = json.loads(path.read_text())
    return document


def write_json(path: pathlib.Path, document: dict[str, Any]) -> None:
    """The whole run, for machines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")


def write_junit(path: pathlib.Path, document: dict[str, Any]) -> None:
    """The same as JUnit XML, the form that CI services show."""
    tests = document["tests"]
    suite = ET.Element("testsuite", name="userfault-lab")
    facts = ET.SubElement(suite, "properties")
    for name in ("uname", "cmdline"):
        ET.SubElement(facts, "property", name=name, value=document[name])
    for name, value in document["kernel"].items():
        ET.SubElement(facts, "property", name=f"kernel.{name}", value=str(value))
    failed = 0
    for test in tests:
        module, _, name = test["id"].rpartition("::")
        case = ET.SubElement(suite, "testcase", classname=module, name=name, time=f"{test['seconds']:.3f}")
        marks = ET.SubElement(case, "properties")
        ET.SubElement(marks, "property", name="wire", value=test["wire"])
        ET.SubElement(marks, "property", name="backend", value=test["backend"])
        trouble = reasons(0, "", [test])
        if trouble:
            failed += 1
            failure = ET.SubElement(case, "failure", message=trouble[0])
            failure.text = printable(test["message"])
    # The run itself is a case: a boot that hangs must not look like an empty suite.
    whole = ET.SubElement(
        suite, "testcase", classname="lab", name="run", time=f"{document['seconds']['total']:.3f}"
    )
    if document["reasons"]:
        failed += 1
        failure = ET.SubElement(whole, "failure", message=document["reasons"][0])
        failure.text = printable("\n".join(document["reasons"]))
    suite.set("tests", str(len(tests) + 1))
    suite.set("failures", str(failed))
    path.parent.mkdir(parents=True, exist_ok=True)
    ET.ElementTree(suite).write(path, encoding="utf-8", xml_declaration=True)


def printable(text: str) -> str:
    """XML 1.0 has no way to write most control characters."""
    return "".join(c for c in text if c >= " " or c in "\n\t")
