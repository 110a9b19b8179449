"""The multimodal non-negative contrastive objective (seed 001, eq. 3; Wang et al. 2024)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from mmhooks.errors import MMHooksError
from mmhooks.heads.linalg import effective_rank, to_unit
from mmhooks.heads.ncl import NCL, RIDGE
from mmhooks.heads.training.clusters import cluster_directions
from mmhooks.heads.training.objective import Objective, StepLoss
from mmhooks.heads.vectors import Rows

_TINY = 1e-6  # avoids division by zero for constant units


def rep_relu(z: Float[Tensor, "*b n"]) -> Float[Tensor, "*b n"]:
    """ReLU in the forward pass, GELU's gradient in the backward pass (Wang et al. 2024, B.1), so that units just below
    zero still learn."""
    smooth = F.gelu(z)
    return z.relu().detach() + smooth - smooth.detach()


def info_nce(
    image: Float[Tensor, "b n"], text: Float[Tensor, "b n"], temperature: float
) -> Float[Tensor, ""]:
    """Symmetric InfoNCE of paired rows: the mean of both directions, with the positive in the denominator."""
    logits = image @ text.T / temperature
    target = torch.arange(len(image), device=image.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


@dataclass
class NCLObjective(Objective):
    """``InfoNCE(g+(image), g+(text))``, by default over standardised units, which keeps them alive *and* sparse.

    The loss by itself leaves most units dead (cosine: a few units suffice to distinguish pairs) or all of them dense
    (dot: length is unconstrained). ``threshold=s`` adds what batch normalisation does in contrastive projectors: each
    unit's pre-activation is standardised over the batch, both modalities pooled, and ``s`` is subtracted, so that a
    unit fires where its input is ``s`` standard deviations above its mean. No unit can die, and by Cantelli's
    inequality none fires for more than ``1 / (1 + s^2)`` of the batch. Shift and scale are folded into ``W2`` and
    ``b2`` after each step, so the head itself remains eq. 4 of the paper.

    Attributes:
        temperature: of the similarities.
        similarity: "cosine" gives the rows of g+ unit norm (methods.md 2.5), "dot" is the paper's eq. 3.
        threshold: ``s`` as above; None trains on the plain loss.
        rep_relu: GELU-like gradient through the last ReLU.
        dead_after: epochs without firing after which a unit is dead (for the log).
        ridge: fits a linear decoder to the training data at the end (:meth:`NCL.fit_decoder`); None fits none,
            unless the head already has one, which is then refitted.
        init: the head's own random weights, or "clusters": unit i of both layers starts at the direction of cluster i of
            the pairs (each side centred by its own mean, then averaged), the start on which seeds agree most. Needs
            ``hidden >= n_features``.
        init_seed, init_restarts: seed of the clustering, and of how many starts it is the best.
    """

    shares_batches = False

    temperature: float = 0.2
    similarity: Literal["cosine", "dot"] = "cosine"
    threshold: float | None = 1.5
    rep_relu: bool = True
    dead_after: float = 1.0
    ridge: float | None = None
    init: Literal["random", "clusters"] = "random"
    init_seed: int = 0
    init_restarts: int = 4

    def start(self, head: NCL, image: Tensor, text: Tensor | None) -> None:
        if text is None:
            raise MMHooksError("the contrastive head trains on pairs: pass text= as well as image=")
        if self.init == "clusters":
            self._start_at_clusters(head, image, text)
        self._standardise(head, image, text)

    @torch.no_grad()
    def _start_at_clusters(self, head: NCL, image: Float[Tensor, "b d"], text: Float[Tensor, "b d"]) -> None:
        n = head.n_features
        if head.hidden < n:
            raise MMHooksError(
                f"init='clusters': expected a hidden unit for each of {n} features, got {head.hidden}; pass hidden={n} to NCL"
            )
        centres = image.mean(dim=0), text.mean(dim=0)
        # The pair without what only says its modality.
        pairs = to_unit(image - centres[0]) + to_unit(text - centres[1])
        rows = cluster_directions(
            pairs, pairs.new_ones(len(pairs)), n, restarts=self.init_restarts, seed=self.init_seed
        ).to(head.W1)
        # Across the gap between the modalities, so that no unit is shifted for one of them.
        gap = centres[0] - centres[1]
        rows = to_unit(rows - torch.outer(rows @ gap, gap) / gap.square().sum().clamp_min(1e-12))
        length = head.W1.norm(dim=1).mean()  # as its own start
        head.W1[:n] = length * rows
        head.b1[:n] = -head.W1[:n] @ (centres[0] + centres[1]) / 2
        head.W2.zero_()
        head.W2.fill_diagonal_(1.0)

    def loss(self, head: NCL, image: Tensor, text: Tensor | None, dead: Bool[Tensor, " n"]) -> StepLoss:
        assert text is not None  # checked by start()
        z = head.pre(torch.cat([image, text]))
        if self.threshold is not None:
            mean, std = z.mean(dim=0), z.std(dim=0, correction=0) + _TINY
            self._batch = mean.detach(), std.detach()
            z = (z - mean) / std - self.threshold
        f = rep_relu(z) if self.rep_relu else z.relu()
        g = F.normalize(f, dim=-1) if self.similarity == "cosine" else f
        contrast = info_nce(g[: len(image)], g[len(image) :], self.temperature)
        active = f.detach() > 0
        parts = {"loss": contrast.detach(), "l0": active.sum(dim=1).float().mean()}
        return StepLoss(contrast, active.any(dim=0), parts)

    def after_step(self, head: NCL) -> None:
        """Folds a tenth of this batch's statistics into ``W2`` and ``b2``, which does not change the loss."""
        if self.threshold is not None:
            _fold(head, *self._batch, self.threshold, rate=0.1)

    def finish(self, head: NCL, image: Rows, text: Rows | None) -> None:
        """Folds the statistics of all training pairs, so that the thresholds hold exactly on them."""
        assert text is not None
        self._standardise(head, image, text)
        if self.ridge is not None or head.has_decoder:
            head.fit_decoder(image, text, ridge=RIDGE if self.ridge is None else self.ridge)

    def _standardise(self, head: NCL, image: Rows, text: Rows) -> None:
        if self.threshold is not None:
            _fold(head, *pre_statistics(head, image, text), self.threshold, rate=1.0)

    @torch.no_grad()
    def score(self, head: NCL, image: Tensor, text: Tensor | None) -> dict[str, float]:
        """Held-out InfoNCE over all pairs at once (at most 2048), retrieval, dead units, effective rank."""
        assert text is not None
        step = max(1, len(image) // 2048)
        fi, ft = head.encode(image[::step]), head.encode(text[::step])
        gi, gt = (F.normalize(f, dim=-1) if self.similarity == "cosine" else f for f in (fi, ft))
        both = torch.cat([fi, ft])
        hit = (gi @ gt.T).argmax(dim=1) == torch.arange(len(gi), device=gi.device)
        return {
            "score": float(info_nce(gi, gt, self.temperature)),
            "r@1": float(hit.float().mean()),
            "l0": float((both > 0).sum(dim=1).float().mean()),
            "dead": float((both == 0).all(dim=0).float().mean()),
            "rank": effective_rank(both),
        }


@torch.no_grad()
def pre_statistics(head: NCL, *x: Rows) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Mean and standard deviation of each unit's pre-activation over all rows of all parts."""
    rows = sum(len(part) for part in x)

    def pre() -> Iterator[Float[Tensor, "b n"]]:
        yield from (head.pre(chunk) for part in x for chunk in part.split(4096))

    mean = sum((z.double().sum(dim=0) for z in pre()), torch.zeros((), dtype=torch.float64)) / rows
    square = sum(((z - mean).double().square().sum(dim=0) for z in pre()), torch.zeros_like(mean)) / rows
    return mean.float(), square.sqrt().float() + _TINY


@torch.no_grad()
def _fold(
    head: NCL, mean: Float[Tensor, " n"], std: Float[Tensor, " n"], threshold: float, rate: float
) -> None:
    """Rescales and shifts each unit: at rate 1, ``pre`` becomes ``(pre - mean) / std - threshold``."""
    scale = std.pow(-rate)
    head.W2.mul_(scale[:, None])
    head.b2.copy_((head.b2 - rate * (mean + threshold * std)) * scale)
