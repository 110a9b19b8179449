"""Clustered means and margins, against SciPy's tests and a regression by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import ttest_1samp

from mmhooks.analysis.statistics.equivalence import clustered_mean, equivalence, noninferiority
from mmhooks.errors import MMHooksError, ShapeMismatch

X = torch.randn(40, generator=torch.Generator().manual_seed(0)).double() + 0.2


@pytest.mark.parametrize("alternative", ["two-sided", "greater", "less"])
def test_without_clusters_it_is_students_t(alternative):
    found = clustered_mean(X)
    want = ttest_1samp(X.numpy(), 0.1, alternative=alternative)
    assert found.p(alternative, of=0.1) == pytest.approx(want.pvalue)
    low, high = ttest_1samp(X.numpy(), 0).confidence_interval(0.95)
    assert (found.mean.low, found.mean.high) == (pytest.approx(low), pytest.approx(high))


def test_copies_of_a_sample_are_no_new_samples():
    once = clustered_mean(X)
    copied = clustered_mean(X.repeat_interleave(5), torch.arange(40).repeat_interleave(5))
    assert copied.error == pytest.approx(once.error) and copied.df == once.df


def test_unequal_clusters_have_the_error_of_a_regression_on_a_constant():
    """The sandwich of an ordinary regression on a constant, clustered, with C / (C − 1)."""
    clusters = torch.tensor([0] * 3 + [1] * 10 + [2] * 7 + [3] * 1 + [4] * 19)
    residual = (X - X.mean()).numpy()
    meat = sum(residual[clusters.numpy() == c].sum() ** 2 for c in range(5))
    want = math.sqrt(5 / 4 * meat) / 40
    assert clustered_mean(X, clusters).error == pytest.approx(want)


def test_equivalence_is_two_one_sided_tests():
    upper = ttest_1samp(X.numpy(), 0.7, alternative="less").pvalue
    lower = ttest_1samp(X.numpy(), -0.7, alternative="greater").pvalue
    found = equivalence(X, 0.7)
    assert found.p == pytest.approx(max(upper, lower))
    assert noninferiority(X, 0.7).p == pytest.approx(upper)
    inside = found.interval.low > -0.7 and found.interval.high < 0.7
    assert inside == (found.p < 0.05)  # the 90 % interval says the same


def test_samples_without_spread_prove_no_more_than_their_number_can():
    equal = clustered_mean(torch.full((3,), 0.5))
    assert equal.p() == 0.25 and equal.p("greater") == 0.125 and equal.p("less") == 0.875
    assert clustered_mean(torch.zeros(9)).p() == 1.0
    assert math.isnan(clustered_mean(torch.ones(4), torch.zeros(4, dtype=torch.long)).p())
    assert math.isnan(equivalence(torch.ones(1), 2.0).p)


def test_refusals():
    with pytest.raises(ShapeMismatch, match="positive"):
        equivalence(X, 0.0)
    with pytest.raises((MMHooksError, TypeError), match="alternative"):
        clustered_mean(X).p("larger")  # type: ignore[arg-type]
    with pytest.raises(ShapeMismatch, match="at least one sample"):
        clustered_mean(torch.from_numpy(np.empty(0)))
