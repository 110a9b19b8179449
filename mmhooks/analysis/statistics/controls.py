"""Random feature sets that a group's effect is compared with: as large as the group, or with its mass or norm as well.

A random set as large as a group can still hold a tenth of its activation, and then its smaller effect says nothing.
Three kinds of control answer three questions:

- :func:`size_matched`: does it matter *that* it is this group, and not any set of so many features?
- :func:`weight_matched` with a weight per feature (:func:`activation_mass`): the same, at equal activation removed;
- :func:`weight_matched` with a weight per pair of features (:func:`edit_gram`): the same, at an edit of equal norm.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from mmhooks.analysis.results import Estimate, Result
from mmhooks.errors import MMHooksError, NotFinite, ShapeMismatch
from mmhooks.hooks.features import FeatureSet

TRIES = 50  # of one draw of weight_matched, before a group counts as one that cannot be matched
DRAWS = 200  # the smallest two-sided p is then .01, which survives Holm over five primaries


class NoControl(MMHooksError):
    """No random set outside a group has the group's size and weight; the message says how near one comes."""


@dataclass(frozen=True)
class Matched(Result):
    """Random sets with the size and the weight of a group.

    Attributes:
        ratio: mean over the sets of (their weight / the group's), between the smallest and the largest.
        overlap: mean share of a set's features that another one has too: near 1, the draws are hardly several.
        pool: the number of features that were drawn from.
    """

    sets: tuple[FeatureSet, ...] = field(repr=False)
    what: str
    ratio: Estimate
    overlap: float
    pool: int

    def __len__(self) -> int:
        return len(self.sets)


def size_matched(
    group: FeatureSet,
    *,
    draws: int = DRAWS,
    seed: int = 0,
    alive: Bool[Tensor, " n"] | FeatureSet | None = None,
    disjoint: bool = False,
) -> Sequence[FeatureSet]:
    """Draws ``draws`` random sets as large as ``group`` from the ``alive`` features (dead ones would be no control).

    Args:
        disjoint: draw only features outside the group.

    Raises:
        ShapeMismatch: there are fewer features to draw from than the group has.

    >>> [len(s) for s in size_matched(FeatureSet([1, 2, 3], 10), draws=2)]
    [3, 3]
    """
    pool = _pool(group, alive, disjoint=disjoint)
    return [pool.sample(len(group), seed=seed * 100_003 + i) for i in range(draws)]


def weight_matched(
    group: FeatureSet,
    weights: Shaped[Tensor, " n"] | Shaped[Tensor, "n n2"],
    *,
    what: str = "activation mass",
    draws: int = DRAWS,
    seed: int = 0,
    alive: Bool[Tensor, " n3"] | FeatureSet | None = None,
    tolerance: float = 0.05,
) -> Matched:
    """Draws random sets, disjoint from ``group``, that have its size and, within ``tolerance``, its total weight.

    Each set is a stratified sample: the features outside the group are cut into bins at the deciles of the group's own
    weights, bins with too few features are joined, and each bin gives as many features as the group has in it. Then
    single features are exchanged at random, each by the one (at random among equals) that brings the total nearest, until
    the total fits.
    Exchanges can get stuck where two at once would be needed. Such a draw is thrown away and drawn anew, up to ``TRIES``
    times, so that the sets are distributed as single draws that fit: nothing else is preferred.

    Args:
        weights: not negative, one per feature, which add up (:func:`activation_mass`); or a positive semi-definite
            matrix ``G``, for which the total of a set S is ``sqrt(sum of G[S, S])`` (:func:`edit_gram`).
        what: of what the weights are, for messages and reports.

    Raises:
        NoControl: a draw did not fit in ``TRIES`` tries; the message has the range of totals that were reached.
        ShapeMismatch: not one weight per feature (and feature), or a negative one, or fewer features to draw from than
            the group has.
        NotFinite: a weight is NaN or infinite.

    >>> import torch
    >>> made = weight_matched(FeatureSet([4, 9], 40), torch.linspace(1, 2, 40), draws=5)
    >>> made.ratio.low > .95, made.ratio.high < 1.05, all(not {4, 9} & set(s) for s in made.sets)
    (True, True, True)
    """
    n, w = group.n_features, weights.detach().double().cpu().numpy()
    if w.shape not in ((n,), (n, n)):
        raise ShapeMismatch(f"{what}: expected weights of shape {(n,)} or {(n, n)}, got {tuple(w.shape)}")
    if not np.isfinite(w).all():
        raise NotFinite(f"{what}: {int((~np.isfinite(w)).sum())} of {w.size} weights are NaN or infinite")
    each = w if w.ndim == 1 else np.diag(w).copy()
    if (each < 0).any():
        raise ShapeMismatch(f"{what}: expected weights of at least 0, got {float(each.min()):.3g}")
    pool = np.array(list(_pool(group, alive, disjoint=True)), dtype=int)
    mine = np.array(list(group), dtype=int)
    goal = _total(w, mine)
    if not len(mine) or goal <= 0:
        raise NoControl(
            f"{what} of {group!r}: expected more than 0, got {goal:.3g}: there is nothing to match"
        )
    sets, ratios = [], []
    bins = _bins(each[mine], each[pool])
    for i in range(draws):
        rng = np.random.default_rng([seed, i])
        tried = []
        while len(tried) < TRIES:
            start = np.concatenate(
                [pool[rng.choice(rows, count, replace=False)] for rows, count in bins if count]
            )
            found = _exchanged(w, start, pool, goal, tolerance, rng)
            tried.append(_total(w, found) / goal)
            if abs(tried[-1] - 1) <= tolerance:
                break
        else:
            near = min(tried, key=lambda r: abs(r - 1))
            raise NoControl(
                f"{what} of {group!r}: expected sets of {len(mine)} of the {len(pool)} features outside it within "
                f"{100 * tolerance:g} % of its {goal:.4g}, got {100 * min(tried):.0f} to {100 * max(tried):.0f} % in {TRIES} "
                f"tries (nearest {100 * near:.0f} %): the rest has no such set. Compare with size_matched and say what it "
                "removes"
            )
        sets.append(found)
        ratios.append(tried[-1])
    masks = np.zeros((draws, n), dtype=np.float32)
    for i, found in enumerate(sets):
        masks[i, found] = 1
    shared = masks @ masks.T
    others = draws * (draws - 1)
    overlap = float(shared.sum() - np.trace(shared)) / others / len(mine) if others else float("nan")
    return Matched(
        tuple(FeatureSet(s, n, name=f"random {i}", head=group.head) for i, s in enumerate(sets)),
        what,
        Estimate(float(np.mean(ratios)), min(ratios), max(ratios), draws),
        overlap,
        len(pool),
    )


