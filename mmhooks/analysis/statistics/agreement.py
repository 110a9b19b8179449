"""Agreement of raters beyond chance: Krippendorff's alpha of nominal labels."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmhooks.analysis.results import Estimate
from mmhooks.analysis.statistics.intervals import from_draws
from mmhooks.errors import ShapeMismatch

MISSING = -1


def krippendorff_alpha(
    labels: Int[Tensor, "items raters"], *, draws: int = 2000, seed: int = 0, level: float = 0.95
) -> Estimate:
    """Computes Krippendorff's alpha with a bootstrap interval over items: 1 is agreement, 0 is chance.

    ``1 - observed / expected`` disagreement. Items with fewer than two labels are left out; n counts the others. NaN if
    all labels are equal: then nothing can be told from chance.

    Args:
        labels: categories from 0; ``-1`` where a rater gave none.

    Raises:
        ShapeMismatch: a label below -1.

    Source: Krippendorff 2011, Computing Krippendorff's alpha-reliability, nominal data.

    >>> round(krippendorff_alpha(torch.tensor([[0, 0], [1, 1], [0, 1], [1, 1]])).value, 3)
    0.533
    """
    if labels.numel() and int(labels.min()) < MISSING:
        raise ShapeMismatch(
            f"alpha: expected categories from 0, and -1 for a missing label, got {int(labels.min())}"
        )
    categories = int(labels.max()) + 1 if labels.numel() else 0
    one_hot = torch.nn.functional.one_hot(labels + 1, categories + 1)[:, :, 1:]
    counts = one_hot.sum(1).double()
    counts = counts[counts.sum(1) >= 2]
    n = len(counts)
    if n == 0:
        return Estimate(math.nan, math.nan, math.nan, 0, level)
    # Every item as a row of sums: pairs of equal labels over the labels less one, labels, labels of each category.
    size = counts.sum(1)
    equal = (counts.square() - counts).sum(1) / (size - 1)
    rows = torch.cat([equal[:, None], size[:, None], counts], 1)
    value = float(_alpha(rows.sum(0, keepdim=True)))
    if n < 2:
        return Estimate(value, math.nan, math.nan, n, level)
    picks = torch.randint(n, (draws, n), generator=torch.Generator().manual_seed(seed))
    weights = torch.zeros(draws, n, dtype=torch.float64).scatter_add(
        1, picks, torch.ones_like(picks).double()
    )
    drawn = _alpha(weights @ rows)
    known = drawn[~drawn.isnan()]
    if math.isnan(value) or not len(known):
        return Estimate(value, math.nan, math.nan, n, level)
    return from_draws(value, known, n, level)


def _alpha(sums: Float[Tensor, "draws columns"]) -> Float[Tensor, " draws"]:
    equal, size, counts = sums[:, 0], sums[:, 1], sums[:, 2:]
    by_chance = (counts.square() - counts).sum(1) / (size * (size - 1))
    expected = 1 - by_chance
    return torch.where(expected > 1e-12, 1 - (1 - equal / size) / expected.clamp_min(1e-12), torch.nan)
