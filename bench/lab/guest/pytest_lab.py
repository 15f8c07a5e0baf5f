"""A pytest plugin, active in the guest: tells the lab how every test ended.

One line of JSON a test, appended to $LAB_OUT/tests.jsonl at once, so that a
test which takes the machine down cannot take the others' results with it.

The wire of a test is, in this order: what it recorded itself
(`record_property("wire", "v2")`), the argument of its mark
`@pytest.mark.wire("v2")`, or its parameter named `wire` or `api`. A test that
ran on anything but the kernel says so with `record_property("backend", "model")`.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Iterable
from typing import Any

import pytest

OUT = pathlib.Path(os.environ.get("LAB_OUT", os.devnull))
_seen: dict[str, dict[str, Any]] = {}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "wire(name): the wire format a test is about")


def pytest_collection_modifyitems(items: Iterable[pytest.Item]) -> None:
    for item in items:
        mark = item.get_closest_marker("wire")
        spec = getattr(item, "callspec", None)
        params = spec.params if spec else {}
        for wire in (params.get("api"), params.get("wire"), mark and mark.args[0]):
            if wire:
                item.user_properties.append(("wire", str(wire)))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    test = _seen.setdefault(
        report.nodeid, {"id": report.nodeid, "outcome": "passed", "seconds": 0.0, "message": ""}
    )
    test["seconds"] = round(test["seconds"] + report.duration, 3)
    if not report.passed or hasattr(report, "wasxfail"):
        outcome = "failed" if report.when == "call" else "error"
        if report.skipped:
            outcome = "skipped"
        if hasattr(report, "wasxfail"):
            outcome = "xfailed" if report.skipped else "xpassed"
        if test["outcome"] in ("passed", "skipped"):
            test["outcome"] = outcome
        test["message"] += report.longreprtext or str(report.longrepr)
    if report.when == "teardown":
        told = dict(report.user_properties)
        test["wire"] = str(told.get("wire", ""))
        test["backend"] = str(told.get("backend", "kernel"))
        if OUT.is_dir():
            with (OUT / "tests.jsonl").open("a") as lines:
                lines.write(json.dumps(test) + "\n")
        del _seen[report.nodeid]
