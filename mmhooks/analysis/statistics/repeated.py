"""Rates of samples that were each judged several times, and their differences: intervals and tests over samples."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int
from torch import Tensor

from mmhooks.analysis.results import Estimate, Result
from mmhooks.analysis.statistics.intervals import wilson
from mmhooks.analysis.statistics.resampling import bootstrap_ratio, cluster_sums
from mmhooks.errors import ShapeMismatch


@dataclass(frozen=True)
class Paired(Result):
    """Difference of two rates on the same samples.

    Attributes:
        difference: mean over samples of (first share − second share), with its cluster bootstrap interval.
        more, less: number of samples (clusters, where they are given) whose share of hits is larger in the first set,
            and in the second.
        p: two-sided and exact, over all sign flips of their differences.
    """

    difference: Estimate
    more: int
    less: int
    p: float


def repeated_rate(hits: Bool[Tensor, "repeats n"], clusters: Int[Tensor, " n2"] | None = None) -> Estimate:
    """Computes the share of hits over all repeats; ``n`` counts samples, whose repeats are not independent.

    One repeat: Wilson's interval. Several, or samples in ``clusters`` (on one drawing, say): bootstrap over samples or
    clusters, each with all of its repeats. If all judgements agree, resampling varies nothing, so the wider Wilson
    interval for as many samples (clusters) is used.

    Raises:
        ShapeMismatch: there is no judgement at all, or not one cluster label per sample.

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
    if bool((hits == hits[0, 0]).all()) and clusters is not None:
        units = len(clusters.unique())
        e = wilson(units * int(hits[0, 0]), units)
        return Estimate(e.value, e.low, e.high, n, e.level)
    if clusters is None and (repeats == 1 or bool((hits == hits[0, 0]).all())):
        return wilson(int(hits[0].sum()), n)
    return bootstrap_ratio(hits.double().mean(0), None, clusters)


def repeated_difference(
    one: Bool[Tensor, "a n"], other: Bool[Tensor, "b n2"], clusters: Int[Tensor, " n3"] | None = None
) -> Paired:
    """Computes the share of hits in ``one`` minus that in ``other``, sample by sample, over all repeats.

    With one repeat each, p is McNemar's exact test. With ``clusters`` the signs of whole clusters are flipped.

    Raises:
        ShapeMismatch: the numbers of samples differ, one set is empty, or not one cluster label per sample.

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
    flipped = cluster_sums(units[:, None].double(), clusters)[:, 0].long()
    return Paired(
        bootstrap_ratio(units.double() / (a * b), None, clusters),
        int((flipped > 0).sum()),
        int((flipped < 0).sum()),
        sign_flip_p(flipped),
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
