"""Tests of a mean over clustered samples: that it differs from zero, that it is at most small, that it is not worse.

"Not significant" is no evidence of no effect. A claim of no effect needs a margin that was named before the run, and
an interval inside it (two one-sided tests); a claim that something *keeps* a property needs the one-sided half.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmhooks.analysis.results import Estimate, Records, Result
from mmhooks.analysis.statistics.resampling import cluster_sums
from mmhooks.errors import MMHooksError, ShapeMismatch

Alternative = Literal["two-sided", "greater", "less"]
ALTERNATIVES = ("two-sided", "greater", "less")


@dataclass(frozen=True)
class ClusteredMean(Result):
    """Mean of samples that come in clusters, with a cluster-robust standard error.

    Attributes:
        mean: with its Student interval. error: its standard error. df: clusters − 1.
    """

    mean: Estimate
    error: float
    df: int

    def p(self, alternative: Alternative = "two-sided", *, of: float = 0.0) -> float:
        """Computes the p-value of the mean against ``of``: NaN with fewer than two clusters.

        Without any spread p is 1 where the mean equals ``of``, and else the smallest that so many clusters can give
        by sign flips, ``2^-df`` (one-sided half of it): three equal numbers are no proof.
        """
        from scipy.stats import t

        if alternative not in ALTERNATIVES:
            raise MMHooksError(f"alternative: expected one of {', '.join(ALTERNATIVES)}, got {alternative!r}")
        if self.df < 1 or math.isnan(self.error):
            return math.nan
        away = self.mean.value - of
        if alternative == "less":
            away = -away
        if self.error <= 1e-12 * max(1.0, abs(self.mean.value), abs(of)):
            if abs(away) <= 1e-12:
                return 1.0
            least = 2.0 ** -(self.df + 1)
            return 2 * least if alternative == "two-sided" else least if away > 0 else 1 - least
        if alternative == "two-sided":
            return float(2 * t.sf(abs(away) / self.error, self.df))
        return float(t.sf(away / self.error, self.df))

    def table(self) -> Records:
        return Records([self.mean.columns("mean") | {"clusters": self.df + 1, "p": self.p()}])


@dataclass(frozen=True)
class MarginTest(Result):
    """Whether a mean stays within a margin; ``p`` below the level says that it does.

    Attributes:
        interval: the mean with the interval of level ``1 - 2 alpha`` that the test reads (90 % for alpha = .05).
    """

    interval: Estimate
    margin: float
    p: float


def clustered_mean(
    values: Float[Tensor, " n"], clusters: Int[Tensor, " n2"] | None = None, *, level: float = 0.95
) -> ClusteredMean:
    """Computes the mean of the samples with a cluster-robust standard error (linearised ratio of sums, C − 1 degrees of
    freedom).

    Raises:
        ShapeMismatch: there is no sample, or not one cluster label per sample.
        NotFinite: a number is NaN or infinite.

    >>> found = clustered_mean(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    >>> found.mean.value, found.df, round(found.error, 4)
    (2.5, 3, 0.6455)
    """
    from scipy.stats import t

    columns = torch.stack([values.double(), torch.ones(len(values), dtype=torch.float64)], 1)
    total, count = cluster_sums(columns, clusters).unbind(1)
    n, c = len(values), len(total)
    mean = float(total.sum() / n)
    if c < 2:
        return ClusteredMean(Estimate(mean, math.nan, math.nan, n, level), math.nan, c - 1)
    error = math.sqrt(c / (c - 1) * float((total - mean * count).square().sum())) / n
    half = float(t.ppf(0.5 + level / 2, c - 1)) * error
    return ClusteredMean(Estimate(mean, mean - half, mean + half, n, level), error, c - 1)


def equivalence(
    values: Float[Tensor, " n"],
    margin: float,
    clusters: Int[Tensor, " n2"] | None = None,
    *,
    alpha: float = 0.05,
) -> MarginTest:
    """Tests whether the mean lies strictly within ``± margin``: Schuirmann's two one-sided tests, clustered.

    Raises:
        ShapeMismatch: the margin is not positive; else as :func:`clustered_mean`.

    >>> equivalence(torch.tensor([0.1, -0.1] * 20), 0.5).p < 0.05
    True
    """
    _check_margin(margin)
    found = clustered_mean(values, clusters, level=1 - 2 * alpha)
    both = found.p("greater", of=-margin), found.p("less", of=margin)
    return MarginTest(found.mean, margin, math.nan if math.isnan(both[0]) else max(both))


def noninferiority(
    values: Float[Tensor, " n"],
    margin: float,
    clusters: Int[Tensor, " n2"] | None = None,
    *,
    alpha: float = 0.05,
) -> MarginTest:
    """Tests whether the mean of ``values``, where more is worse, lies below ``margin``: one-sided, clustered.

    Raises:
        ShapeMismatch: the margin is not positive; else as :func:`clustered_mean`.

    >>> noninferiority(torch.tensor([0.1, -0.1] * 20), 0.5).p < 0.05
    True
    """
    _check_margin(margin)
    found = clustered_mean(values, clusters, level=1 - 2 * alpha)
    return MarginTest(found.mean, margin, found.p("less", of=margin))


def _check_margin(margin: float) -> None:
    if not (math.isfinite(margin) and margin > 0):
        raise ShapeMismatch(f"margin: expected a positive number, got {margin}")
