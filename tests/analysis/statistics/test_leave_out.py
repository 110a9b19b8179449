"""The jackknife over clusters, against the closed form of a mean and the known error of an area under a curve."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from mmhooks.analysis.statistics.equivalence import clustered_mean
from mmhooks.analysis.statistics.leave_out import leave_one_cluster_out


def test_of_a_mean_it_is_the_clustered_error():
    x = torch.randn(60, generator=torch.Generator().manual_seed(0)).double()
    clusters = torch.arange(20).repeat(3)
    got, want = (
        leave_one_cluster_out(lambda kept: float(x[kept].mean()), clusters),
        clustered_mean(x, clusters),
    )
    assert (
        got.error == pytest.approx(want.error)
        and got.df == want.df
        and got.mean.low == pytest.approx(want.mean.low)
    )


def test_of_an_area_it_is_the_spread_of_repeated_samples():
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1], 60)

    def auc(kept, x):
        return float(roc_auc_score(y[kept], x[kept]))

    def sample():
        return rng.normal(0.8 * y, 1.0)

    spread = np.std([auc(slice(None), sample()) for _ in range(400)])
    errors = []
    for _ in range(12):
        x = sample()
        errors.append(leave_one_cluster_out(lambda kept, x=x: auc(kept.numpy(), x), torch.arange(120)).error)
    assert np.mean(errors) == pytest.approx(spread, rel=0.15)


def test_without_clusters_to_leave_out_there_is_no_error():
    found = leave_one_cluster_out(
        lambda kept: float(len(kept)) if len(kept) == 4 else math.nan, torch.arange(4)
    )
    assert found.mean.value == 4 and math.isnan(found.error) and math.isnan(found.p())
