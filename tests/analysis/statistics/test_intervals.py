"""Intervals of rates over the same samples: the published formula, its coverage, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch

from mmhooks.analysis.statistics.intervals import paired_rates
from mmhooks.errors import ShapeMismatch


def cells(both: int, gained: int, lost: int, neither: int) -> tuple[torch.Tensor, torch.Tensor]:
    after = [True] * both + [True] * gained + [False] * lost + [False] * neither
    before = [True] * both + [False] * gained + [True] * lost + [False] * neither
    return torch.tensor(after), torch.tensor(before)


def test_the_interval_is_walds_with_half_a_sample_in_each_cell() -> None:
    change, error = paired_rates(*cells(30, 12, 5, 53))
    n, b, c = 102, 12.5, 5.5
    by_hand = math.sqrt((b + c) - (b - c) ** 2 / n) / n
    assert change.value == pytest.approx(0.07) and error == pytest.approx(by_hand)
    assert change.low == pytest.approx((b - c) / n - 1.959964 * by_hand, abs=1e-6)
    assert change.high == pytest.approx((b - c) / n + 1.959964 * by_hand, abs=1e-6)


def test_samples_that_agree_everywhere_leave_a_width() -> None:
    change, error = paired_rates(*cells(40, 0, 0, 60))
    assert change.value == 0.0 and error > 0 and change.high == -change.low > 0


def test_it_covers_the_true_difference_at_its_level() -> None:
    generator = torch.Generator().manual_seed(0)
    covered, draws = 0, 800
    for _ in range(draws):
        cell = torch.multinomial(
            torch.tensor([0.35, 0.04, 0.08, 0.53]), 200, replacement=True, generator=generator
        )
        change, _ = paired_rates((cell == 0) | (cell == 1), (cell == 0) | (cell == 2))
        covered += change.low <= -0.04 <= change.high
    assert 0.93 <= covered / draws <= 0.98


def test_other_samples_are_refused() -> None:
    with pytest.raises(ShapeMismatch, match="the same samples twice, at least one, got 3 and 2"):
        paired_rates(torch.ones(3, dtype=torch.bool), torch.ones(2, dtype=torch.bool))
