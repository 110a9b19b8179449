"""Hypothesis tests: a permutation test between two groups, and Benjamini-Hochberg for many tests at once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mmhooks.analysis.results import Records, Result
from mmhooks.errors import WrongHead
from mmhooks.hooks.features import FeatureSet, as_feature_set


@dataclass(frozen=True)
class PermutationTest(Result):
    """Difference of two groups' means, and how often random groups of the same sizes differ as much."""

    difference: float
    p: float
    plus: tuple[str, int]
    minus: tuple[str, int]
    draws: int

    def table(self) -> Records:
        name = f"{self.plus[0]} − {self.minus[0]}"
        features = f"{self.plus[1]} / {self.minus[1]}"
        return Records(
            [{"contrast": name, "difference": self.difference, "p": self.p, "features": features, "draws": self.draws}]
        )  # fmt: skip


def benjamini_hochberg(p: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Adjusts p-values: calling those below q significant keeps the expected share of false discoveries below q.

    NaN (not tested) stays NaN and does not count as a test.

    >>> benjamini_hochberg(torch.tensor([0.01, 0.04, float("nan"), 0.03]))
    tensor([0.0300, 0.0400,    nan, 0.0400], dtype=torch.float64)
    """
    from scipy.stats import false_discovery_control

    p = p.double()
    q, known = torch.full_like(p, torch.nan), ~p.isnan()
    if bool(known.any()):
        q[known] = torch.from_numpy(np.asarray(false_discovery_control(p[known].numpy())))
    return q


def permutation_test(
    values: Float[Tensor, " n"], plus: Any, minus: Any, *, draws: int = 9999, seed: int = 0
) -> PermutationTest:
    """Tests whether two groups of features (FeatureSets, indices or bool masks) differ in the mean of ``values``, by
    permuting the group labels of their members.

    NaN values are left out. p counts the permutations that differ at least as much, in either direction, and the
    observed one. It is NaN, with no permutation made, if a group has fewer than two features with a value.

    Raises:
        WrongHead: a group belongs to another number of features, or the groups share features.
    """
    from scipy.stats import permutation_test as permuted

    for group in (plus, minus):
        if isinstance(group, FeatureSet) and group.n_features != len(values):
            raise WrongHead(
                f"expected a group of the {len(values)} features with values, got {group!r}: take both from one head"
            )
    plus, minus = (as_feature_set(group, len(values)) for group in (plus, minus))
    if set(plus) & set(minus):
        raise WrongHead(
            f"expected disjoint groups, got {plus!r} and {minus!r}, which share {len(set(plus) & set(minus))} features"
        )
    known = ~values.isnan()
    one, other = (values[g.mask & known].double().numpy() for g in (plus, minus))
    sizes = ((plus.name, len(one)), (minus.name, len(other)))
    if min(len(one), len(other)) < 2:
        return PermutationTest(math.nan, math.nan, *sizes, 0)
    outcome = permuted(
        (one, other),
        _difference,
        vectorized=True,
        n_resamples=draws,
        batch=1000,
        random_state=seed,  # pyright: ignore[reportCallIssue] - newer scipy calls it rng, and takes both
    )
    made = len(outcome.null_distribution)
    return PermutationTest(float(outcome.statistic), float(outcome.pvalue), *sizes, made)


def _difference(x: np.ndarray, y: np.ndarray, axis: int = -1) -> Any:
    return x.mean(axis=axis) - y.mean(axis=axis)
