"""Random feature sets of the same size: what a group must beat before it is said to matter."""

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
    """``draws`` random sets as large as ``group``, from ``alive`` features (dead ones would be no control).

    Args:
        disjoint: draw from features outside the group.

    Raises:
        ShapeMismatch: fewer features to draw from than the group has.

    >>> [len(s) for s in size_matched(FeatureSet([1, 2, 3], 10), draws=2)]
    [3, 3]
    """
    if not isinstance(group, FeatureSet):
        raise ShapeMismatch(
            f"expected a FeatureSet, which says among how many features it was chosen, got {type(group).__name__}; "
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
        raise ShapeMismatch(f"{len(pool)} features to draw from, but {group!r} needs {len(group)}")
    return [pool.sample(len(group), seed=seed * 100_003 + i) for i in range(draws)]
