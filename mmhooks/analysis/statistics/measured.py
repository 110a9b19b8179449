"""The three comparisons that studies make, each with its p-value and its power line, ready for ``primaries.decide``."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmhooks.analysis.results import Estimate
from mmhooks.analysis.statistics.equivalence import clustered_mean, equivalence, noninferiority
from mmhooks.analysis.statistics.power import (
    detectable_against_sets,
    detectable_beyond_random,
    detectable_margin,
    detectable_mean,
)
from mmhooks.analysis.statistics.primaries import Measured, Primary
from mmhooks.analysis.statistics.resampling import against_sets, beyond_random
from mmhooks.errors import MMHooksError


def over_clusters(
    primary: Primary, differences: Float[Tensor, " n"], clusters: Int[Tensor, " n2"] | None = None
) -> Measured:
    """Tests the mean of paired differences over clusters of samples, against zero or against the primary's margin.

    >>> over_clusters(Primary("drops"), torch.tensor([0.1, 0.2] * 9)).p < .001
    True
    """
    found = clustered_mean(differences, clusters)
    if primary.margin is None:
        return Measured(found.mean, found.p(), detectable_mean(found.error, found.df))
    two = primary.alternative == "two-sided"
    _keeps_from_above(primary)
    p = (equivalence if two else noninferiority)(differences, primary.margin, clusters).p
    return Measured(found.mean, p, detectable_margin(found.error, found.df, sides=2 if two else 1))


def against_many_sets(
    primary: Primary, value: float, drawn: Sequence[float] | Float[Tensor, " draws"]
) -> Measured:
    """Tests a group's effect by its rank among those of many random sets (200 or more), minus their mean.

    Raises:
        MMHooksError: the primary has a margin: a rank knows none; use :func:`against_few_sets`.

    >>> against_many_sets(Primary("moves"), 3.0, torch.linspace(-1, 1, 199)).p
    0.01
    """
    if primary.margin is not None:
        raise MMHooksError(
            f"primary {primary.name!r}: expected no margin, got {primary.margin}: ranks know none"
        )
    draws = torch.as_tensor(drawn, dtype=torch.float64)
    tails = (
        torch.quantile(draws, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        if len(draws)
        else []
    )
    low, high = (value - tails[1], value - tails[0]) if tails else (math.nan, math.nan)
    e = Estimate(value - float(draws.mean()), low, high, len(draws))
    return Measured(e, beyond_random(value, draws), detectable_beyond_random(draws))


def against_few_sets(
    primary: Primary, value: float, drawn: Sequence[float] | Float[Tensor, " draws"]
) -> Measured:
    """Tests a group's effect against those of some twenty random sets by their scatter, minus their mean, against zero
    or against the primary's margin. Assumes that effects of sets are normal (they are means over samples).

    >>> found = against_few_sets(Primary("keeps", "less", margin=2.0), 0.0, [0.1, -0.1, 0.2, -0.2, 0.0])
    >>> found.p < .001
    True
    """
    from scipy.stats import t

    draws = torch.as_tensor(drawn, dtype=torch.float64)
    n, away = len(draws), value - float(draws.mean())
    scatter = float(draws.std()) * math.sqrt(1 + 1 / n) if n > 1 else math.nan
    half = float(t.ppf(0.975, n - 1)) * scatter if n > 1 else math.nan
    e = Estimate(away, away - half, away + half, n)
    if primary.margin is None:
        return Measured(e, against_sets(value, draws), detectable_against_sets(draws))
    _keeps_from_above(primary)
    two = primary.alternative == "two-sided"
    low, high = primary.margin + away, primary.margin - away  # room on either side
    room = min(low, high) if two else high
    p = float(t.sf(room / scatter, n - 1)) if scatter > 0 else math.nan if n < 2 else float(room <= 0)
    return Measured(e, p, detectable_margin(scatter, n - 1, sides=2 if two else 1))


def _keeps_from_above(primary: Primary) -> None:
    if primary.alternative == "greater":
        raise MMHooksError(
            f"primary {primary.name!r}: expected a margin with 'two-sided' (no effect) or 'less' (keeps), got 'greater'"
        )
