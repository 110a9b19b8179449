"""The comparisons of the studies, against the tests that they are made of and by hand."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import ttest_1samp, ttest_ind

from mmhooks.analysis.statistics.measured import against_few_sets, against_many_sets, over_clusters
from mmhooks.analysis.statistics.primaries import Primary
from mmhooks.analysis.statistics.resampling import beyond_random
from mmhooks.errors import MMHooksError

X = torch.randn(30, generator=torch.Generator().manual_seed(0)).double()
KEEPS = Primary("keeps", "less", margin=0.9)


def test_paired_differences():
    assert over_clusters(Primary("x"), X).p == pytest.approx(ttest_1samp(X.numpy(), 0).pvalue)
    want = ttest_1samp(X.numpy(), 0.9, alternative="less").pvalue
    assert over_clusters(KEEPS, X).p == pytest.approx(want)
    assert over_clusters(Primary("none", margin=0.9), X).p >= over_clusters(KEEPS, X).p


def test_a_rank_among_many_sets():
    found = against_many_sets(Primary("x"), 1.0, X)
    assert found.p == beyond_random(1.0, X) and found.estimate.value == pytest.approx(1 - float(X.mean()))
    assert found.detectable == math.inf  # thirty sets cannot show p < .05 on two sides
    with pytest.raises(MMHooksError, match="ranks know none"):
        against_many_sets(KEEPS, 1.0, X)


def test_one_value_against_few_sets_is_a_two_sample_test_with_one_sample():
    """Student's test of a sample of size one against n: the same t and the same degrees of freedom."""
    found = against_few_sets(Primary("x"), 2.0, X)
    assert found.p == pytest.approx(ttest_ind([2.0], X.numpy()).pvalue)
    low, high = ttest_ind([2.0], X.numpy()).confidence_interval()
    assert (found.estimate.low, found.estimate.high) == (pytest.approx(low), pytest.approx(high))
    kept = against_few_sets(Primary("keeps", "less", margin=3.0), 0.5, X)
    assert kept.p == pytest.approx(ttest_ind([0.5 - 3.0], X.numpy(), alternative="less").pvalue)
    assert kept.detectable == pytest.approx(
        float(X.std()) * math.sqrt(1 + 1 / 30) * (0.8542 + 1.6991), rel=1e-3
    )


def test_a_margin_from_below_is_no_claim():
    with pytest.raises(MMHooksError, match="greater"):
        over_clusters(Primary("x", "greater", margin=0.1), X)
