"""Standard errors of any statistic of clustered samples, by leaving out one cluster at a time."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Int
from torch import Tensor

from mmhooks.analysis.results import Estimate
from mmhooks.analysis.statistics.equivalence import ClusteredMean
from mmhooks.analysis.statistics.jackknife import jackknife_error


def leave_one_cluster_out(
    statistic: Callable[[Tensor], float], clusters: Int[Tensor, " n"], *, level: float = 0.95
) -> ClusteredMean:
    """Computes a statistic with its jackknife error over clusters, and Student's interval with C − 1 degrees of freedom.

    For statistics that are no mean of samples, such as an area under a curve; of a mean it gives the error of
    :func:`~mmhooks.analysis.statistics.equivalence.clustered_mean` where clusters are of one size.

    Args:
        statistic: maps the indices of the samples kept to a number. Clusters without which it is NaN (the last samples
            of a class) are left out of the error, and of the degrees of freedom.

    >>> x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    >>> found = leave_one_cluster_out(lambda kept: float(x[kept].mean()), torch.arange(4))
    >>> found.mean.value, round(found.error, 4)
    (2.5, 0.6455)
    """
    from scipy.stats import t

    n = len(clusters)
    value = statistic(torch.arange(n))
    without = [statistic((clusters != c).nonzero().flatten()) for c in clusters.unique()]
    left = torch.tensor([v for v in without if not math.isnan(v)], dtype=torch.float64)
    c = len(left)
    if c < 2 or math.isnan(value):
        return ClusteredMean(Estimate(value, math.nan, math.nan, n, level), math.nan, max(0, c - 1))
    error = jackknife_error(left[:, None]).item()
    half = float(t.ppf(0.5 + level / 2, c - 1)) * error
    return ClusteredMean(Estimate(value, value - half, value + half, n, level), error, c - 1)
