"""The multimodal non-negative contrastive objective (seed 001, eq. 3; Wang et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from mmhooks.errors import MMHooksError
from mmhooks.heads.fidelity import effective_rank
from mmhooks.heads.ncl import NCL
from mmhooks.heads.objective import Objective, StepLoss


def rep_relu(z: Float[Tensor, "*b n"]) -> Float[Tensor, "*b n"]:
    """ReLU forward, GELU's gradient backward (Wang et al. 2024, B.1): units just below zero still learn."""
    smooth = F.gelu(z)
    return z.relu().detach() + smooth - smooth.detach()


def info_nce(
    image: Float[Tensor, "b n"], text: Float[Tensor, "b n"], temperature: float
) -> Float[Tensor, ""]:
    """Symmetric InfoNCE of paired rows, mean of both directions; the positive stands in the denominator."""
    logits = image @ text.T / temperature
    target = torch.arange(len(image), device=image.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


@dataclass
class NCLObjective(Objective):
    """``InfoNCE(g+(image), g+(text))``.

    Attributes:
        temperature: of the similarities.
        similarity: "cosine" gives the rows of g+ unit norm (methods.md 2.5), "dot" is the paper's eq. 3.
        rep_relu: GELU-like gradient through the last ReLU.
        dead_after: epochs without firing after which a unit is dead (for the log).
    """

    temperature: float = 0.2
    similarity: Literal["cosine", "dot"] = "cosine"
    rep_relu: bool = True
    dead_after: float = 1.0

    def start(self, head: NCL, image: Tensor, text: Tensor | None) -> None:
        if text is None:
            raise MMHooksError("the contrastive head learns from pairs: pass text= as well as image=")

    def loss(self, head: NCL, image: Tensor, text: Tensor | None, dead: Bool[Tensor, " n"]) -> StepLoss:
        assert text is not None  # start() saw to it
        z = head.pre(torch.cat([image, text]))
        f = rep_relu(z) if self.rep_relu else z.relu()
        g = F.normalize(f, dim=-1) if self.similarity == "cosine" else f
        contrast = info_nce(g[: len(image)], g[len(image) :], self.temperature)
        active = f.detach() > 0
        parts = {"loss": contrast.detach(), "l0": active.sum(dim=1).float().mean()}
        return StepLoss(contrast, active.any(dim=0), parts)

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
