"""Clustered samples: intervals and paired tests that resample whole clusters.

Six skin tones of one drawing, or ten frames of one film, are not six or ten independent samples. They form one
*cluster*, which is resampled, or has its sign flipped, as a whole. Without clusters every sample is its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmhooks.analysis.results import Estimate, Records, Result
from mmhooks.analysis.statistics.intervals import from_draws
from mmhooks.errors import NotFinite, ShapeMismatch

MAX_EXACT_CLUSTERS = 12  # up to this number, all sign patterns are enumerated


@dataclass(frozen=True)
class PairedTest(Result):
    """Mean of paired differences with its bootstrap interval, and the p-value of a sign-flip test.

    ``exact``: all sign patterns were enumerated; then p cannot be below ``2 / 2^clusters``.
    """

    difference: Estimate
    p: float
    clusters: int
    exact: bool

    def table(self) -> Records:
        return Records([self.difference.columns("difference") | {"p": self.p, "clusters": self.clusters}])


def resampled_sums(
    columns: Float[Tensor, "n m"],
    clusters: Int[Tensor, " n2"] | None = None,
    *,
    draws: int = 2000,
    seed: int = 0,
) -> Float[Tensor, "draws m"]:
    """Sums the columns over resamples of whole clusters, the same resamples for all columns.

    Any ratio of sums (a mean, a relative change, a difference of these) follows from the columns of one row.

    Raises:
        ShapeMismatch: there is no row, or not one cluster label per row.
        NotFinite: a column holds NaN or infinity.
    """
    sums = cluster_sums(columns, clusters)
    picks = torch.randint(len(sums), (draws, len(sums)), generator=torch.Generator().manual_seed(seed))
    return torch.stack([sums[:, j][picks].sum(1) for j in range(sums.shape[1])], dim=1)


def bootstrap_ratio(
    numerator: Float[Tensor, " n"],
    denominator: Float[Tensor, " n2"] | None = None,
    clusters: Int[Tensor, " n3"] | None = None,
    *,
    draws: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Estimate:
    """Computes ``sum(numerator) / sum(denominator)`` with a percentile interval over resampled clusters.

    Without ``denominator`` this is the mean. n counts samples; with fewer than two clusters the interval is NaN.
    Resamples whose denominator is zero are left out.

    >>> bootstrap_ratio(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 4.0, 6.0])).high
    0.5
    """
    under = torch.ones_like(numerator) if denominator is None else denominator
    if len(under) != len(numerator):
        raise ShapeMismatch(
            f"expected one numerator and one denominator per sample, got {len(numerator)} and {len(under)}"
        )
    n = len(numerator)
    total = float(under.double().sum()) if n else 0.0
    value = float(numerator.double().sum()) / total if total else math.nan
    n_clusters = n if clusters is None else len(clusters.unique())
    if n_clusters < 2:
        return Estimate(value, math.nan, math.nan, n, level)
    top, bottom = resampled_sums(torch.stack([numerator, under], 1), clusters, draws=draws, seed=seed).unbind(
        1
    )
    known = bottom != 0
    if not bool(known.any()):
        return Estimate(value, math.nan, math.nan, n, level)
    return from_draws(value, top[known] / bottom[known], n, level)


def paired_test(
    after: Float[Tensor, " n"],
    before: Float[Tensor, " n2"],
    clusters: Int[Tensor, " n3"] | None = None,
    *,
    draws: int = 9999,
    seed: int = 0,
) -> PairedTest:
    """Tests whether ``after - before`` of the same samples differs from zero, by flipping the signs of whole clusters.

    Under the null hypothesis an edit moves a cluster up as often as down, so the sign of each cluster's summed
    difference is a fair coin. p counts the patterns whose mean is at least as far from zero, and the observed one.

    Raises:
        ShapeMismatch: the sides differ in length, there is no sample, or not one cluster label per sample.
        NotFinite: a number is NaN or infinite.

    >>> paired_test(torch.tensor([0.1, 0.2, 0.3, 0.1]), torch.zeros(4)).p
    0.125
    """
    if len(after) != len(before):
        raise ShapeMismatch(
            f"paired samples: expected one value after and one before per sample, got {len(after)} and {len(before)}"
        )
    difference = after.double() - before.double()
    sums = cluster_sums(difference[:, None], clusters)[:, 0]
    p, exact = flip_p(sums, draws=draws, seed=seed)
    return PairedTest(bootstrap_ratio(difference, None, clusters, seed=seed), p, len(sums), exact)


def flip_p(sums: Float[Tensor, " c"], *, draws: int = 9999, seed: int = 0) -> tuple[float, bool]:
    """Computes the two-sided p-value of a total over all sign patterns of its terms, or over ``draws`` random ones.

    Returns:
        p, and whether all patterns were enumerated (up to 12 terms).

    >>> flip_p(torch.tensor([1.0, 1.0, 1.0]))
    (0.25, True)
    """
    terms = sums.double().numpy()
    observed = abs(terms.sum()) - 1e-12 * np.abs(terms).sum()  # equal up to rounding counts as equal
    exact = len(terms) <= MAX_EXACT_CLUSTERS
    if exact:
        signs = 1 - 2 * ((np.arange(2 ** len(terms))[:, None] >> np.arange(len(terms))) & 1)
        p = float((np.abs(signs @ terms) >= observed).mean())
    else:
        generator, hits, left = np.random.default_rng(seed), 1, draws
        while left:
            rows = min(left, max(1, 2**22 // len(terms)))
            signs = generator.integers(0, 2, (rows, len(terms)), dtype=np.int8) * 2 - 1
            hits += int((np.abs(signs @ terms) >= observed).sum())
            left -= rows
        p = hits / (draws + 1)
    return p, exact


def beyond_random(value: float, drawn: Sequence[float] | Float[Tensor, " draws"]) -> float:
    """Computes the two-sided p-value of ``value`` among random draws of the same kind; at least ``2 / (draws + 1)``.

    >>> beyond_random(-3.0, [0.0] * 99), beyond_random(0.0, [-1.0, 0.0, 1.0])
    (0.02, 1.0)
    """
    random = torch.as_tensor(drawn, dtype=torch.float64)
    if not len(random) or not math.isfinite(value) or not bool(random.isfinite().all()):
        return math.nan
    edge = 1e-12 * max(1.0, abs(value))
    below, above = int((random <= value + edge).sum()), int((random >= value - edge).sum())
    return min(1.0, 2 * (1 + min(below, above)) / (1 + len(random)))


def against_sets(value: float, drawn: Sequence[float] | Float[Tensor, " draws"]) -> float:
    """Computes the two-sided p-value of one set's effect against those of a few random sets, assumed to be normal.

    ``t = (value - mean) / (sd sqrt(1 + 1/n))`` with n - 1 degrees of freedom. Unlike :func:`beyond_random` it can decide
    with twenty sets; unlike a comparison with *one* random set it knows how much sets scatter.

    Source: Crawford and Howell 1998, Comparing an individual's test score against norms derived from small samples.

    >>> round(against_sets(3.0, [0.0, 1.0, -1.0, 0.5, -0.5]), 3)
    0.026
    """
    from scipy.stats import t

    random = torch.as_tensor(drawn, dtype=torch.float64)
    n = len(random)
    if n < 2 or not math.isfinite(value) or not bool(random.isfinite().all()):
        return math.nan
    away, scatter = abs(value - float(random.mean())), float(random.std()) * math.sqrt(1 + 1 / n)
    if scatter <= 1e-12 * max(1.0, abs(value)):
        return beyond_random(value, random)  # sets that do not scatter: only their rank is left
    return float(2 * t.sf(away / scatter, n - 1))


def cluster_sums(columns: Float[Tensor, "n m"], clusters: Int[Tensor, " n2"] | None) -> Float[Tensor, "c m"]:
    """Sums the rows of each cluster; without clusters every row is its own.

    Raises:
        ShapeMismatch: there is no row, or not one cluster label per row.
        NotFinite: a column holds NaN or infinity.

    >>> cluster_sums(torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([0, 1, 0])).flatten().tolist()
    [5.0, 2.0]
    """
    if not len(columns):
        raise ShapeMismatch("resampling: expected at least one sample, got none")
    if not bool(torch.isfinite(columns).all()):
        raise NotFinite(
            f"resampling: {int((~torch.isfinite(columns)).sum())} of {columns.numel()} numbers are NaN or infinite"
        )
    if clusters is None:
        return columns.double()
    if len(clusters) != len(columns):
        raise ShapeMismatch(
            f"expected one cluster label per sample, got {len(clusters)} for {len(columns)} samples"
        )
    _, which = clusters.unique(return_inverse=True)
    empty = torch.zeros(int(which.max()) + 1, columns.shape[1], dtype=torch.float64)
    return empty.index_add(0, which, columns.double())
