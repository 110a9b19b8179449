"""Modality gap, streaming: sums of unit vectors."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric

from mmhooks.analysis.checks import check_pair, unit_rows
from mmhooks.analysis.results import Estimate
from mmhooks.errors import ShapeMismatch

if TYPE_CHECKING:
    from mmhooks.analysis.geometry import ModalityGap


class ModalityMeans(Metric):
    """Mean unit vector of each side and mean cosine of pairs: ``update(image, text)``, then :meth:`result`.

    Sums say nothing of their own spread, beyond the cosine's: an interval of the gap comes from
    :class:`~mmhooks.analysis.grouped.Grouped`, as :func:`mmhooks.analysis.geometry.modality_gap` uses it.

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
            ShapeMismatch: sides of different shape, or another width. NotFinite: NaN in either.
        """
        check_pair(image, text, "embeddings", start=int(self.n_pairs))
        if image.shape[1] != self.dim:
            raise ShapeMismatch(f"embeddings of width {image.shape[1]}, expected {self.dim}")
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
        n = self.n_pairs.double()  # no pair at all: NaN throughout
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
        from mmhooks.analysis.geometry import ModalityGap

        state = self.compute()
        n, cosine = int(state["n_pairs"]), float(state["pair_cosine"])
        half = 1.959964 * float(state["pair_cosine_error"])
        gap = Estimate(float(state["gap"]), math.nan, math.nan, n)
        return ModalityGap(gap, Estimate(cosine, cosine - half, cosine + half, n))
