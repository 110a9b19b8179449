"""The three groups of a head, all with members: mu ± sigma, or ranks where scores are too skewed for that."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mmhooks.analysis.measures.mds import GROUPS, MDSResult
from mmhooks.analysis.results import Records, Result
from mmhooks.analysis.statistics.hypothesis_tests import benjamini_hochberg
from mmhooks.errors import MMHooksError
from mmhooks.hooks.features import FeatureSet

BY_SIGMA = "mu ± sigma"
BY_RANK = "highest and lowest sixth (mu ± sigma leaves a group empty)"


def groups_of(mds: MDSResult) -> tuple[dict[str, FeatureSet], str]:
    """ImgD, TextD and CrossD with the rule that parted them, to be told wherever the groups are.

    The rule is the paper's, ``mu ± sigma``. Where scores are so skewed that no feature lies beyond one of the two
    bounds, the sixth of the live features with the highest score is ImgD and the sixth with the lowest is TextD (a
    normal law has as many beyond one sigma); CrossD is what lies between. Equal scores go by feature number.

    Args:
        mds: scores of a head's features, or of a model's own dimensions.

    Returns:
        groups by name, none empty, and the rule, also at ``info["rule"]`` of a group parted by rank.

    Raises:
        MMHooksError: fewer than six live features, or the highest sixth scores no higher than the lowest.

    >>> import torch
    >>> from mmhooks.analysis.measures.mds import mds
    >>> share = torch.tensor([0.02] * 9 + [0.95] * 3)  # mu - sigma is -0.15: no TextD
    >>> groups, rule = groups_of(mds(share[None], 1 - share[None]))
    >>> {name: list(group) for name, group in groups.items()}
    {'ImgD': [10, 11], 'TextD': [0, 1], 'CrossD': [2, 3, 4, 5, 6, 7, 8, 9]}
    >>> rule
    'highest and lowest sixth (mu ± sigma leaves a group empty)'
    """
    groups: dict[str, FeatureSet] = dict(zip(GROUPS, mds.groups, strict=True))
    if all(len(group) for group in groups.values()):
        return groups, BY_SIGMA
    n = len(mds.R)
    order = (mds.alive & ~mds.R.isnan()).nonzero().flatten()
    order = order[mds.R[order].argsort(stable=True)]
    sixth = len(order) // 6
    if not sixth:
        raise MMHooksError(
            f"{len(order)} of {n} features are alive, too few for three groups: more pairs or another head are needed"
        )
    lowest, highest = float(mds.R[order[sixth - 1]]), float(mds.R[order[-sixth]])
    if highest - lowest <= 1e-9:
        raise MMHooksError(
            f"scores of {len(order)} live features do not part: the highest sixth begins at {highest:.3f}, the lowest "
            f"ends at {lowest:.3f}"
        )
    parts = {"ImgD": order[-sixth:], "TextD": order[:sixth], "CrossD": order[sixth:-sixth]}
    about = {"rule": BY_RANK, "data": mds.data, "n_pairs": mds.n_pairs, "lowest": lowest, "highest": highest}
    return {k: FeatureSet(v, n, name=k, head=mds.head, info=about) for k, v in parts.items()}, BY_RANK


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


def differs_from_half(result: MDSResult, *, level: float = 0.05) -> FeatureTests:
    """For every feature, does R differ from one half: Student's t over its pairs, then Benjamini-Hochberg.

    The smallest p that ``c`` pairs can give to a test that flips their signs is 2^(1-c); p is never below it,
    so that a feature seen in three pairs with equal ratios is no discovery. Fewer than two pairs: not tested.

    >>> from mmhooks.analysis.measures.mds import mds
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
