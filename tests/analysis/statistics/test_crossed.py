"""Rates over sampled raters and sampled items: a naive sum of dependent pairs, coverage, and power as planned."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import binom

from mmhooks.analysis.statistics.crossed import (
    Answers,
    Spread,
    crossed_difference,
    crossed_error,
    crossed_rate,
    detectable_difference,
    estimate_spread,
    items_needed,
)
from mmhooks.errors import ShapeMismatch

STUDIES, RATERS, ITEMS = 300, 10, 12
SPREAD = Spread(0.5, 0.15, 0.08)


def answers(
    rng: np.random.Generator, rate: float, habit: np.ndarray, first: int = 0, items: int = ITEMS
) -> Answers:
    """All raters answer all items; ``habit`` is what a rater has in both groups of items."""
    n = len(habit)
    p = rate + rng.normal(0, SPREAD.items, items)[None] + (habit + rng.normal(0, SPREAD.raters, n))[:, None]
    raters, numbers = np.meshgrid(np.arange(n), np.arange(first, first + items), indexing="ij")
    hits = (rng.random((n, items)) < p).astype(float)
    return Answers(*(torch.from_numpy(x.ravel()) for x in (hits, raters, numbers)))


def studies(difference: float) -> list[tuple[Answers, Answers]]:
    found = []
    for i in range(STUDIES):
        rng = np.random.default_rng([1, i])
        habit = rng.normal(0, 0.1, RATERS)
        sides = ((0.5 + difference / 2, 0), (0.5 - difference / 2, 100))
        found.append(tuple(answers(rng, rate, habit, first) for rate, first in sides))
    return found


def between(share: float, rate: float) -> bool:
    """Whether this share of the studies is no rarer than 1 in 2,000 at this rate."""
    low, high = binom.ppf([1 / 4000, 1 - 1 / 4000], STUDIES, rate) / STUDIES
    return low <= share <= high


@pytest.fixture(scope="module")
def null() -> list[tuple[Answers, Answers]]:
    return studies(0.0)


def test_rates_cover_over_new_raters_and_items(null) -> None:
    """A binomial interval over the answers, which share raters and items, does not."""
    found = [crossed_rate(one) for one, _ in null]
    assert between(np.mean([e.low <= 0.5 <= e.high for e in found]), 0.95)
    half = 1.96 * math.sqrt(0.25 / (RATERS * ITEMS))
    assert np.mean([abs(e.value - 0.5) <= half for e in found]) < 0.85


def test_differences_are_false_as_often_as_stated(null) -> None:
    found = [crossed_difference(one, other) for one, other in null]
    assert between(np.mean([d.p < 0.05 for d in found]), 0.05)
    assert all((d.p < 0.05) == (d.estimate.low > 0 or d.estimate.high < 0) for d in found)


def test_a_planned_difference_is_found_as_often_as_planned() -> None:
    planned = detectable_difference(RATERS, ITEMS, SPREAD)
    assert between(np.mean([crossed_difference(*pair).p < 0.05 for pair in studies(planned)]), 0.8)


def test_the_spread_is_estimated_without_the_habits_that_cancel(null) -> None:
    found = [estimate_spread(*pair) for pair in null]
    assert math.sqrt(np.mean([s.items**2 for s in found])) == pytest.approx(SPREAD.items, abs=0.02)
    assert math.sqrt(np.mean([s.raters**2 for s in found])) == pytest.approx(SPREAD.raters, abs=0.025)
    assert np.mean([s.rate for s in found]) == pytest.approx(0.5, abs=0.01)


def test_the_error_is_a_sum_over_dependent_pairs() -> None:
    """Products of two answers that share a rater or an item, each way with its small-sample factor."""
    rng = np.random.default_rng(0)
    one, other = answers(rng, 0.6, np.zeros(4), 0, 5), answers(rng, 0.4, np.zeros(4), 100, 3)
    rows = [(h, r, i, 1) for h, r, i in zip(one.hits, one.raters, one.items, strict=True)]
    rows += [(h, r, i, -1) for h, r, i in zip(other.hits, other.raters, other.items, strict=True)]
    rates, sizes = {1: one.rate, -1: other.rate}, {1: 20, -1: 12}
    x = [s * (float(h) - rates[s]) / sizes[s] for h, _, _, s in rows]
    by_rater = by_item = cells = 0.0
    for a, (_, ra, ia, sa) in zip(x, rows, strict=True):
        for b, (_, rb, ib, _) in zip(x, rows, strict=True):
            by_rater += a * b * (ra == rb) * 4 / 3
            by_item += a * b * (ia == ib) * ({1: 5 / 4, -1: 3 / 2}[sa])
        cells += a * a
    expected = max(float(by_rater), cells) + max(float(by_item), cells) - cells
    assert crossed_error(one, other)[0] == pytest.approx(math.sqrt(expected))
    keep = torch.arange(20) != 7  # a missing answer is no answer
    assert crossed_error(Answers(one.hits[keep], one.raters[keep], one.items[keep]))[0] > 0


def test_the_closed_form_where_all_answers_are_independent() -> None:
    hits = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0])
    error, _ = crossed_error(Answers(hits, torch.arange(6), torch.arange(6)))
    p = (
        4 / 6
    )  # every answer is a rater and an item of its own: both ways are the binomial variance, with n - 1
    assert error**2 == pytest.approx(p * (1 - p) / 5 * (2 - 5 / 6))


def test_all_right_has_an_interval_and_separated_groups_a_p() -> None:
    zero, ones = torch.zeros(12), torch.ones(12)
    raters, items = torch.arange(3).repeat_interleave(4), torch.arange(4).repeat(3)
    right, wrong = Answers(ones, raters, items), Answers(zero, raters, items + 9)
    found = crossed_rate(right)
    assert found.value == found.high == 1 and found.low == pytest.approx(
        3 / (3 + 1.96**2), abs=1e-3
    )  # Wilson, 3 of 3
    d = crossed_difference(right, wrong)
    assert d.estimate.value == 1 and 0.001 < d.p < 0.2 and math.isfinite(d.detectable)


def test_one_item_or_rater_says_nothing_about_others() -> None:
    hits, many = torch.tensor([1.0, 0.0, 1.0]), torch.arange(3)
    one = torch.zeros(3, dtype=torch.long)
    for alone in (Answers(hits, one, many), Answers(hits, many, one)):
        assert not crossed_rate(alone).has_interval and crossed_rate(alone).value == pytest.approx(2 / 3)
    difference = crossed_difference(Answers(hits, many, many), Answers(hits, many, one + 9))
    assert math.isnan(difference.p) and math.isnan(difference.detectable)
    nobody = Answers(hits[:0], many[:0], many[:0])
    assert math.isnan(crossed_rate(nobody).value) and math.isnan(crossed_difference(nobody, nobody).p)


def test_what_is_no_table_of_answers_is_refused() -> None:
    hits, many = torch.tensor([1.0, 0.0]), torch.arange(2)
    with pytest.raises(ShapeMismatch, match="at most one answer"):
        Answers(hits, torch.zeros(2, dtype=torch.long), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ShapeMismatch, match="one rater and one item"):
        Answers(hits, many[:1], many)
    with pytest.raises(ShapeMismatch, match="different items"):
        crossed_difference(Answers(hits, many, many), Answers(hits, many, many + 1))
    with pytest.raises(ShapeMismatch, match="at least 2 raters"):
        detectable_difference(1, 5)
    with pytest.raises(ShapeMismatch, match="above 0"):
        items_needed(0.0, 5)


def test_needed_items_are_the_fewest() -> None:
    for raters, difference in ((5, 0.3), (20, 0.15)):
        n = items_needed(difference, raters)
        assert n is not None
        assert detectable_difference(raters, n) <= difference < detectable_difference(raters, n - 1)
