"""What the tests share: the wires of the running kernel, and children that a hang cannot outlive.

A test that takes `wire` (or `u`, `service`, …) runs once for each record format that the kernel speaks:
msg on an ordinary machine; v1, v2 and msg in the guest of bench/lab. One that takes `faults` runs for every
wire: where the kernel lacks it, on the model in `userfault.rfc`, and says so in its id and its properties.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

import userfault as uf
from children import Nursery
from support import KERNEL_WIRES, LAB, WIRES, Child, Faults, KernelFaults, ModelFaults, give_up, has
from userfault.flags import names

# No time limit on these noisy machines, and no folder of examples where the tree is read-only.
hypothesis.settings.register_profile("userfault", deadline=None, database=None)
hypothesis.settings.register_profile("lab", deadline=None, database=None, max_examples=10)
hypothesis.settings.load_profile("lab" if LAB else "userfault")

# In the lab, what is not about the kernel: builds, commands, the lab itself, and the model.
# What does not depend on the records' format is not tried again on the lab's slow processor.
_NATIVE_ONLY = (
    *("abi", "bench_cli", "bounce", "build", "cli", "errno_kernel", "errno_shim", "kernel_selftests"),
    *("lab_unit", "lease", "no_python", "rfc_model", "shared_memory", "soak", "sources", "victim"),
    *("examples", "lazy_array", "lazy_fail", "lazy_gil", "lazy_limit", "lazy_writes", "selection"),
    *("chunks", "inline", "late", "pager", "stores", "write_protect"),
)
collect_ignore = [*(f"test_{name}.py" for name in _NATIVE_ONLY), "native"] if LAB else []

# A boot of the lab may leave a wire to another.
_ASKED = os.environ.get("USERFAULT_TRIED", ",".join(KERNEL_WIRES)).split(",")
TRIED = tuple(wire for wire in KERNEL_WIRES if wire in _ASKED)

HERE = Path(__file__).parent


def pytest_configure(config: pytest.Config) -> None:
    """In the lab, nothing may fall back: the kernel speaks just the wires that were asked for."""
    asked = os.environ.get("USERFAULT_WIRES", "v2").split(",")
    missing = set(asked) - set(KERNEL_WIRES)
    extra = set(KERNEL_WIRES) - set(asked) if "USERFAULT_WIRES" in os.environ else set()
    if LAB and (missing or extra):
        raise pytest.UsageError(f"asked for {','.join(asked)}, this kernel speaks {','.join(KERNEL_WIRES)}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Whatever takes `wire`, and does not say which, gets those that there are."""
    if "wire" not in metafunc.fixturenames:
        return
    if any("wire" in str(mark.args[0]) for mark in metafunc.definition.iter_markers("parametrize")):
        return
    # Where nothing can be opened msg stands for all, and says why it is skipped.
    real = TRIED or ("msg",)
    wires = [pytest.param(wire, id=wire) for wire in real]
    if "faults" in metafunc.fixturenames and not LAB:
        wires += [pytest.param(wire, id=f"{wire}-model") for wire in WIRES[:2] if wire not in real]
    metafunc.parametrize("wire", wires, indirect=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def there(item: pytest.Item) -> bool:
        spec = getattr(item, "callspec", None)
        wire = spec.params.get("wire") if spec else None
        model = "faults" in getattr(item, "fixturenames", ())
        if (mark := item.get_closest_marker("needs")) and not has(mark.args[0]):
            item.add_marker(pytest.mark.skip(reason=f"the kernel has no {names(mark.args[0])}"))
            if LAB:
                return False
        return wire is None or wire in (TRIED or ("msg",)) or model

    # This hook sees the items of all folders.
    items[:] = [item for item in items if HERE not in item.path.parents or there(item)]


@pytest.fixture
def needs_uffd() -> None:
    """Skip where no userfaultfd can be opened; in CI that is a failure."""
    try:
        uf.Userfaultfd().close()
    except uf.UnavailableError as error:
        if LAB or os.environ.get("CI") == "true":
            pytest.fail(f"CI must be able to open a userfaultfd: {error}")
        pytest.skip(str(error))


@pytest.fixture
def needs_privilege(needs_uffd: None) -> None:
    """Skip where only user-mode faults are delivered: system calls on missing pages fail with EFAULT."""
    if uf.probe().user_mode_only:
        if LAB or os.environ.get("CI") == "true":
            pytest.fail("CI must be able to open a userfaultfd with privilege")
        pytest.skip("needs /dev/userfaultfd, CAP_SYS_PTRACE or vm.unprivileged_userfaultfd=1")


@pytest.fixture
def wire(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> str:
    """The record format, v1, v2 or msg."""
    if request.param in KERNEL_WIRES or request.param == "msg":
        request.getfixturevalue("needs_uffd")
    else:
        record_property("backend", "model")
    return str(request.param)


@pytest.fixture
def u(wire: str) -> Iterator[uf.Userfaultfd]:
    """A userfaultfd that speaks the wire."""
    with uf.Userfaultfd(wire) as opened:
        yield opened
        give_up(opened)


@pytest.fixture
def service(u: uf.Userfaultfd) -> Iterator[uf.FaultService]:
    with uf.FaultService(u) as opened:
        yield opened
        give_up(u)


@pytest.fixture
def faults(wire: str, request: pytest.FixtureRequest) -> Iterator[Faults]:
    """Page faults on the wire: of the kernel, or of the model where that does not speak it."""
    on_kernel = wire in KERNEL_WIRES
    made = KernelFaults(request.getfixturevalue("u")) if on_kernel else ModelFaults(wire)
    yield made
    made.end()


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    with Nursery() as opened:
        yield opened


@pytest.fixture
def child(nursery: Nursery, request: pytest.FixtureRequest) -> Child:
    """Run Python code in a process of its own, killed after `timeout` seconds. WIRE is the test's."""
    wire = request.getfixturevalue("wire") if "wire" in request.fixturenames else "auto"

    def run(code: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        return nursery.run(code, wire, timeout)

    return run
