"""Tests of hypotheses: which features are dominated at all, whether two groups differ, and many tests at once."""

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
    """Difference of the means of two groups, and how often random groups of these sizes differ as much."""

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
    """Adjusted p-values: calling those below q significant keeps the expected share of false ones below q.

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
    """Do two groups of features (FeatureSets, indices or bool masks) differ in the mean of ``values``: labels are
    permuted among their members.

    NaN are left out. p counts the permutations that differ at least as much, in either direction, and the
    observed one; it is NaN, of no permutation, where a group has fewer than two features with a value.

    Raises:
        WrongHead: groups of another number of features, or that share some.
    """
    from scipy.stats import permutation_test as permuted

    for group in (plus, minus):
        if isinstance(group, FeatureSet) and group.n_features != len(values):
            raise WrongHead(
                f"{group!r}, but there are values of {len(values)} features: take both from one head"
            )
    plus, minus = (as_feature_set(group, len(values)) for group in (plus, minus))
    if set(plus) & set(minus):
        raise WrongHead(
            f"{plus!r} and {minus!r} share {len(set(plus) & set(minus))} features: nothing to permute"
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
