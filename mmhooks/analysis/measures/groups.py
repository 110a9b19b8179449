"""The groups ImgD, TextD and CrossD, none empty: by mu ± sigma, or by rank where scores are too skewed.

Also a test per feature of whether its score differs from one half.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mmhooks.analysis.inputs.checks import check_numbers
from mmhooks.analysis.measures.mds import GROUPS, MDSResult
from mmhooks.analysis.results import Records, Result
from mmhooks.analysis.statistics.hypothesis_tests import benjamini_hochberg
from mmhooks.errors import MMHooksError, NotFinite, ShapeMismatch
from mmhooks.hooks.features import FeatureSet

BY_SIGMA = "mu ± sigma"
BY_RANK = "highest and lowest sixth (mu ± sigma leaves a group empty)"


def groups_of(mds: MDSResult) -> tuple[dict[str, FeatureSet], str]:
    """Splits features into ImgD, TextD and CrossD, none empty; also returns the rule that defined the groups.

    The rule is the paper's ``mu ± sigma``. If scores are so skewed that no feature lies beyond one of the two bounds,
    the sixth of the alive features with the highest scores is ImgD and the sixth with the lowest is TextD (as many as
    a normal distribution has beyond one sigma); CrossD is the rest. Ties are ordered by feature number. Report the
    rule wherever the groups are reported.

    Args:
        mds: scores of a head's features, or of a model's own dimensions.

    Returns:
        Groups by name, and the rule, which a group defined by rank also has as ``info["rule"]``.

    Raises:
        ShapeMismatch: not the result of ``mds``, or its scores are not one floating-point number per feature.
        NotFinite: an alive feature's score is infinite or NaN.
        MMHooksError: fewer than six alive features, or the highest sixth scores no higher than the lowest.

    >>> import torch
    >>> from mmhooks.analysis.measures.mds import mds
    >>> share = torch.tensor([0.02] * 9 + [0.95] * 3)  # mu - sigma is -0.15: no TextD
    >>> groups, rule = groups_of(mds(share[None], 1 - share[None]))
    >>> {name: list(group) for name, group in groups.items()}
    {'ImgD': [10, 11], 'TextD': [0, 1], 'CrossD': [2, 3, 4, 5, 6, 7, 8, 9]}
    >>> rule
    'highest and lowest sixth (mu ± sigma leaves a group empty)'
    """
    _check_scores(mds)
    groups: dict[str, FeatureSet] = dict(zip(GROUPS, mds.groups, strict=True))
    if all(len(group) for group in groups.values()):
        return groups, BY_SIGMA
    n = len(mds.R)
    order = (mds.alive & ~mds.R.isnan()).nonzero().flatten()
    order = order[mds.R[order].argsort(stable=True)]
    sixth = len(order) // 6
    if not sixth:
        raise MMHooksError(
            f"groups: expected at least 6 alive features, got {len(order)} of {n}; use more pairs or another head"
        )
    lowest, highest = float(mds.R[order[sixth - 1]]), float(mds.R[order[-sixth]])
    if highest - lowest <= 1e-9:
        raise MMHooksError(
            f"groups: expected scores that differ, got {len(order)} alive features whose highest sixth begins at "
            f"{highest:.3f} and lowest sixth ends at {lowest:.3f}; use more pairs or another head"
        )
    by_rank = {"ImgD": order[-sixth:], "TextD": order[:sixth], "CrossD": order[sixth:-sixth]}
    about = {"rule": BY_RANK, "data": mds.data, "n_pairs": mds.n_pairs, "lowest": lowest, "highest": highest}
    return {k: FeatureSet(v, n, name=k, head=mds.head, info=about) for k, v in by_rank.items()}, BY_RANK


def _check_scores(mds: Any) -> None:
    if not isinstance(mds, MDSResult):
        raise ShapeMismatch(f"groups: expected the result of mm.mds(...), got a {type(mds).__name__}")
    check_numbers(mds.R, "R", ndim=1)
    if mds.R.shape != mds.dead.shape:
        raise ShapeMismatch(f"R: expected one score for each of {len(mds.dead)} features, got {len(mds.R)}")
    bad = mds.alive & ~torch.isfinite(mds.R)
    if bool(bad.any()):
        raise NotFinite(
            f"R: {int(bad.sum())} of {int(mds.alive.sum())} alive features have a NaN or infinite score, the first is "
            f"feature {int(bad.nonzero()[0])}; compute the scores again with mm.mds(...)"
        )


@dataclass(frozen=True)
class FeatureTests(Result):
    """One test per feature: ``p``, and ``q`` after Benjamini-Hochberg over the features tested (NaN: not tested)."""

    p: Float[Tensor, " n"] = field(repr=False)
    q: Float[Tensor, " n"] = field(repr=False)
    significant: Bool[Tensor, " n"] = field(repr=False)
    tested: int
    level: float

    def table(self) -> Records:
        found = int(self.significant.sum())
        share = found / self.tested if self.tested else math.nan
        return Records([{"tested": self.tested, "q <": self.level, "found": found, "share": share}])


def differs_from_half(result: MDSResult, *, level: float = 0.05) -> FeatureTests:
    """Tests for every feature whether R differs from one half: Student's t over its pairs, then Benjamini-Hochberg.

    The smallest p that a sign-flip test over ``c`` pairs can give is 2^(1-c); p is never below that, so that a
    feature seen in three pairs with equal ratios is not a discovery. Features with fewer than two pairs are not tested.

    >>> from mmhooks.analysis.measures.mds import mds
    >>> image = torch.tensor([[1.0, 1.0]] * 30); text = torch.tensor([[0.0, 1.0]] * 30)
    >>> differs_from_half(mds(image, text)).significant
    tensor([ True, False])
    """
    from scipy.stats import t

    if not 0 < level < 1:
        raise MMHooksError(f"level: expected a number between 0 and 1, got {level}")
    counts = result.counts.double()
    away, error = (result.R - 0.5).abs(), result.standard_error
    # If all ratios are equal, their spread is only rounding; then the sign-flip bound decides.
    exact = error <= 1e-9
    statistic = torch.where(exact, torch.where(away > 1e-9, torch.inf, 0.0), away / error.clamp_min(1e-300))
    p = torch.from_numpy(np.asarray(2 * t.sf(statistic.numpy(), (counts - 1).clamp_min(1).numpy())))
    p = torch.maximum(p, (2.0 ** (1 - counts)).clamp_max(1.0))
    p = torch.where(counts >= 2, p, torch.nan)
    q = benjamini_hochberg(p)
    return FeatureTests(p, q, q < level, int((counts >= 2).sum()), level)
