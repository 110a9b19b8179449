"""What every benchmark shares: threads and run-time checks as a user has them, and the table at the end."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from race import HEADER, TABLE

import mmhooks as mm


@pytest.fixture(autouse=True)
def threads_as_the_case_asks(request: pytest.FixtureRequest) -> Iterator[None]:
    """As many torch threads as the case's parameter ``threads`` says, 1 otherwise; no run-time type checks."""
    assert not hasattr(mm.HookedCLIP.encode_image, "__wrapped__"), (
        "expected no run-time type checks, they are timed too: leave out --jaxtyping-packages"
    )
    before = torch.get_num_threads()
    case = getattr(request.node, "callspec", None)
    torch.set_num_threads(case.params.get("threads", 1) if case else 1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if TABLE:
        terminalreporter.write_line("")
        for line in [*HEADER.splitlines(), *TABLE]:
            terminalreporter.write_line(line)
