"""Pairing: whether a feature fires for the image and the text of the *same* pair more often than for shuffled pairs.

The Modality Dominance Score cannot see this: it is a statistic of the two marginals, and hardly changes when the
texts are shuffled.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmhooks.analysis.inputs.sparse import Latents, check_latent_pair, to_float32
from mmhooks.analysis.inputs.store_rows import BATCH, ActivationStore, paired_latents, row_batches
from mmhooks.analysis.measures.samples import one_per_family
from mmhooks.analysis.measures.top_activating import check_families
from mmhooks.analysis.results import Records, Result
from mmhooks.analysis.statistics.hypothesis_tests import benjamini_hochberg
from mmhooks.data.sparse_rows import SparseRows
from mmhooks.errors import ShapeMismatch
from mmhooks.heads.base import Head


@dataclass(frozen=True)
class PairingResult(Result):
    """Co-firing of ``n`` features on ``n_pairs`` pairs, compared with shuffled pairs.

    Attributes:
        lift: how many times more often a feature fires on both sides of a pair than with shuffled texts,
            ``n_both * n_pairs / (n_image * n_text)``; NaN where a side never fires.
        correlation: Pearson's r between the activations of the two sides over pairs, which also says something of
            features that always fire; NaN where a side is constant.
        p: of the lift, exact (Fisher's, one-sided: more often than shuffled); for features that fire in every pair on
            a side, whose lift is 1 whatever the pairing, of the correlation (one-sided, Student's t). NaN: not tested,
            because a side never fires or does not vary.
        q: after Benjamini-Hochberg over the features tested.
        both, image, text: pairs in which the feature fires on both sides, for the image, for the text.
    """

    lift: Float[Tensor, " n"] = field(repr=False)
    correlation: Float[Tensor, " n"] = field(repr=False)
    p: Float[Tensor, " n"] = field(repr=False)
    q: Float[Tensor, " n"] = field(repr=False)
    both: Int[Tensor, " n"] = field(repr=False)
    image: Int[Tensor, " n"] = field(repr=False)
    text: Int[Tensor, " n"] = field(repr=False)
    n_pairs: int

    def paired(self, level: float = 0.05) -> Bool[Tensor, " n"]:
        """Which features fire together on pairs more than on shuffled pairs, at false discovery rate ``level``."""
        return self.q < level

    def table(self) -> Records:
        tested, found = int((~self.p.isnan()).sum()), int(self.paired().sum())
        known = self.lift[~self.lift.isnan()]
        return Records(
            [
                {
                    "tested": tested,
                    "paired (q < .05)": found,
                    "share": found / tested if tested else math.nan,
                    "median lift": float(known.median()) if len(known) else math.nan,
                    "pairs": self.n_pairs,
                }
            ]
        )


@torch.no_grad()
def pairing(
    image_latents: Latents | ActivationStore,
    text_latents: Latents | None = None,
    *,
    head: Head | None = None,
    image: str | None = None,
    text: str | None = None,
    families: Int[Tensor, " samples"] | None = None,
    seed: int = 0,
    progress: bool = False,
) -> PairingResult:
    """Tests for every feature whether it fires on both sides of a pair more often than with shuffled texts.

    Activations above 0 count as firing. The null is that of shuffling texts among pairs, exactly: given how often each
    side fires, the number of pairs in which both do is hypergeometric.

    Args:
        image_latents, text_latents: the two sides of the same pairs, row by row, dense or sparse; or only a store.
        head, image, text: with a store, as in :func:`mmhooks.analysis.measures.mds.mds`.
        families: the family of each pair (:func:`mmhooks.data.families`). Pairs of one family are not independent, so
            one random pair of each (by ``seed``) is used.

    Raises:
        ShapeMismatch: the sides differ in shape, or there are fewer than two pairs. NotFinite: NaN or infinity.

    >>> image = torch.tensor([[1.0, 1.0]] * 5 + [[0.0, 1.0]] * 5); text = torch.tensor([[1.0, 0.0], [1.0, 1.0]] * 5)
    >>> text[:, 0] = image[:, 0]  # feature 0 fires on the same pairs, feature 1 always for images
    >>> found = pairing(image, text)
    >>> found.lift.tolist(), found.p[0].item() < 0.005
    ([2.0, 1.0], True)
    """
    sides = paired_latents(image_latents, text_latents, head=head, image=image, text=text)
    n = len(sides)
    check_families(families, n)
    rows = one_per_family(families, n, seed)
    if len(rows) < 2:
        raise ShapeMismatch(f"pairing: expected at least 2 pairs of different families, got {len(rows)}")
    sums = _Sums(sides.n_features)
    for _, begin, end in row_batches(len(rows), BATCH, "pairing", progress=progress):
        chosen = rows[begin:end]
        sums.add(sides.images[chosen], sides.texts[chosen], begin)
    return sums.result(len(rows))


class _Sums:
    """Counts and sums of products over pairs, in double precision."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.counts = torch.zeros(3, width, dtype=torch.long)  # image, text, both
        self.moments = torch.zeros(5, width, dtype=torch.float64)  # sums of a, b, a², b², a b

    def add(self, image: Latents, text: Latents, start: int) -> None:
        check_latent_pair(image, text, self.width, start=start)
        a, b = (
            to_float32(x.dense() if isinstance(x, SparseRows) else x).cpu().double() for x in (image, text)
        )
        fires = a > 0, b > 0
        self.counts += torch.stack([fires[0].sum(0), fires[1].sum(0), (fires[0] & fires[1]).sum(0)])
        self.moments += torch.stack(
            [a.sum(0), b.sum(0), a.square().sum(0), b.square().sum(0), (a * b).sum(0)]
        )

    def result(self, n: int) -> PairingResult:
        from scipy.stats import hypergeom, t

        image, text, both = self.counts
        lift = both.double() * n / (image * text).double()
        sum_a, sum_b, square_a, square_b, product = self.moments
        spread = ((square_a - sum_a.square() / n) * (square_b - sum_b.square() / n)).clamp_min(0).sqrt()
        # A constant side leaves rounding of its squares; 1e-9 of them is no spread.
        varies = spread > 1e-9 * (square_a * square_b).sqrt()
        r = torch.where(varies, (product - sum_a * sum_b / n) / torch.where(varies, spread, 1), torch.nan)
        exact = torch.from_numpy(np.asarray(hypergeom.sf((both - 1).numpy(), n, image.numpy(), text.numpy())))
        if n > 2:
            statistic = r * ((n - 2) / (1 - r.square()).clamp_min(1e-300)).sqrt()
            by_correlation = torch.from_numpy(np.asarray(t.sf(statistic.numpy(), n - 2)))
        else:
            by_correlation = torch.full_like(r, torch.nan)
        always = (image == n) | (text == n)
        p = torch.where(always, by_correlation, exact.double())
        p = torch.where((image > 0) & (text > 0), p, torch.nan)
        return PairingResult(lift, r, p, benjamini_hochberg(p), both, image, text, n)
