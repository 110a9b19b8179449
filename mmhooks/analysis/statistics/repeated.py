"""Rates of samples that were each judged several times, and their differences: intervals and tests over samples."""

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
        difference: mean over samples of (first share − second share), with its cluster bootstrap interval.
        more, less: number of samples whose share of hits is larger in the first set, and in the second.
        p: two-sided and exact, over all sign flips of the samples' differences.
    """

    difference: Estimate
    more: int
    less: int
    p: float


def repeated_rate(hits: Bool[Tensor, "repeats n"]) -> Estimate:
    """Computes the share of hits over all repeats; ``n`` counts samples, which are the independent units.

    One repeat: Wilson's interval. Several: cluster bootstrap over samples, each with all of its repeats. If all
    judgements agree, resampling varies nothing, so the wider Wilson interval for n samples is used.

    Raises:
        ShapeMismatch: there is no judgement at all.

    >>> import torch
    >>> rate = repeated_rate(torch.tensor([[True, False, False, False], [True, True, False, False]]))
    >>> rate.value, rate.n
    (0.375, 4)
    """
    if not hits.numel():
        raise ShapeMismatch(
            f"a rate: expected at least one repeat of one sample, got shape {tuple(hits.shape)}"
        )
    repeats, n = hits.shape
    if repeats == 1 or bool((hits == hits[0, 0]).all()):
        return wilson(int(hits[0].sum()), n)
    return bootstrap(hits.double().mean(0))


def repeated_difference(one: Bool[Tensor, "a n"], other: Bool[Tensor, "b n2"]) -> Paired:
    """Computes the share of hits in ``one`` minus that in ``other``, sample by sample, over all repeats.

    With one repeat each, p is McNemar's exact test.

    Raises:
        ShapeMismatch: the numbers of samples differ, or one set is empty.

    >>> import torch
    >>> found = repeated_difference(torch.ones(1, 8, dtype=torch.bool), torch.zeros(3, 8, dtype=torch.bool))
    >>> found.difference.value, found.p == 2 / 2**8
    (1.0, True)
    """
    if one.shape[1] != other.shape[1] or not one.numel() or not other.numel():
        raise ShapeMismatch(
            f"expected two sets of judgements of the same samples, got shapes {tuple(one.shape)} and {tuple(other.shape)}"
        )
    a, b = len(one), len(other)
    # In units of 1 / (a b) differences are integers, so their distribution under sign flips is computed exactly.
    units = one.sum(0) * b - other.sum(0) * a
    return Paired(
        bootstrap(units.double() / (a * b)),
        int((units > 0).sum()),
        int((units < 0).sum()),
        sign_flip_p(units),
    )


def sign_flip_p(differences: Int[Tensor, " n"]) -> float:
    """Computes the exact probability that random signs put the sum of integer differences at least as far from 0.

    >>> import torch
    >>> sign_flip_p(torch.tensor([1, 1, 1])), sign_flip_p(torch.tensor([0, 0]))
    (0.25, 1.0)
    """
    sizes = [abs(d) for d in differences.tolist() if d]
    distribution = np.ones(1)  # of the sum, from -sum(sizes) in steps of 1
    for size in sizes:
        gap = np.zeros(2 * size)
        distribution = (np.concatenate([distribution, gap]) + np.concatenate([gap, distribution])) / 2
    sums = np.arange(len(distribution)) - sum(sizes)
    return min(1.0, float(distribution[np.abs(sums) >= abs(int(differences.sum()))].sum()))
