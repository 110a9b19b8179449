"""Modality gap: the distance between the two modalities in the shared space; streaming, from sums of unit vectors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric

from mmhooks.analysis.inputs.checks import check_pair, unit_rows
from mmhooks.analysis.inputs.store_rows import (
    ActivationStore,
    batch_size,
    check_store,
    row_batches,
    vector_rows,
)
from mmhooks.analysis.results import Estimate, Records, Result
from mmhooks.analysis.statistics.intervals import bootstrap, from_draws
from mmhooks.analysis.statistics.jackknife import JackknifeGroups
from mmhooks.errors import ShapeMismatch


class ModalityMeans(Metric):
    """Streaming mean unit vector of each side and mean cosine of pairs: ``update(image, text)``, then :meth:`result`.

    Of the spread the sums only keep that of the cosine; an interval of the gap needs
    :class:`~mmhooks.analysis.statistics.jackknife.JackknifeGroups`, as :func:`modality_gap` uses it.

    >>> metric = ModalityMeans(2)
    >>> metric.update(torch.tensor([[1.0, 0.0]] * 3), torch.tensor([[0.0, 1.0]] * 3))
    >>> round(metric.result().gap.value, 4)
    1.4142
    """

    image_sum: Tensor
    text_sum: Tensor
    cosine_sum: Tensor
    cosine_square_sum: Tensor
    n_pairs: Tensor

    full_state_update = False
    is_differentiable = False
    higher_is_better = None

    def __init__(self, dim: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.dim = dim
        for name in ("image_sum", "text_sum"):
            self.add_state(name, torch.zeros(dim, dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("cosine_sum", "cosine_square_sum"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("n_pairs", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, image: Float[Tensor, "n d"], text: Float[Tensor, "n2 d2"]) -> None:
        """Adds a batch of pairs of embeddings.

        Raises:
            ShapeMismatch: the sides differ in shape, or have another width. NotFinite: NaN in either.
        """
        check_pair(image, text, "embeddings", start=int(self.n_pairs))
        if image.shape[1] != self.dim:
            raise ShapeMismatch(f"embeddings: expected width {self.dim}, got {image.shape[1]}")
        start = int(self.n_pairs)
        image, text = (
            unit_rows(image, "image embeddings", start=start),
            unit_rows(text, "text embeddings", start=start),
        )
        cosine = (image * text).sum(1).double()
        device = self.image_sum.device
        self.image_sum += image.sum(0, dtype=torch.float64).to(device)
        self.text_sum += text.sum(0, dtype=torch.float64).to(device)
        self.cosine_sum += cosine.sum().to(device)
        self.cosine_square_sum += cosine.square().sum().to(device)
        self.n_pairs = self.n_pairs + len(image)

    def compute(self) -> dict[str, Tensor]:
        """``gap`` and ``pair_cosine``, with the mean vectors ``image`` and ``text``."""
        n = self.n_pairs.double()  # without pairs everything is NaN
        image, text, cosine = self.image_sum / n, self.text_sum / n, self.cosine_sum / n
        variance = (self.cosine_square_sum / n - cosine.square()).clamp_min(0)
        return {
            "gap": (image - text).norm(),
            "pair_cosine": cosine,
            "pair_cosine_error": (variance / (n - 1)).sqrt() if int(self.n_pairs) > 1 else n * math.nan,
            "image": image,
            "text": text,
            "n_pairs": self.n_pairs,
        }

    def result(self) -> ModalityGap:
        """The gap, without an interval, and the mean cosine of pairs with its interval."""
        state = self.compute()
        n, cosine = int(state["n_pairs"]), float(state["pair_cosine"])
        half = 1.959964 * float(state["pair_cosine_error"])
        gap = Estimate(float(state["gap"]), math.nan, math.nan, n)
        return ModalityGap(gap, Estimate(cosine, cosine - half, cosine + half, n))


@dataclass(frozen=True)
class ModalityGap(Result):
    """Distance between the mean image and the mean text embedding, and the mean cosine of pairs."""

    gap: Estimate
    pair_cosine: Estimate

    def table(self) -> Records:
        rows = {"modality gap": self.gap, "cosine of pairs": self.pair_cosine}
        return Records({"measure": k} | e.columns() for k, e in rows.items())


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
    """Computes ``|mean image - mean text|`` of the unit embeddings of pairs, bootstrapped over pairs.

    Args:
        image_emb: embeddings, or a store, whose sites ``image`` and ``text`` are read in one pass; intervals
            are then jackknifed over groups of batches.

    Raises:
        ShapeMismatch: the sides differ in shape, or there are no pairs. NotFinite: NaN in either.

    >>> round(modality_gap(torch.tensor([[1.0, 0.0]] * 3), torch.tensor([[0.0, 1.0]] * 3)).gap.value, 4)
    1.4142
    """
    if not isinstance(image_emb, Tensor):
        check_store(image_emb)
        return gap_of(_means_of_store(image_emb, image, text), len(image_emb))
    if text_emb is None:
        raise ShapeMismatch(
            "expected image and text embeddings, got only image embeddings: give both sides, or a store"
        )
    check_pair(image_emb, text_emb, "embeddings")
    if not len(image_emb):
        raise ShapeMismatch("modality gap: expected at least one pair of embeddings, got none")
    one = unit_rows(image_emb.cpu(), "image embeddings").float()
    other = unit_rows(text_emb.cpu(), "text embeddings").float()
    differences, n = one - other, len(one)
    value = float(differences.mean(0).norm())
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for _ in range(draws if n > 1 else 0):
        # How often each pair is drawn, so that a resample is one product without a copy.
        weights = torch.bincount(torch.randint(n, (n,), generator=generator), minlength=n).float()
        drawn.append(float((weights @ differences / n).norm()))
    gap = (
        from_draws(value, torch.tensor(drawn), n) if drawn else Estimate(value, float("nan"), float("nan"), n)
    )
    return ModalityGap(gap, bootstrap((one * other).sum(1), draws=500, seed=seed))


def gap_of(means: JackknifeGroups[ModalityMeans], n: int) -> ModalityGap:
    """Computes the gap and the cosine of pairs with jackknife intervals over samples."""

    def numbers(metric: ModalityMeans) -> list[float]:
        state = metric.compute()
        return [float(state["gap"]), float(state["pair_cosine"])]

    return ModalityGap(*means.estimates(numbers, n))


def _means_of_store(store: ActivationStore, image: str, text: str) -> JackknifeGroups[ModalityMeans]:
    images, texts = vector_rows(store, image), vector_rows(store, text)
    means = JackknifeGroups(partial(ModalityMeans, images.width))
    for number, begin, end in row_batches(len(store), batch_size(len(store)), reads=[images, texts]):
        means.update(images[begin:end], texts[begin:end], number=number)
    return means
