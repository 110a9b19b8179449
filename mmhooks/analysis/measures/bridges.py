"""Bridges: features that fire together on pairs and point the same way (co-activation times decoder cosine)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize
from torchmetrics import Metric

from mmhooks.analysis.inputs.checks import CHUNK_BYTES
from mmhooks.analysis.inputs.sparse import Columns, Latents, check_latent_pair, to_float32
from mmhooks.analysis.results import Records, Result
from mmhooks.data.sparse_rows import SparseRows
from mmhooks.errors import ShapeMismatch, WrongHead

MAX_FEATURES = 8192


@dataclass(frozen=True)
class BridgeResult(Result):
    """Summary of the bridge scores ``B[i, j] = E[a_I[i] a_T[j]] * cos(d_i, d_j)`` of pairs of features.

    Attributes:
        own: B[k, k], by which the feature bridges the modalities itself.
        partner, partner_score: per feature k on images, the other feature with the largest B on texts; -1 and 0
            if no B is above 0.
        off_diagonal: share of the positive mass of B that lies between different features.
        strongest: pairs of different features with the largest B, as (image feature, text feature, B,
            co-activation, cosine).
    """

    own: Float[Tensor, " n"] = field(repr=False)
    partner: Int[Tensor, " n"] = field(repr=False)
    partner_score: Float[Tensor, " n"] = field(repr=False)
    off_diagonal: float
    strongest: list[tuple[int, int, float, float, float]] = field(repr=False)
    n_pairs: int = 0

    def table(self) -> Records:
        return Records(
            {"image feature": i, "text feature": j, "bridge": b, "co-activation": c, "cosine": cosine}
            for i, j, b, c, cosine in self.strongest
        )


class Bridge(Metric):
    """Streaming co-activation ``E[a_I[i] a_T[j]]`` of every two features over pairs: ``update(image, text)``, then
    ``compute()`` for the matrix or :meth:`result` with the decoder's rows.

    A sparse batch costs K·n per pair. The state is ``n_features²`` doubles.

    Raises:
        ShapeMismatch: more than 8,192 features (512 MB).

    >>> metric = Bridge(2)
    >>> metric.update(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 3.0]]))
    >>> metric.compute()["together"]
    tensor([[0., 6.],
            [0., 0.]], dtype=torch.float64)
    """

    products: Tensor
    n_pairs: Tensor

    full_state_update = False
    is_differentiable = False
    higher_is_better = None

    def __init__(self, n_features: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if n_features > MAX_FEATURES:
            raise ShapeMismatch(
                f"co-activation: expected at most {MAX_FEATURES} features, got {n_features}, which take "
                f"{8 * n_features**2 / 1e9:.1f} GB: give the columns of the features that matter"
            )
        self.n_features = n_features
        self.add_state(
            "products", torch.zeros(n_features, n_features, dtype=torch.float64), dist_reduce_fx="sum"
        )
        self.add_state("n_pairs", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, image: Latents, text: Latents) -> None:
        """Adds a batch of pairs.

        Raises:
            ShapeMismatch: the sides differ in shape, or have another width. NotFinite: NaN or infinity.
        """
        check_latent_pair(image, text, self.n_features, start=int(self.n_pairs))
        size = max(1, CHUNK_BYTES // (8 * self.n_features))
        for begin in range(0, len(image), size):
            one, other = image[begin : begin + size], text[begin : begin + size]
            table = to_float32(other.dense().cpu() if isinstance(other, SparseRows) else other)
            if isinstance(one, SparseRows):
                products = Columns.of(one).transposed_times(table.cpu())
            else:
                products = to_float32(one).T.to(table.dtype) @ table.to(one.device)
            self.products += products.to(self.products)
        self.n_pairs = self.n_pairs + len(image)

    def compute(self) -> dict[str, Tensor]:
        """``together``, the mean product of every image feature (row) and text feature (column), and ``n_pairs``."""
        return {"together": self.products / self.n_pairs.clamp_min(1), "n_pairs": self.n_pairs}

    def result(self, decoder: Float[Tensor, "n d"], *, strongest: int = 20) -> BridgeResult:
        """Computes the scores; ``decoder`` holds the directions that the features write (``head.W_dec``).

        Raises:
            WrongHead: the decoder does not have one row per feature.
        """
        n = self.n_features
        if len(decoder) != n:
            raise WrongHead(
                f"expected a decoder of {n} rows, one per feature, got {len(decoder)}: take that of the same head"
            )
        state = self.compute()
        together = state["together"].reshape(n, n).cpu()
        unit = normalize(decoder.detach().cpu().double(), dim=1)
        cosine = unit @ unit.T
        score = together * cosine
        own = score.diagonal().clone()
        others = score.clone().fill_diagonal_(-torch.inf)
        best, partner = others.max(1) if n > 1 else (torch.zeros(n).double(), torch.full((n,), -1))
        mass = float(score.clamp_min(0).sum())
        top = others.flatten().topk(min(strongest, n * (n - 1)))
        pairs = [
            (int(i) // n, int(i) % n, float(b), float(together.flatten()[i]), float(cosine.flatten()[i]))
            for b, i in zip(*top, strict=True)
            if b > 0
        ]
        return BridgeResult(
            own,
            torch.where(best > 0, partner, -1),
            best.clamp_min(0),
            1 - float(own.clamp_min(0).sum()) / mass if mass else 0.0,
            pairs,
            int(state["n_pairs"]),
        )
