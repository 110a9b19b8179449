"""Causal dominance: what masking one feature does to finding the right text for an image, and the right image for a text.

With unit texts t, the logit scale τ and an image embedding x, masking feature k subtracts ``f_k w_k`` from x, where f is
its activation and w its direction. Then every cosine follows in closed form::

    cos(x - f w, t) = (x·t - f w·t) / sqrt(|x|² - 2 f x·w + f² |w|²)

so that no model and no full decoding is run: the cost is one row of logits per active feature of a query.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmhooks.analysis.inputs.checks import check_pair
from mmhooks.analysis.measures.top_activating import check_families
from mmhooks.analysis.results import Records, Result
from mmhooks.analysis.statistics.hypothesis_tests import benjamini_hochberg
from mmhooks.data.sparse_rows import SparseRows
from mmhooks.errors import ShapeMismatch
from mmhooks.heads.base import Head

SIGN_FLIPS = 9999
NOTHING = 1e-5  # of a vector's length: what float32 embeddings leave of it when all of it is masked


@dataclass(frozen=True)
class CausalMDSResult(Result):
    """Effect of masking each of ``n`` features on retrieval, by the side on which it is masked.

    Attributes:
        image: mean over pairs of the rise of the image→text cross-entropy, in nats, if the feature is masked in the
            images; 0 if it fires in none.
        text: the same of text→image, if it is masked in the texts.
        score: ``|image| / (|image| + |text|)``, the causal counterpart of MDS; NaN if both are 0.
        image_q, text_q: of a two-sided sign-flip test over families of whether the effect differs from 0, after
            Benjamini-Hochberg over both sides of all features; NaN where the feature does not fire.
    """

    image: Float[Tensor, " n"] = field(repr=False)
    text: Float[Tensor, " n"] = field(repr=False)
    score: Float[Tensor, " n"] = field(repr=False)
    image_q: Float[Tensor, " n"] = field(repr=False)
    text_q: Float[Tensor, " n"] = field(repr=False)
    n_pairs: int
    families: int
    logit_scale: float

    def used(self, level: float = 0.05) -> tuple[Bool[Tensor, " n"], Bool[Tensor, " n"]]:
        """Which features retrieval relies on, for images and for texts: masking them raises the cross-entropy."""
        return (self.image_q < level) & (self.image > 0), (self.text_q < level) & (self.text > 0)

    def cross_modal(self, level: float = 0.05) -> Bool[Tensor, " n"]:
        """Which features retrieval relies on in both modalities."""
        image, text = self.used(level)
        return image & text

    def table(self) -> Records:
        image, text = self.used()
        kinds = {"images only": image & ~text, "texts only": text & ~image, "both": image & text}
        return Records(
            {"retrieval relies on it in": name, "features": int(mask.sum())} for name, mask in kinds.items()
        )


@torch.no_grad()
def causal_mds(
    image: Float[Tensor, "n d"],
    text: Float[Tensor, "n2 d2"],
    head: Head | None = None,
    *,
    logit_scale: float = 100.0,
    same: Int[Tensor, " n"] | None = None,
    families: Int[Tensor, " n3"] | None = None,
    seed: int = 0,
) -> CausalMDSResult:
    """Computes what masking each single feature does to retrieval, for every feature by the closed form.

    Args:
        image, text: embeddings of the same pairs, as the head reads them.
        head: whose features are masked. One without a decoder (NCL) is masked, and retrieval measured, in its latent
            space; without a head the coordinates of the embeddings themselves are masked.
        logit_scale: τ, by which cosines are multiplied: the model's own (``model.model.logit_scale.exp()``).
        same: one label per pair; any candidate with the query's label is right (repeated captions).
        families: the family of each pair, the unit of the sign-flip test.

    Raises:
        ShapeMismatch: the sides differ in shape, or there are fewer than two pairs. NotFinite: NaN in either side.

    >>> x = torch.eye(3) + 0.1
    >>> [round(v, 3) for v in causal_mds(x, x, logit_scale=1.0).image.tolist()]  # each coordinate carries one pair
    [0.297, 0.297, 0.297]
    """
    check_pair(image, text, "embeddings")
    n = len(image)
    if n < 2 or (same is not None and len(same) != n):
        labels = "no labels" if same is None else f"{len(same)} labels"
        raise ShapeMismatch(
            f"causal MDS: expected at least 2 pairs and one label of each, got {n} and {labels}"
        )
    check_families(families, n)
    kin = torch.arange(n) if families is None else families
    right = torch.eye(n, dtype=torch.bool) if same is None else same[:, None] == same
    sides = [_Side.of(x.detach().cpu(), head) for x in (image, text)]
    changes = [
        _changes(query, candidates.unit(), right, logit_scale) for query, candidates in (sides, sides[::-1])
    ]
    p = [_sign_flips(change, kin, seed) for change in changes]
    q = benjamini_hochberg(torch.cat(p)).chunk(2)
    effect = [change.mean(0) for change in changes]
    total = effect[0].abs() + effect[1].abs()
    score = torch.where(total > 0, effect[0].abs() / torch.where(total > 0, total, 1), torch.nan)
    return CausalMDSResult(effect[0], effect[1], score, q[0], q[1], n, len(kin.unique()), logit_scale)


@dataclass(frozen=True)
class _Side:
    """Vectors x, the activations f and the directions of the features: masking k gives ``x - f_k directions_k``."""

    x: Float[Tensor, "n d"]
    f: Float[Tensor, "n k"]
    directions: Float[Tensor, "k d"]

    @classmethod
    def of(cls, x: Tensor, head: Head | None) -> _Side:
        if head is None:
            return cls(x.double(), x.double(), torch.eye(x.shape[1], dtype=torch.float64))
        head.check_reconstructs("causal MDS")
        device = next((p.device for p in head.parameters()), torch.device("cpu"))
        f = head.encode(head.prepare(x.float().to(device)))
        f = (f.dense() if isinstance(f, SparseRows) else f).cpu().double()
        if not head.has_decoder:
            return cls(f, f, torch.eye(f.shape[1], dtype=torch.float64))
        scale = head.scaled(x.float().to(device))[1]
        f = f if scale is None else f * scale.cpu().double()
        return cls(x.double(), f, head.W_dec.detach().cpu().double())  # type: ignore[union-attr]

    def unit(self) -> Float[Tensor, "n d"]:
        return self.x / self.x.norm(dim=1, keepdim=True).clamp_min(1e-300)


def _changes(
    query: _Side, candidates: Float[Tensor, "n d"], right: Bool[Tensor, "n n"], logit_scale: float
) -> Float[Tensor, "n k"]:
    """Rise of every query's cross-entropy when each of its features is masked."""
    changes = torch.zeros_like(query.f)
    along = query.directions @ candidates.T  # w·t, of every feature and candidate
    lengths = query.directions.square().sum(1)
    for i, (x, f) in enumerate(zip(query.x, query.f, strict=True)):
        active = f.nonzero().flatten()
        fires, w = f[active], query.directions[active]
        norm = (x @ x - 2 * fires * (w @ x) + fires.square() * lengths[active]).clamp_min(0).sqrt()
        dots = candidates @ x
        # A feature that was all of x leaves rounding, whose direction means nothing: similar to nothing, as in retrieval.
        left = norm > NOTHING * x.norm()
        masked = (dots - fires[:, None] * along[active]) / torch.where(left, norm, torch.inf)[:, None]
        cosines = torch.cat([(dots / x.norm().clamp_min(1e-300))[None], masked])
        losses = _cross_entropy(logit_scale * cosines, right[i])
        changes[i, active] = losses[1:] - losses[0]
    return changes


def _cross_entropy(logits: Float[Tensor, "a n"], right: Bool[Tensor, " n"]) -> Float[Tensor, " a"]:
    return logits.logsumexp(1) - logits[:, right].logsumexp(1)


def _sign_flips(changes: Float[Tensor, "n k"], families: Int[Tensor, " n"], seed: int) -> Float[Tensor, " k"]:
    """Two-sided p of each feature's mean change, by flipping the signs of whole families, the same flips for all."""
    _, which = families.unique(return_inverse=True)
    sums = torch.zeros(int(which.max()) + 1, changes.shape[1], dtype=torch.float64).index_add(
        0, which, changes
    )
    observed = sums.sum(0).abs() - 1e-12 * sums.abs().sum(0)
    generator, hits, left = torch.Generator().manual_seed(seed), torch.ones(changes.shape[1]), SIGN_FLIPS
    while left:
        rows = min(left, max(1, 2**21 // len(sums)))
        signs = torch.randint(0, 2, (rows, len(sums)), generator=generator).double() * 2 - 1
        hits += ((signs @ sums).abs() >= observed).sum(0)
        left -= rows
    p = hits.double() / (SIGN_FLIPS + 1)
    return torch.where((changes != 0).any(0), p, math.nan)
