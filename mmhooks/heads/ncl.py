"""The non-negative contrastive head: one shared MLP for both modalities (seed 001, eq. 3-4).

Trained by :class:`mmhooks.heads.ncl_objective.NCLObjective`. It has no decoder: its features can be read,
compared and edited in their own space.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from mmhooks.heads.base import Head


class NCL(Head):
    """``g+(x) = ReLU(W2 ReLU(W1 x + b1) + b2)``, width ``hidden`` inside.

    By default ``hidden`` makes the head as large as an SAE with as many features (``2 d n`` weights), as the
    paper has it.

    >>> ncl = NCL(d_in=8, n_features=32)
    >>> f = ncl.encode(torch.randn(5, 8))
    >>> f.shape, bool((f >= 0).all())
    (torch.Size([5, 32]), True)
    """

    kind = "ncl"

    def __init__(
        self,
        d_in: int,
        n_features: int,
        *,
        hidden: int | None = None,
        name: str | None = "ncl",
        normalize_input: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(d_in, n_features, name=name, normalize_input=normalize_input)
        self.hidden = hidden or max(1, round(2 * d_in * n_features / (d_in + n_features)))
        generator = torch.Generator().manual_seed(seed)
        # He initialisation: unit-norm inputs keep their scale through both ReLU layers.
        self.W1 = nn.Parameter(torch.randn(self.hidden, d_in, generator=generator) * (2 / d_in) ** 0.5)
        self.b1 = nn.Parameter(torch.zeros(self.hidden))
        self.W2 = nn.Parameter(
            torch.randn(n_features, self.hidden, generator=generator) * (2 / self.hidden) ** 0.5
        )
        self.b2 = nn.Parameter(torch.zeros(n_features))

    def config(self) -> dict[str, Any]:
        return super().config() | {"hidden": self.hidden}

    def pre(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b n"]:
        """``W2 ReLU(W1 x + b1) + b2``: the features before the last ReLU."""
        self.check_width(x)
        return F.linear(F.linear(x, self.W1, self.b1).relu(), self.W2, self.b2)

    def encode(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b n"]:
        return self.pre(x).relu()
