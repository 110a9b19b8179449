"""How the two modalities lie in the shared space, and how often features fire."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from mmhooks.analysis.checks import check_numbers, check_pair, unit_rows
from mmhooks.analysis.density_metric import FeatureDensity
from mmhooks.analysis.entries import Latents
from mmhooks.analysis.gap_metric import ModalityMeans
from mmhooks.analysis.grouped import Grouped
from mmhooks.analysis.intervals import bootstrap, from_draws
from mmhooks.analysis.passes import (
    BATCH,
    ActivationStore,
    Side,
    batch_size,
    is_table,
    latent_rows,
    share,
    vector_rows,
)
from mmhooks.analysis.results import Estimate, Records, Result
from mmhooks.errors import ShapeMismatch
from mmhooks.heads.base import Head


@dataclass(frozen=True)
class ModalityGap(Result):
    """Distance between the mean image and the mean text embedding, and the mean cosine of pairs."""

    gap: Estimate
    pair_cosine: Estimate

    def table(self) -> Records:
        rows = {"modality gap": self.gap, "cosine of pairs": self.pair_cosine}
        return Records(
            {"measure": k, "value": e.value, "low": e.low, "high": e.high, "n": e.n} for k, e in rows.items()
        )


@dataclass(frozen=True)
class Density(Result):
    """Share of samples that activate each feature, and how many features a sample activates (L0)."""

    values: Float[Tensor, " n"]
    l0: Estimate
    dead: float
    n_samples: int = field(default=0)

    def histogram(self, per_decade: int = 4) -> tuple[list[float], list[int]]:
        """How many alive features fire how often: edges in equal steps of the logarithm, from below 1 in
        ``n_samples`` up to 1, and the count of each bin. Dead features are in no bin.

        >>> density(torch.tensor([[1.0, 0.0, 2.0]] + [[1.0, 0.0, 0.0]] * 9)).histogram(per_decade=1)
        ([0.1, 1.0], [2])
        """
        decades = max(1, math.ceil(math.log10(max(self.n_samples, 2)) - 1e-12))
        steps = decades * per_decade
        edges = [10 ** (k / per_decade - decades) for k in range(steps + 1)]
        alive = self.values[self.values > 0]
        # By the rounded position: a density that equals an edge up to rounding belongs above it.
        place = ((alive.log10() + decades) * per_decade + 1e-9).floor().clamp(0, steps - 1).long()
        return edges, torch.bincount(place, minlength=steps).tolist()

    def table(self) -> Records:
        e = self.l0
        return Records(
            [{"L0": e.value, "low": e.low, "high": e.high, "dead": self.dead, "samples": self.n_samples}]
        )


@torch.no_grad()
def modality_gap(
    image_emb: Float[Tensor, "n d"] | ActivationStore,
    text_emb: Float[Tensor, "n2 d2"] | None = None,
    *,
    draws: int = 200,
    seed: int = 0,
    image: str = "image.embed",
    text: str = "text.embed",
) -> ModalityGap:
    """``|mean image - mean text|`` of unit embeddings of pairs, bootstrapped over pairs.

    Args:
        image_emb: embeddings, or a store, whose sites ``image`` and ``text`` are read in one pass; intervals
            are then jackknifed over groups of batches.

    Raises:
        ShapeMismatch: sides of different shape. NotFinite: NaN in either.

    >>> round(modality_gap(torch.tensor([[1.0, 0.0]] * 3), torch.tensor([[0.0, 1.0]] * 3)).gap.value, 4)
    1.4142
    """
    if not is_table(image_emb):
        return gap_of(_means_of_store(image_emb, image, text), len(image_emb))
    if text_emb is None:
        raise ShapeMismatch("image embeddings came without text embeddings: give both sides, or a store")
    check_pair(image_emb, text_emb, "embeddings")
    if not len(image_emb):
        raise ShapeMismatch("the modality gap needs pairs of embeddings, got none")
    one = unit_rows(image_emb.cpu(), "image embeddings").float()
    other = unit_rows(text_emb.cpu(), "text embeddings").float()
    apart, n = one - other, len(one)
    value = float(apart.mean(0).norm())
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for _ in range(draws if n > 1 else 0):
        # How often each pair is drawn, so that a resample is one product and no copy.
        weights = torch.bincount(torch.randint(n, (n,), generator=generator), minlength=n).float()
        drawn.append(float((weights @ apart / n).norm()))
    gap = (
        from_draws(value, torch.tensor(drawn), n) if drawn else Estimate(value, float("nan"), float("nan"), n)
    )
    return ModalityGap(gap, bootstrap((one * other).sum(1), draws=500, seed=seed))


def gap_of(means: Grouped[ModalityMeans], n: int) -> ModalityGap:
    """Gap and cosine of pairs with jackknife intervals over samples."""

    def numbers(metric: ModalityMeans) -> list[float]:
        state = metric.compute()
        return [float(state["gap"]), float(state["pair_cosine"])]

    return ModalityGap(*means.estimates(numbers, n))


def _means_of_store(store: ActivationStore, image: str, text: str) -> Grouped[ModalityMeans]:
    images, texts = vector_rows(store, image), vector_rows(store, text)
    means = Grouped(partial(ModalityMeans, images.width))
    for number, begin, end in share(len(store), batch_size(len(store)), reads=[images, texts]):
        means.update(images[begin:end], texts[begin:end], number=number)
    return means


@torch.no_grad()
def density(
    latents: Latents | ActivationStore,
    *,
    seed: int = 0,
    head: Head | None = None,
    side: Side = "image",
    site: str | None = None,
) -> Density:
    """How often each feature is not 0, and L0 of samples with its interval.

    Args:
        latents: one row a sample, dense or sparse; or a store, whose ``side`` is read in one pass.
        head, site: with a store, as in :func:`mmhooks.analysis.mds.mds`.

    Raises:
        NotFinite: NaN or infinity in the latents.

    >>> density(torch.tensor([[1.0, 0.0], [2.0, 0.0]])).values
    tensor([1., 0.], dtype=torch.float64)
    """
    if is_table(latents):
        if isinstance(latents, Tensor):
            check_numbers(latents, "latents")
        if not len(latents):
            raise ShapeMismatch("density needs samples, got none")
        metric = FeatureDensity(latents.shape[1], seed=seed)
        metric.update(latents)
        return metric.result()
    rows = latent_rows(latents, side, head, site)
    metric = FeatureDensity(rows.n_features, seed=seed)
    for _, begin, end in share(len(rows), BATCH, reads=[rows]):
        metric.update(rows[begin:end])
    return metric.result()
