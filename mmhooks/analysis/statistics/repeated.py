"""Rates and their differences where every sample was judged several times: intervals and tests over samples."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int
from torch import Tensor

from mmhooks.analysis.results import Estimate, Result
from mmhooks.analysis.statistics.intervals import bootstrap, wilson
from mmhooks.errors import ShapeMismatch


@dataclass(frozen=True)
class Paired(Result):
    """Difference of two rates on the same samples.

    Attributes:
        difference: mean over samples of (own share − other share), with its cluster bootstrap interval.
        more, less: samples whose share of hits is larger in the first, and in the other.
        p: two-sided, exact: signs of the samples' differences flipped in all ways.
    """

    difference: Estimate
    more: int
    less: int
    p: float


def repeated_rate(hits: Bool[Tensor, "repeats n"]) -> Estimate:
    """Share of hits over all repeats; ``n`` of the estimate counts samples, which are what is independent.

    One repeat: Wilson's interval. More: cluster bootstrap over samples, each with all of its repeats. Where every
    judgement agrees, resampling has nothing to vary; there Wilson's interval for n samples stands, the wider one.

    Raises:
        ShapeMismatch: no judgement at all.

    >>> import torch
    >>> rate = repeated_rate(torch.tensor([[True, False, False, False], [True, True, False, False]]))
    >>> rate.value, rate.n
    (0.375, 4)
    """
    if not hits.numel():
        raise ShapeMismatch(f"a rate needs at least one repeat of one sample, came {tuple(hits.shape)}")
    repeats, n = hits.shape
    if repeats == 1 or bool((hits == hits[0, 0]).all()):
        return wilson(int(hits[0].sum()), n)
    return bootstrap(hits.double().mean(0))


def repeated_difference(one: Bool[Tensor, "a n"], other: Bool[Tensor, "b n2"]) -> Paired:
    """Share of hits in ``one`` minus that in ``other``, sample by sample, over all their repeats.

    With one repeat each, p is McNemar's exact test.

    Raises:
        ShapeMismatch: other samples, or none.

    >>> import torch
    >>> found = repeated_difference(torch.ones(1, 8, dtype=torch.bool), torch.zeros(3, 8, dtype=torch.bool))
    >>> found.difference.value, found.p == 2 / 2**8
    (1.0, True)
    """
    if one.shape[1] != other.shape[1] or not one.numel() or not other.numel():
        raise ShapeMismatch(
            f"two sets of judgements of the same samples, came {tuple(one.shape)} and {tuple(other.shape)}"
        )
    a, b = len(one), len(other)
    # In units of 1 / (a b) differences are whole numbers, and their law under flipped signs can be written down.
    units = one.sum(0) * b - other.sum(0) * a
    return Paired(
        bootstrap(units.double() / (a * b)),
        int((units > 0).sum()),
        int((units < 0).sum()),
        sign_flip_p(units),
    )


def sign_flip_p(differences: Int[Tensor, " n"]) -> float:
    """How often the sum of whole-numbered differences, signs thrown at random, is as far from 0 as it is; exact.

    >>> import torch
    >>> sign_flip_p(torch.tensor([1, 1, 1])), sign_flip_p(torch.tensor([0, 0]))
    (0.25, 1.0)
    """
    sizes = [abs(d) for d in differences.tolist() if d]
    law = np.ones(1)  # of the sum, from -sum(sizes) in steps of 1
    for size in sizes:
        gap = np.zeros(2 * size)
        law = (np.concatenate([law, gap]) + np.concatenate([gap, law])) / 2
    sums = np.arange(len(law)) - sum(sizes)
    return min(1.0, float(law[np.abs(sums) >= abs(int(differences.sum()))].sum()))
