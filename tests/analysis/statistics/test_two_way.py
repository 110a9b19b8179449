"""Intervals over features and families: coverage by simulation, and the jackknife against its definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import binom

from mmhooks.analysis.results import Estimate
from mmhooks.analysis.statistics.jackknife import GROUPS, jackknife_error
from mmhooks.analysis.statistics.two_way import family_groups, two_way
from mmhooks.errors import ShapeMismatch


def test_groups_hold_whole_families_and_are_of_one_size():
    families = torch.randint(0, 60, (500,), generator=torch.Generator().manual_seed(0))
    groups = family_groups(families)
    for family in families.unique():
        assert len(groups[families == family].unique()) == 1
    sizes = [len(families[groups == g].unique()) for g in range(GROUPS)]
    assert max(sizes) - min(sizes) <= 1
    with pytest.raises(ShapeMismatch, match="expected at least 2 groups and as many families, got 20 and 3"):
        family_groups(torch.tensor([0, 1, 2]))


def test_the_jackknife_error_of_a_mean_is_its_standard_error():
    x = torch.randn(30, generator=torch.Generator().manual_seed(1)).double()
    left_out = (x.sum() - x) / 29
    assert jackknife_error(left_out[:, None]).item() == pytest.approx(float(x.std()) / math.sqrt(30))


def test_half_widths_add_in_quadrature():
    found = two_way(Estimate(1.0, 0.7, 1.4, 9), 0.1, groups=20)
    half = 2.0930 * 0.1  # Student's t, 19 degrees of freedom
    assert found.low == pytest.approx(1 - math.hypot(0.3, half), abs=1e-4)
    assert found.high == pytest.approx(1 + math.hypot(0.4, half), abs=1e-4) and found.n == 9


def test_it_covers_the_mean_where_an_interval_over_features_does_not():
    """Values of 60 features over 200 families that move all features together, 600 times."""
    rng, studies, covered, covered_alone = np.random.default_rng(0), 600, 0, 0
    for _ in range(studies):
        features, families = rng.normal(0, 1, 60), rng.normal(0, 3, 200)
        noise = rng.normal(0, 1, (60, 200))
        table = torch.from_numpy(features[:, None] + families + noise)
        value = float(table.mean())
        spread = 1.96 * float(table.mean(1).std()) / math.sqrt(60)
        groups = family_groups(torch.arange(200))
        left_out = torch.stack([table[:, groups != g].mean() for g in range(GROUPS)])
        alone = Estimate(value, value - spread, value + spread, 60)
        both = two_way(alone, jackknife_error(left_out[:, None]).item())
        covered += both.low <= 0 <= both.high
        covered_alone += alone.low <= 0 <= alone.high
    low, high = binom.ppf([0.001, 0.999], studies, 0.95)
    assert (
        low <= covered <= max(high, 0.985 * studies)
    )  # counted twice, the interaction makes it a little wide
    assert covered_alone < 0.85 * studies
