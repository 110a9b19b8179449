"""Rates of samples judged several times: against closed forms, SciPy, and resampling by hand."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from mmhooks.analysis.statistics.intervals import wilson
from mmhooks.analysis.statistics.repeated import repeated_difference, repeated_rate, sign_flip_p
from mmhooks.errors import ShapeMismatch


def judged(repeats: int, n: int, seed: int, p: float = 0.4) -> torch.Tensor:
    return torch.rand(repeats, n, generator=torch.Generator().manual_seed(seed)) < p


def test_one_repeat_is_wilsons():
    hits = judged(1, 50, 0)
    assert repeated_rate(hits) == wilson(int(hits.sum()), 50)


def test_repeats_of_the_same_answer_are_no_new_samples():
    """Copies of one judgement narrow nothing: the interval is that of the samples, not of the judgements."""
    hits = judged(1, 60, 1)
    one, many = repeated_rate(hits), repeated_rate(hits.expand(9, 60))
    assert many.value == pytest.approx(one.value) and many.n == 60
    assert many.high - many.low == pytest.approx(one.high - one.low, rel=0.15)
    naive = wilson(int(hits.sum()) * 9, 540)
    assert many.high - many.low > 2 * (naive.high - naive.low)


def test_the_interval_is_a_bootstrap_over_samples():
    hits = judged(3, 40, 2)
    found = repeated_rate(hits)
    dice = np.random.default_rng(0)
    drawn = [hits[:, dice.integers(0, 40, 40)].double().mean().item() for _ in range(4000)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert found.value == pytest.approx(hits.double().mean().item())
    assert (found.low, found.high) == (pytest.approx(low, abs=0.02), pytest.approx(high, abs=0.02))


def test_equal_judgements_fall_back_to_wilson_over_samples():
    for value in (False, True):
        hits = torch.full((4, 30), value)
        assert repeated_rate(hits) == wilson(30 * value, 30)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(-4, 4), min_size=1, max_size=9))
def test_the_sign_flip_distribution_is_exact(differences):
    total = abs(sum(differences))
    sums = [abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
            for signs in product((-1, 1), repeat=len(differences))]  # fmt: skip
    naive = sum(s >= total for s in sums) / len(sums)
    assert sign_flip_p(torch.tensor(differences)) == pytest.approx(naive)


def test_one_repeat_each_is_mcnemars():
    one, other = judged(1, 80, 3, 0.6), judged(1, 80, 4, 0.4)
    found = repeated_difference(one, other)
    more, less = int((one & ~other).sum()), int((other & ~one).sum())
    assert (found.more, found.less) == (more, less)
    assert found.p == pytest.approx(binomtest(more, more + less).pvalue)


def test_unequal_repeats_are_compared_by_shares():
    one, other = judged(1, 30, 5), judged(3, 30, 6)
    found = repeated_difference(one, other)
    share = one[0].double() - other.double().mean(0)
    assert found.difference.value == pytest.approx(share.mean().item())
    assert (found.more, found.less) == (int((share > 1e-9).sum()), int((share < -1e-9).sum()))
    back = repeated_difference(other, one)
    assert back.difference.value == pytest.approx(-found.difference.value) and back.p == pytest.approx(
        found.p
    )


def test_p_is_level_under_the_null():
    """Two judgements of the same law: p below .1 in no more than about a tenth of the cases."""
    low = 0
    for seed in range(200):
        dice = torch.Generator().manual_seed(seed)
        rate = torch.rand(25, generator=dice)
        draw = torch.rand(6, 25, generator=dice) < rate
        low += repeated_difference(draw[:3], draw[3:]).p < 0.1
    assert low <= 30  # 20 expected at most; beyond 30 in one of a hundred


def test_bad_input_is_reported():
    with pytest.raises(ShapeMismatch, match="at least one repeat"):
        repeated_rate(torch.zeros(2, 0, dtype=torch.bool))
    with pytest.raises(ShapeMismatch, match="same samples"):
        repeated_difference(torch.zeros(1, 3, dtype=torch.bool), torch.zeros(1, 4, dtype=torch.bool))


def test_samples_on_one_drawing_are_one_piece_of_evidence():
    """Signs of whole clusters are flipped, and intervals resample them: copies of a sample change neither."""
    one, other = judged(2, 12, 5, 0.7), judged(3, 12, 6, 0.4)
    clusters = torch.arange(12).repeat_interleave(4)
    copied = repeated_difference(*(h.repeat_interleave(4, 1) for h in (one, other)), clusters)
    once = repeated_difference(one, other)
    assert copied.p == pytest.approx(once.p) and (copied.more, copied.less) == (once.more, once.less)
    assert copied.difference.low == pytest.approx(once.difference.low) and copied.difference.n == 48
    rate = repeated_rate(one.repeat_interleave(4, 1), clusters)
    assert (rate.low, rate.n) == (pytest.approx(repeated_rate(one).low), 48)
    equal = repeated_rate(torch.ones(1, 48, dtype=torch.bool), clusters)
    assert (equal.low, equal.n) == (wilson(12, 12).low, 48)
