"""Options that every test may read."""

from __future__ import annotations

from collections.abc import Callable

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--attack-rounds",
        type=float,
        default=1.0,
        metavar="FACTOR",
        help="multiplies the rounds of every attack in tests/attacks (default 1: seconds each; 100: the published figures)",
    )


@pytest.fixture
def rounds(request: pytest.FixtureRequest) -> Callable[[int], int]:
    """``rounds(n)``: ``n`` times the factor of ``--attack-rounds``, at least one."""
    factor = float(request.config.getoption("--attack-rounds"))
    return lambda n: max(1, round(n * factor))
