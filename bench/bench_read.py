"""read() with pytest-benchmark; each reader's records are checked before they are timed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from read import CONTENDERS, PIPE_BATCHES, UFFD_BATCHES, WIRES, Contender
from sources import Crowd, Pipe

ROUNDS = 20


@pytest.fixture(scope="module")
def crowd(needs_uffd: None) -> Iterator[Crowd]:
    with Crowd() as crowd:
        yield crowd


def run(benchmark: BenchmarkFixture, source: Pipe | Crowd, contender: Contender, calls: int) -> None:
    """Check every record of one filling, then time whole fillings."""
    source.refill()
    seen = []
    for _ in range(calls):
        contender.drain(1)
        seen += contender.addresses()
    # The kernel delivers a crowd's faults in the order in which they came.
    assert sorted(seen) == source.addresses.tolist()
    benchmark.extra_info["calls per round"] = calls

    def refill() -> tuple[tuple[int], dict[str, object]]:
        source.refill()
        return (calls,), {}

    benchmark.pedantic(contender.drain, setup=refill, rounds=ROUNDS)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("name", CONTENDERS)
@pytest.mark.parametrize("batch", PIPE_BATCHES)
@pytest.mark.parametrize("api", WIRES)
def test_pipe(benchmark: BenchmarkFixture, api: str, batch: int, name: str) -> None:
    benchmark.group = f"pipe {api}, {batch} records a call"
    with Pipe(api, batch) as pipe:
        run(benchmark, pipe, CONTENDERS[name](pipe.fd, api, batch), pipe.calls)


@pytest.mark.parametrize("name", CONTENDERS)
@pytest.mark.parametrize("batch", UFFD_BATCHES)
def test_userfaultfd(benchmark: BenchmarkFixture, crowd: Crowd, batch: int, name: str) -> None:
    benchmark.group = f"userfaultfd {crowd.api}, {batch} records a call"
    run(benchmark, crowd, CONTENDERS[name](crowd.fd, crowd.api, batch), crowd.addresses.size // batch)
