"""Smallest detectable effects, against the power of the tests themselves and closed forms of the books."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import nct, norm, t

from mmhooks.analysis.statistics.power import (
    detectable_against_sets,
    detectable_beyond_random,
    detectable_margin,
    detectable_mean,
    detectable_rate,
)
from mmhooks.errors import ShapeMismatch


def test_a_mean_has_the_power_asked_for():
    """Cohen: 32 samples detect half a standard deviation in 78 %, 34 in 81 %."""
    assert detectable_mean(1 / math.sqrt(32), 31) > 0.5 > detectable_mean(1 / math.sqrt(34), 33)
    for alternative, tail in (("two-sided", 0.025), ("less", 0.05)):
        effect = detectable_mean(0.3, 9, alternative=alternative)
        assert nct.sf(t.ppf(1 - tail, 9), 9, effect / 0.3) == pytest.approx(0.8, abs=1e-4)


def test_few_clusters_can_decide_nothing():
    assert detectable_mean(1.0, 4) == math.inf  # five clusters: the smallest p by sign flips is 1/16
    assert detectable_mean(1.0, 5) < math.inf
    assert math.isnan(detectable_mean(math.nan, 0))


def test_a_margin_is_where_both_one_sided_tests_pass():
    normal = (norm.ppf(0.9) + norm.ppf(0.95), norm.ppf(0.8) + norm.ppf(0.95))
    assert detectable_margin(1.0, 10**6) == pytest.approx(normal[0], abs=1e-3)
    assert detectable_margin(1.0, 10**6, sides=1) == pytest.approx(normal[1], abs=1e-3)


def test_beyond_random_by_counting():
    """The shift at which 80 % of 199 draws, shifted, get a p of at most .05: counted one by one."""
    from mmhooks.analysis.statistics.resampling import beyond_random

    drawn = torch.randn(199, generator=torch.Generator().manual_seed(2)).double()
    shift = detectable_beyond_random(drawn)

    def power(by: float) -> float:
        return float(np.mean([beyond_random(v, drawn) <= 0.05 for v in (drawn + by).tolist()]))

    assert 0.79 <= power(shift + 1e-6) <= 0.81 or 0.79 <= power(-shift - 1e-6) <= 0.81
    assert min(power(shift + 1e-6), power(-shift - 1e-6)) >= 0.79
    assert detectable_beyond_random(drawn[:30]) == math.inf
    assert detectable_beyond_random(drawn[:30], alternative="greater") < math.inf


def test_against_sets_scales_with_their_scatter():
    drawn = torch.randn(20, generator=torch.Generator().manual_seed(3)).double()
    one = detectable_against_sets(drawn)
    assert detectable_against_sets(10 * drawn) == pytest.approx(10 * one, rel=1e-4)
    assert one / float(drawn.std()) == pytest.approx(3.02, abs=0.05)


def test_rates_by_the_normal_approximation():
    """80 % power at 5 %: .5 against .6 needs 388 a side (Fleiss, without continuity correction: 387)."""
    assert detectable_rate(0.5, 388) == pytest.approx(0.1, abs=0.001)
    assert detectable_rate(0.9, 100) == pytest.approx(detectable_rate(0.1, 100))
    assert detectable_rate(0.5, 2) == math.inf
    assert detectable_rate(0.5, 100, 10**7) == pytest.approx(detectable_rate(0.5, 200), rel=1e-3)


def test_refusals():
    with pytest.raises(ShapeMismatch, match="alpha"):
        detectable_mean(1.0, 9, alpha=0.9)
    with pytest.raises(ShapeMismatch, match="rate"):
        detectable_rate(1.2, 9)
    with pytest.raises(ShapeMismatch, match="sides"):
        detectable_margin(1.0, 9, sides=3)
