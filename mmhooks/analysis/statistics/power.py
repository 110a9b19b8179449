"""Smallest effects that the studies' tests detect with 80 % power: shown beside every verdict of no difference.

The error that enters is the one of the run at hand (its clusters, its random draws); the *effect* never does: power at
the observed effect would only repeat the p-value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mmhooks.analysis.statistics.equivalence import Alternative
from mmhooks.errors import ShapeMismatch

POWER = 0.8
ALPHA = 0.05


def detectable_mean(
    error: float,
    df: int,
    *,
    alternative: Alternative = "two-sided",
    alpha: float = ALPHA,
    power: float = POWER,
) -> float:
    """Computes the smallest mean that a t-test with this standard error and these degrees of freedom detects.

    Analytic, by the noncentral t. The sign-flip test of the same clusters has the same power up to the discreteness of
    few clusters, with which it may be unable to reject at all: then infinity.

    >>> round(detectable_mean(1.0, 10_000), 2), round(detectable_mean(1.0, 10_000, alternative="less"), 2)
    (2.8, 2.49)
    """
    _check_shares(alpha, power)
    if df < 1 or math.isnan(error):
        return math.nan
    if 2.0 ** -(df + 1) * (2 if alternative == "two-sided" else 1) > alpha:
        return math.inf
    return detectable_t(error, float(df), alternative=alternative, alpha=alpha, power=power)


def detectable_t(
    error: float,
    df: float,
    *,
    alternative: Alternative = "two-sided",
    alpha: float = ALPHA,
    power: float = POWER,
) -> float:
    """Computes the same where only the t-test is made, which can reject at any degrees of freedom.

    >>> round(detectable_t(1.0, 4.0), 2), detectable_mean(1.0, 4)
    (3.76, inf)
    """
    from scipy.stats import nct, t

    _check_shares(alpha, power)
    if not df > 0 or math.isnan(error):
        return math.nan
    if error == 0:
        return 0.0
    two = alternative == "two-sided"
    cut = float(t.ppf(1 - alpha / 2 if two else 1 - alpha, df))
    return error * _root(lambda shift: float(nct.sf(cut, df, shift)) - power)


def detectable_margin(
    error: float, df: int, *, sides: int = 2, alpha: float = ALPHA, power: float = POWER
) -> float:
    """Computes the smallest margin within which a mean that truly is zero is shown to lie with this power.

    Args:
        sides: 2 for equivalence, 1 for non-inferiority.

    >>> round(detectable_margin(1.0, 10_000), 2), round(detectable_margin(1.0, 10_000, sides=1), 2)
    (2.93, 2.49)
    """
    from scipy.stats import t

    _check_shares(alpha, power)
    if sides not in (1, 2):
        raise ShapeMismatch(f"sides: expected 1 or 2, got {sides}")
    if df < 1 or math.isnan(error):
        return math.nan
    # Both one-sided tests pass if |t| < margin/error - cut, which a central t does with probability power.
    reach = float(t.ppf((1 + power) / 2 if sides == 2 else power, df))
    return error * (reach + float(t.ppf(1 - alpha, df)))


def detectable_beyond_random(
    drawn: Sequence[float] | Float[Tensor, " draws"],
    *,
    alternative: Alternative = "two-sided",
    alpha: float = ALPHA,
    power: float = POWER,
) -> float:
    """Computes by how much a set's effect must be shifted from that of random sets, to lie beyond them this often.

    The set is taken to scatter as the random ones do. By the draws themselves, without a distribution: the threshold
    is the order statistic that :func:`~mmhooks.analysis.statistics.resampling.beyond_random` needs, and the shift
    brings all but ``1 - power`` of the draws beyond it. On the side where that is harder, for a two-sided test.
    Infinite with too few draws for ``alpha``.

    >>> x = torch.linspace(0, 1, 999)
    >>> round(detectable_beyond_random(x), 2), detectable_beyond_random(x[:20])
    (0.78, inf)
    """
    _check_shares(alpha, power)
    draws = torch.as_tensor(drawn, dtype=torch.float64)
    if not len(draws) or not bool(draws.isfinite().all()):
        return math.nan
    n, factor = len(draws), 2 if alternative == "two-sided" else 1
    allowed = math.floor(alpha * (n + 1) / factor + 1e-9) - 1  # draws that may lie beyond the value
    if allowed < 0:
        return math.inf
    ordered = draws.sort().values
    low, high = ordered[allowed], ordered[n - 1 - allowed]
    tails = torch.tensor([1 - power, power], dtype=torch.float64)
    weak, strong = torch.quantile(draws, tails)
    up, down = float(high - weak), float(strong - low)
    return {"greater": up, "less": down, "two-sided": max(up, down)}[alternative]


def detectable_against_sets(
    drawn: Sequence[float] | Float[Tensor, " draws"],
    *,
    alternative: Alternative = "two-sided",
    alpha: float = ALPHA,
    power: float = POWER,
) -> float:
    """Computes the same for :func:`~mmhooks.analysis.statistics.resampling.against_sets`, by the noncentral t."""
    draws = torch.as_tensor(drawn, dtype=torch.float64)
    n = len(draws)
    if n < 2:
        return math.nan
    from scipy.stats import nct, t

    _check_shares(alpha, power)
    cut = float(t.ppf(1 - alpha / (2 if alternative == "two-sided" else 1), n - 1))
    scatter = float(draws.std()) * math.sqrt(1 + 1 / n)
    return scatter * _root(lambda shift: float(nct.sf(cut, n - 1, shift)) - power)


def detectable_rate(
    rate: float, n: int, other: int | None = None, *, alpha: float = ALPHA, power: float = POWER
) -> float:
    """Computes the smallest difference from ``rate`` that ``n`` independent samples a side detect, two-sided.

    By Cohen's arcsine, on the side where the difference has more room. For judgements of the *same* samples use
    :func:`detectable_mean` of their differences instead: pairing removes what samples share.

    Args:
        other: samples of the other side, if not ``n``.

    >>> round(detectable_rate(0.5, 100), 3)
    0.193
    """
    from scipy.stats import norm

    _check_shares(alpha, power)
    m = n if other is None else other
    if not 0 <= rate <= 1 or min(n, m) < 1:
        raise ShapeMismatch(
            f"expected a rate from 0 to 1 and at least one sample a side, got {rate}, {n}, {m}"
        )
    h = float(norm.ppf(1 - alpha / 2) + norm.ppf(power)) * math.sqrt(1 / n + 1 / m)
    at = 2 * math.asin(math.sqrt(rate))
    away = at - h if rate > 0.5 else at + h
    if not 0 <= away <= math.pi:
        return math.inf  # not even 0 or 1 differs detectably
    return abs(math.sin(away / 2) ** 2 - rate)


def _check_shares(alpha: float, power: float) -> None:
    if not (0 < alpha < 1 and alpha < power < 1):
        raise ShapeMismatch(f"expected 0 < alpha < power < 1, got alpha {alpha} and power {power}")


def _root(gap: Callable[[float], float]) -> float:
    from scipy.optimize import root_scalar

    high = 4.0
    while gap(high) < 0:
        high *= 2
    return float(root_scalar(gap, bracket=(0.0, high), xtol=1e-6).root)
