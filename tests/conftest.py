"""Options that every test may read."""

from __future__ import annotations

import os
from collections.abc import Callable

# One thread for each process: ``-n`` gives every core a process, and threads that wait for a core spin.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


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