def activation_mass(latents: Float[Tensor, "n k"]) -> Float[Tensor, " k"]:
    """Sums the absolute activations of each feature over the samples: what zeroing it removes."""
    return latents.detach().abs().double().sum(0)


def edit_gram(latents: Float[Tensor, "n k"], directions: Float[Tensor, "k d"]) -> Float[Tensor, "k k"]:
    """Computes G for which ``sum of G[S, S]`` is the mean squared norm of the edit that zeroes the features S.

    The edit of one sample is ``sum over S of f_k w_k``, so ``G = (f' f / n) * (W W')``, entry by entry.

    >>> import torch
    >>> f, w = torch.rand(6, 4), torch.randn(4, 3)
    >>> mean = (f[:, :2] @ w[:2]).square().sum(1).mean()
    >>> bool((edit_gram(f, w)[:2, :2].sum() - mean).abs() < 1e-5)
    True
    """
    f, w = latents.detach().double(), directions.detach().double()
    return (f.T @ f / len(f)) * (w @ w.T)


def _pool(group: FeatureSet, alive: Bool[Tensor, " n"] | FeatureSet | None, *, disjoint: bool) -> FeatureSet:
    if not isinstance(group, FeatureSet):
        raise ShapeMismatch(
            f"expected a FeatureSet, which knows the number of all features, got {type(group).__name__}; "
            "make one: mm.FeatureSet(indices, n_features)"
        )
    n = group.n_features
    if alive is None:
        pool = FeatureSet(range(n), n, name="all", head=group.head)
    elif isinstance(alive, FeatureSet):
        pool = alive
    else:
        pool = FeatureSet(alive, n, name="alive", head=group.head)
    if disjoint:
        pool = pool - group
    if len(pool) < len(group):
        raise ShapeMismatch(
            f"expected at least {len(group)} features to draw from, as {group!r} has, got {len(pool)}"
        )
    return pool


def _bins(group: np.ndarray, pool: np.ndarray, count: int = 10) -> list[tuple[np.ndarray, int]]:
    """Returns the rows of the pool in each bin of weights, and how many the group has there: never more."""
    edges = np.unique(np.quantile(group, np.linspace(0, 1, count + 1)[1:-1]))
    own, theirs = np.digitize(group, edges), np.digitize(pool, edges)
    made: list[tuple[np.ndarray, int]] = []
    for b in range(len(edges), -1, -1):  # the heaviest first: they decide the total
        rows, wanted = np.flatnonzero(theirs == b), int((own == b).sum())
        if made and len(made[-1][0]) < made[-1][1]:
            last, missing = made.pop()
            rows, wanted = np.concatenate([last, rows]), wanted + missing
        made.append((rows, wanted))
    while len(made[-1][0]) < made[-1][1]:  # the lightest bin has too few: join it to the next
        last, missing = made.pop()
        made[-1] = (np.concatenate([made[-1][0], last]), made[-1][1] + missing)
    return made


def _exchanged(
    w: np.ndarray,
    chosen: np.ndarray,
    pool: np.ndarray,
    goal: float,
    tolerance: float,
    rng: np.random.Generator,
) -> np.ndarray:
    """Exchanges features until the total of ``chosen`` is within half of ``tolerance``, or no exchange helps."""
    chosen = chosen.copy()
    turns = itertools.chain.from_iterable(rng.permutation(len(chosen)) for _ in range(6))
    for at in turns:
        total = _total(w, chosen)
        if abs(total / goal - 1) <= tolerance / 2:
            break
        free = np.setdiff1d(pool, chosen, assume_unique=True)
        if not len(free):
            break
        kept = np.delete(chosen, at)
        if w.ndim == 1:
            after = w[kept].sum() + w[free]
        else:
            after = np.sqrt(
                (w[np.ix_(kept, kept)].sum() + 2 * w[free][:, kept].sum(1) + w[free, free]).clip(0)
            )
        away = np.abs(after - goal)
        nearest = np.flatnonzero(away == away.min())
        if away[nearest[0]] < abs(total - goal):
            # Among features of equal weight none may be preferred, by its number or otherwise.
            chosen[at] = free[nearest[0] if len(nearest) == 1 else rng.choice(nearest)]
    return chosen


def _total(w: np.ndarray, chosen: np.ndarray) -> float:
    if w.ndim == 1:
        return float(w[chosen].sum())
    return float(np.sqrt(max(0.0, w[np.ix_(chosen, chosen)].sum())))
