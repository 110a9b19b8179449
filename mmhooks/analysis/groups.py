"""The three groups of a head, all with members: mu ± sigma, or ranks where scores are too skewed for that."""

from __future__ import annotations

from mmhooks.analysis.mds import GROUPS, MDSResult
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
    >>> from mmhooks.analysis.mds import mds
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
