"""Random feature sets of the same size: the control that a group's effect is compared with."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Bool
from torch import Tensor

from mmhooks.errors import ShapeMismatch
from mmhooks.hooks.features import FeatureSet


def size_matched(
    group: FeatureSet,
    *,
    draws: int = 20,
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
    return [pool.sample(len(group), seed=seed * 100_003 + i) for i in range(draws)]
