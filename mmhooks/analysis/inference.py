"""Tests of hypotheses: which features are dominated at all, whether two groups differ, and many tests at once."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mmhooks.analysis.mds import MDSResult
from mmhooks.analysis.results import Records, Result
from mmhooks.errors import MMHooksError, WrongHead
from mmhooks.hooks.features import FeatureSet, as_feature_set


@dataclass(frozen=True)
class FeatureTests(Result):
    """One test a feature: ``p``, and ``q`` after Benjamini-Hochberg over the features tested (NaN: not tested)."""

    p: Float[Tensor, " n"] = field(repr=False)
    q: Float[Tensor, " n"] = field(repr=False)
    significant: Bool[Tensor, " n"] = field(repr=False)
    tested: int
    level: float

    def table(self) -> Records:
        found = int(self.significant.sum())
        share = found / self.tested if self.tested else math.nan
        return Records([{"tested": self.tested, "q <": self.level, "found": found, "share": share}])


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


def differs_from_half(result: MDSResult, *, level: float = 0.05) -> FeatureTests:
    """For every feature, does R differ from one half: Student's t over its pairs, then Benjamini-Hochberg.

    The smallest p that ``c`` pairs can give to a test that flips their signs is 2^(1-c); p is never below it,
    so that a feature seen in three pairs with equal ratios is no discovery. Fewer than two pairs: not tested.

    >>> from mmhooks.analysis.mds import mds
    >>> image = torch.tensor([[1.0, 1.0]] * 30); text = torch.tensor([[0.0, 1.0]] * 30)
    >>> differs_from_half(mds(image, text)).significant
    tensor([ True, False])
    """
    from scipy.stats import t

    if not 0 < level < 1:
        raise MMHooksError(f"the level of a test lies between 0 and 1, came {level}")
    counts = result.counts.double()
    away, error = (result.R - 0.5).abs(), result.standard_error
    # Equal ratios in all pairs leave rounding as their spread; the sign flips decide then.
    exact = error <= 1e-9
    statistic = torch.where(exact, torch.where(away > 1e-9, torch.inf, 0.0), away / error.clamp_min(1e-300))
    p = torch.from_numpy(np.asarray(2 * t.sf(statistic.numpy(), (counts - 1).clamp_min(1).numpy())))
    p = torch.maximum(p, (2.0 ** (1 - counts)).clamp_max(1.0))
    p = torch.where(counts >= 2, p, torch.nan)
    q = benjamini_hochberg(p)
    return FeatureTests(p, q, q < level, int((counts >= 2).sum()), level)


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
