"""Intervals: percentile bootstrap over features or samples, Wilson score for rates."""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from mmhooks.analysis.results import Estimate
from mmhooks.errors import ShapeMismatch


def bootstrap_means(
    values: Float[Tensor, " n"], *, draws: int = 2000, seed: int = 0
) -> Float[Tensor, " draws"]:
    """Computes the means of ``draws`` resamples of ``values``, NaN left out. Equal seeds give equal draws."""
    known = values[~values.isnan()].double()
    if not len(known):
        return torch.full((draws,), math.nan, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    means = []
    rows = max(1, 2**22 // len(known))  # some 32 MB of picks at a time
    for begin in range(0, draws, rows):
        picks = torch.randint(len(known), (min(rows, draws - begin), len(known)), generator=generator)
        means.append(known[picks].mean(1))
    return torch.cat(means)


def bootstrap(
    values: Float[Tensor, " n"], *, draws: int = 2000, seed: int = 0, level: float = 0.95
) -> Estimate:
    """Computes the mean of the known values with its percentile bootstrap interval.

    >>> bootstrap(torch.tensor([1.0, 1.0, 1.0]))
    Estimate(value=1.0, low=1.0, high=1.0, n=3, level=0.95)
    """
    n = int((~values.isnan()).sum())
    value = float(values.double().nanmean()) if n else math.nan
    if n < 2:
        return Estimate(value, math.nan, math.nan, n, level)
    return from_draws(value, bootstrap_means(values, draws=draws, seed=seed), n, level)


def bootstrap_histogram(
    values: Shaped[Tensor, " bins"],
    counts: Int[Tensor, " bins"],
    *,
    draws: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Estimate:
    """:func:`bootstrap` of samples of which ``counts[i]`` have the value ``values[i]``: the same resampling, at a
    cost that grows with the number of distinct values instead of samples.

    >>> bootstrap_histogram(torch.arange(3), torch.tensor([0, 4, 0])).high
    1.0
    """
    some = counts > 0
    value, count = values[some].double(), counts[some].double()
    n = int(count.sum())
    mean = float((value * count).sum() / n) if n else math.nan
    if n < 2:
        return Estimate(mean, math.nan, math.nan, n, level)
    picks = np.random.default_rng(seed).multinomial(n, (count / n).numpy(), size=draws)
    return from_draws(mean, torch.from_numpy(picks).double() @ value / n, n, level)


def bootstrap_difference(
    one: Float[Tensor, " a"],
    other: Float[Tensor, " b"],
    *,
    draws: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Estimate:
    """Computes the mean of ``one`` minus that of ``other``, both resampled independently; n counts both."""
    counts = [int((~v.isnan()).sum()) for v in (one, other)]
    value = float(one.double().nanmean()) - float(other.double().nanmean()) if all(counts) else math.nan
    if min(counts) < 2:
        return Estimate(value, math.nan, math.nan, sum(counts), level)
    drawn = bootstrap_means(one, draws=draws, seed=seed) - bootstrap_means(other, draws=draws, seed=seed + 1)
    return from_draws(value, drawn, sum(counts), level)


def bootstrap_spread(
    values: Float[Tensor, " n"], *, draws: int = 2000, seed: int = 0, level: float = 0.95
) -> Estimate:
    """Computes the population standard deviation of the known values with its percentile bootstrap interval.

    >>> bootstrap_spread(torch.tensor([1.0, 3.0, 1.0, 3.0])).value
    1.0
    """
    known = values[~values.isnan()].double()
    n = len(known)
    value = float(known.std(unbiased=False)) if n else math.nan
    if n < 2:
        return Estimate(value, math.nan, math.nan, n, level)
    mean, square = (
        bootstrap_means(x, draws=draws, seed=seed)
        for x in (known - known.mean(), (known - known.mean()).square())
    )
    return from_draws(value, (square - mean.square()).clamp_min(0).sqrt(), n, level)


def from_draws(value: float, drawn: Float[Tensor, " draws"], n: int, level: float = 0.95) -> Estimate:
    """Makes an estimate of ``value`` whose interval is the central ``level`` of ``drawn``."""
    tail = (1 - level) / 2
    low, high = torch.quantile(drawn.double(), torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Estimate(value, low, high, n, level)


def wilson(hits: int, n: int, *, level: float = 0.95) -> Estimate:
    """Computes a rate with its Wilson score interval.

    Raises:
        ShapeMismatch: ``hits`` lies outside ``0 .. n``.

    >>> wilson(5, 20).low > .11, wilson(5, 20).high < .48
    (True, True)
    """
    if not 0 <= hits <= n:
        raise ShapeMismatch(f"expected hits between 0 and the number of trials {n}, got {hits}")
    if n == 0:
        return Estimate(math.nan, math.nan, math.nan, 0, level)
    z = math.sqrt(2) * float(torch.erfinv(torch.tensor(level, dtype=torch.float64)))
    p = hits / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Estimate(p, max(0.0, centre - half), min(1.0, centre + half), n, level)


def paired_rates(
    after: Bool[Tensor, " n"], before: Bool[Tensor, " n2"], *, level: float = 0.95
) -> tuple[Estimate, float]:
    """Computes the difference of two rates over the same samples, and its standard error.

    Half a sample is added to each of the four cells, so that samples that agree everywhere do not give an interval of
    width 0. Samples must be independent; families are for
    :func:`~mmhooks.analysis.statistics.resampling.paired_test`.

    Source: Agresti, Min 2005 ("Simple improved confidence intervals for comparing matched proportions").

    Raises:
        ShapeMismatch: there is no sample.

    >>> right = torch.arange(100) < 40
    >>> change, error = paired_rates(right, right)
    >>> change.value, round(change.high, 3), round(error, 4)
    (0.0, 0.019, 0.0098)
    """
    if not len(after) or len(after) != len(before):
        raise ShapeMismatch(
            f"expected the same samples twice, at least one, got {len(after)} and {len(before)}"
        )
    gained, lost = int((after & ~before).sum()), int((before & ~after).sum())
    n = len(after) + 2
    centre = (gained - lost) / n
    error = math.sqrt(max(0.0, (gained + lost + 1) - (gained - lost) ** 2 / n)) / n
    half = math.sqrt(2) * float(torch.erfinv(torch.tensor(level, dtype=torch.float64))) * error
    value = (gained - lost) / len(after)
    return Estimate(value, max(-1.0, centre - half), min(1.0, centre + half), len(after), level), error
