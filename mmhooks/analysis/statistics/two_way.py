"""Intervals for means over features whose values were computed from a sample of data: both were sampled.

A bootstrap over features says what other features of the same kind would give on the same data. With other data every
feature's value moves at once, which no resampling of features sees. The second source is measured by leaving out one
group of families of samples after the other; the two variances add (two-way clustering without the interaction,
which is counted twice and makes the interval slightly too wide).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Int
from torch import Tensor

from mmhooks.analysis.results import Estimate
from mmhooks.analysis.statistics.jackknife import GROUPS
from mmhooks.errors import ShapeMismatch


def family_groups(families: Int[Tensor, " n"], *, groups: int = GROUPS, seed: int = 0) -> Int[Tensor, " n"]:
    """Divides families at random into groups of equal size; returns the group of every sample.

    Raises:
        ShapeMismatch: fewer than two groups, or fewer families than groups.

    >>> family_groups(torch.tensor([5, 5, 8, 9]), groups=3).unique().tolist()
    [0, 1, 2]
    """
    _, which = families.unique(return_inverse=True)
    n = int(which.max()) + 1 if len(which) else 0
    if groups < 2 or n < groups:
        raise ShapeMismatch(
            f"a jackknife over families: expected at least 2 groups and as many families, got {groups} and {n}"
        )
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return (order % groups)[which]


def two_way(over_features: Estimate, error: float, *, groups: int = GROUPS) -> Estimate:
    """Widens an interval over features by the standard ``error`` over families, from ``groups`` left-out groups.

    Half-widths add in quadrature; that over families is Student's t with ``groups - 1`` degrees of freedom. No interval
    where either is unknown.

    >>> two_way(Estimate(1.0, 0.7, 1.3, 50), 0.0) == Estimate(1.0, 0.7, 1.3, 50)
    True
    """
    from scipy.stats import t

    e = over_features
    half = float(t.ppf(0.5 + e.level / 2, groups - 1)) * error
    return Estimate(
        e.value,
        e.value - math.hypot(e.value - e.low, half),
        e.value + math.hypot(e.high - e.value, half),
        e.n,
        e.level,
    )
