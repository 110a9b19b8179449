"""Modality Dominance Score: how much of a feature's activation comes from pictures, and the three groups."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmhooks.analysis.checks import check_numbers
from mmhooks.analysis.entries import Latents
from mmhooks.analysis.intervals import bootstrap
from mmhooks.analysis.mds_metric import MDS, Kind, divide
from mmhooks.analysis.passes import BATCH, ActivationStore, data_id, is_table, latent_rows, share
from mmhooks.analysis.results import Estimate, Records, Result, correlation
from mmhooks.data.rows import SparseRows
from mmhooks.errors import ShapeMismatch
from mmhooks.heads.base import Head
from mmhooks.hooks.features import FeatureSet

__all__ = ["GROUPS", "MDS", "MDSResult", "mds"]

GROUPS = ("ImgD", "TextD", "CrossD")


@dataclass(frozen=True)
class MDSResult(Result):
    """Scores of ``n`` features over ``n_pairs`` pairs.

    Attributes:
        R: mean over pairs of ``a_I / (a_I + a_T)``, pairs where both are 0 left out; NaN for dead features.
        standard_error: of R, over pairs; NaN below two pairs.
        ratio_of_means: ``E[a_I] / (E[a_I] + E[a_T])``.
        counts: pairs that R averages; image_counts, text_counts: pairs where that side is not 0.
        dead: fires in neither modality: in no group, outside mu and sigma.
        rare: alive, but ``counts < min_fires``: flagged, still in a group.
        mu, sigma: over alive features; sigma is the population's.
        mu_estimate: mu with a bootstrap interval over features.
        groups: ImgD (R > mu + sigma), TextD (R < mu - sigma), CrossD (the other alive ones).
        shuffled_R, shuffled_r: scores of pairs whose texts were shuffled, and their correlation with R:
            near 1 means that the score says little about the pairing.
    """

    R: Float[Tensor, " n"]
    standard_error: Float[Tensor, " n"] = field(repr=False)
    ratio_of_means: Float[Tensor, " n"] = field(repr=False)
    counts: Int[Tensor, " n"] = field(repr=False)
    image_counts: Int[Tensor, " n"] = field(repr=False)
    text_counts: Int[Tensor, " n"] = field(repr=False)
    dead: Bool[Tensor, " n"] = field(repr=False)
    rare: Bool[Tensor, " n"] = field(repr=False)
    mu: float
    sigma: float
    mu_estimate: Estimate
    groups: tuple[FeatureSet, FeatureSet, FeatureSet]
    shuffled_R: Float[Tensor, " n"] = field(repr=False)
    shuffled_r: float
    n_pairs: int
    kind: str
    min_fires: int
    head: str = ""
    data: str = ""

    @property
    def thresholds(self) -> tuple[float, float]:
        """``(mu - sigma, mu + sigma)``."""
        return self.mu - self.sigma, self.mu + self.sigma

    @property
    def alive(self) -> Bool[Tensor, " n"]:
        return ~self.dead

    def table(self) -> Records:
        """One row a group, then all alive features with the shuffled control."""
        shared = {"pairs": self.n_pairs, "head": self.head, "data": self.data}
        rows = Records()
        for name, members in zip(("all alive", *GROUPS), (None, *self.groups), strict=True):
            mask = self.alive if members is None else members.mask
            estimate = bootstrap(self.R[mask])
            rows.append(
                {
                    "group": name,
                    "features": int(mask.sum()),
                    "rare": int((self.rare & mask).sum()),
                    "mean R": estimate.value,
                    "low": estimate.low,
                    "high": estimate.high,
                    "sigma": float(self.R[mask].std(unbiased=False)) if mask.any() else math.nan,
                    "ratio of means": float(self.ratio_of_means[mask].mean()) if mask.any() else math.nan,
                    "r with shuffled pairs": correlation(self.R[mask], self.shuffled_R[mask]),
                    "dead": int(self.dead.sum()) if members is None else 0,
                    **shared,
                }
            )
        return rows


def mds(
    image_latents: Latents | ActivationStore,
    text_latents: Latents | None = None,
    *,
    kind: Kind = "relu",
    head: str | Head = "",
    data: str = "",
    min_fires: int = 20,
    seed: int = 0,
    image: str | None = None,
    text: str | None = None,
    progress: bool = False,
) -> MDSResult:
    """Modality Dominance Score of every feature (seed paper, section 2.3; decisions in docs/measures.md).

    Args:
        image_latents, text_latents: the two sides of the same pairs, row by row, dense or sparse. Or a store
            alone: ``mds(store, head=sae)`` runs the head over stored embeddings, ``mds(store)`` reads
            stored latents; one pass, bounded memory.
        kind: activation compared: "relu" (SAE, NCL), "abs" (signed features, such as raw CLIP's own
            coordinates: their signed ratio has no mean), "paper" (the raw values as printed).
        head, data: provenance, kept in the result and in its groups; with a store ``head`` is the head itself.
        min_fires: an alive feature counted in fewer pairs is flagged as rare.
        seed: of the shuffled control.
        image, text: with a store, the sites to read; default ``image.embed`` and ``text.embed`` with a head,
            else each side's one site of latents.

    Raises:
        ShapeMismatch: the two sides differ in shape.
        NotFinite: NaN or infinity in either; names how many and where.
        UnknownSite: a site that the store does not hold.

    >>> image = torch.tensor([[3.0, 0.0], [1.0, 0.0]]); text = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    >>> mds(image, text).R
    tensor([0.8750,    nan], dtype=torch.float64)
    """
    if not is_table(image_latents):
        return _of_store(image_latents, kind, head, data, min_fires, seed, image, text, progress)
    if text_latents is None:
        raise ShapeMismatch("image latents came without text latents: give both sides, or a store")
    for side, given in (("image", image_latents), ("text", text_latents)):
        if not isinstance(given, SparseRows):
            check_numbers(given, f"{side} latents")
    if not len(image_latents):
        raise ShapeMismatch("the Modality Dominance Score needs pairs, got none")
    name = head if isinstance(head, str) else head.id
    metric = MDS(image_latents.shape[1], kind=kind, head=name, data=data, min_fires=min_fires, seed=seed)
    if isinstance(image_latents, Tensor):
        metric = metric.to(image_latents.device)
    metric.update(image_latents, text_latents)
    return metric.result()


def _of_store(
    store: ActivationStore,
    kind: Kind,
    head: str | Head,
    data: str,
    min_fires: int,
    seed: int,
    image: str | None,
    text: str | None,
    progress: bool,
) -> MDSResult:
    images, texts = latent_rows(store, "image", head, image), latent_rows(store, "text", head, text)
    name = head.id if isinstance(head, Head) else images.site
    data = data or data_id(store)
    metric = MDS(images.n_features, kind=kind, head=name, data=data, min_fires=min_fires, seed=seed)
    for _, begin, end in share(len(store), BATCH, "MDS", reads=[images, texts], progress=progress):
        metric.update(images[begin:end], texts[begin:end], start=begin)
    return metric.result()


def result_of(metric: MDS, sums: Mapping[str, Tensor]) -> MDSResult:
    """Everything that follows from the sums and counts of a metric, as its ``compute()`` returns them."""
    sums = {name: value.cpu() for name, value in sums.items()}
    n, counts, score = metric.n_features, sums["counts"], sums["R"]
    n_pairs = int(sums["n_pairs"])
    dead = (sums["image_counts"] == 0) & (sums["text_counts"] == 0)
    variance = (divide(sums["ratio_square_sum"], counts) - score.square()).clamp_min(0)
    # Of the mean, unbiased: population variance over (count - 1).
    error = torch.where(counts > 1, (variance / (counts - 1).clamp_min(1)).sqrt(), torch.nan)
    shuffled = divide(sums["shuffled_sum"], sums["shuffled_counts"])
    alive = ~score.isnan()
    mu = float(score[alive].mean()) if alive.any() else math.nan
    sigma = float(score[alive].std(unbiased=False)) if alive.any() else math.nan
    about = {"kind": metric.kind, "data": metric.data, "n_pairs": n_pairs, "mu": mu, "sigma": sigma}
    # Equal scores differ by rounding alone; that is no dominance.
    margin = sigma if sigma > 1e-9 else math.inf
    image, text = score > mu + margin, score < mu - margin
    masks = (image, text, alive & ~image & ~text)
    imgd, textd, crossd = (
        FeatureSet(mask, n, name=name, head=metric.head, info=about)
        for name, mask in zip(GROUPS, masks, strict=True)
    )
    return MDSResult(
        R=score,
        standard_error=error,
        ratio_of_means=sums["ratio_of_means"],
        counts=counts,
        image_counts=sums["image_counts"],
        text_counts=sums["text_counts"],
        dead=dead,
        rare=~dead & (counts < metric.min_fires),
        mu=mu,
        sigma=sigma,
        mu_estimate=bootstrap(score, seed=metric.seed),
        groups=(imgd, textd, crossd),
        shuffled_R=shuffled,
        shuffled_r=correlation(score, shuffled),
        n_pairs=n_pairs,
        kind=metric.kind,
        min_fires=metric.min_fires,
        head=metric.head,
        data=metric.data,
    )
