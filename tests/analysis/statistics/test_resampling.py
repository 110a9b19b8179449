"""Resampling by clusters, against naive loops and scipy."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.stats import bootstrap as scipy_bootstrap

from mmhooks.analysis.statistics.resampling import (
    beyond_random,
    bootstrap_ratio,
    paired_test,
    resampled_sums,
)
from mmhooks.errors import NotFinite, ShapeMismatch
from mmhooks.utils.indexing import number_labels


def test_without_clusters_it_is_the_ordinary_bootstrap() -> None:
    x = torch.randn(200, generator=torch.Generator().manual_seed(0)).double()
    got = bootstrap_ratio(x, draws=8000)
    want = scipy_bootstrap((x.numpy(),), np.mean, method="percentile", rng=0).confidence_interval
    assert got.value == pytest.approx(float(x.mean())) and got.n == 200
    assert got.low == pytest.approx(want.low, abs=0.02) and got.high == pytest.approx(want.high, abs=0.02)


def test_copies_of_a_sample_add_no_evidence() -> None:
    x = torch.randn(20, generator=torch.Generator().manual_seed(1))
    one = bootstrap_ratio(x)
    six, families = x.repeat_interleave(6), torch.arange(20).repeat_interleave(6)
    many = bootstrap_ratio(six, None, families)
    assert (many.low, many.high) == pytest.approx((one.low, one.high)) and many.n == 120
    blind = bootstrap_ratio(six)
    assert blind.high - blind.low < 0.6 * (many.high - many.low)
    assert paired_test(six, torch.zeros(120), families).p == pytest.approx(
        paired_test(x, torch.zeros(20)).p, abs=1e-9
    )


def test_sums_resample_whole_clusters_for_all_columns_together() -> None:
    columns = torch.tensor([[1.0, 10.0], [2.0, 20.0], [4.0, 40.0]])
    drawn = resampled_sums(columns, torch.tensor([5, 5, 9]), draws=300, seed=3)
    assert set(map(tuple, drawn.tolist())) == {(6.0, 60.0), (7.0, 70.0), (8.0, 80.0)}


def test_a_ratio_is_of_sums_not_a_mean_of_ratios() -> None:
    got = bootstrap_ratio(torch.tensor([1.0, 9.0]), torch.tensor([2.0, 10.0]))
    assert got.value == pytest.approx(10 / 12) and 0.5 <= got.low <= got.high <= 0.9


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-3, 3), min_size=2, max_size=9))
@example([2.0, 1e-9])  # sums that differ by little, but by more than rounding
def test_sign_flips_are_all_patterns(values: list[float]) -> None:
    d = torch.tensor(values, dtype=torch.float64)
    test = paired_test(d, torch.zeros_like(d))
    flips = itertools.product((1, -1), repeat=len(values))
    patterns = [abs(sum(s * v for s, v in zip(signs, values, strict=True))) for signs in flips]
    seen = abs(sum(values))
    assert test.exact
    assert sum(p > seen + 1e-9 for p in patterns) / len(patterns) <= test.p
    assert test.p <= sum(p >= seen - 1e-9 for p in patterns) / len(patterns)


def test_a_shift_is_found_and_noise_is_not() -> None:
    x = torch.randn(60, generator=torch.Generator().manual_seed(2))
    assert paired_test(x + 2, x, draws=999).p == pytest.approx(0.001)
    p = [
        paired_test(torch.randn(30, generator=torch.Generator().manual_seed(s)), torch.zeros(30), draws=199).p
        for s in range(60)
    ]
    assert 0.3 < float(np.mean(p)) < 0.7 and np.mean(np.array(p) < 0.05) < 0.17


def test_among_random_draws() -> None:
    drawn = torch.arange(99).double()
    assert beyond_random(200.0, drawn) == beyond_random(-1.0, drawn) == 0.02
    assert beyond_random(49.0, drawn) == 1.0
    assert math.isnan(beyond_random(1.0, [])) and math.isnan(beyond_random(math.nan, drawn))


def test_errors_have_numbers_and_small_samples_no_interval() -> None:
    with pytest.raises(ShapeMismatch, match="got 2 for 3 samples"):
        resampled_sums(torch.zeros(3, 1), torch.tensor([0, 1]))
    with pytest.raises(NotFinite, match="1 of 2"):
        paired_test(torch.tensor([1.0, math.nan]), torch.zeros(2))
    with pytest.raises(ShapeMismatch, match="at least one sample"):
        paired_test(torch.zeros(0), torch.zeros(0))
    with pytest.raises(ShapeMismatch, match="got 2 and 1"):
        paired_test(torch.zeros(2), torch.zeros(1))
    assert math.isnan(bootstrap_ratio(torch.ones(4), None, torch.zeros(4, dtype=torch.long)).low)
    assert number_labels(list("abca")).tolist() == [0, 1, 2, 0]
