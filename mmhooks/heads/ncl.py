"""The non-negative contrastive head: one shared MLP for both modalities (seed 001, eq. 3-4).

Trained by :class:`mmhooks.heads.training.ncl_objective.NCLObjective`, without a decoder: its features can be read,
compared and edited in their own space. :meth:`NCL.fit_decoder` adds a linear decoder, so that edits can be spliced back
into the model.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from mmhooks.errors import MMHooksError
from mmhooks.heads.base import Head
from mmhooks.heads.linalg import ridge_map
from mmhooks.heads.vectors import Rows

RIDGE = 1e-3
"""Ridge penalty of a fitted decoder, as a fraction of the features' mean variance."""


class NCL(Head):
    """``g+(x) = ReLU(W2 ReLU(W1 x + b1) + b2)`` with hidden width ``hidden``.

    By default ``hidden`` gives the head as many weights (``2 d n``) as an SAE with the same number of features, as in
    the paper.

    >>> ncl = NCL(d_in=8, n_features=32)
    >>> f = ncl.encode(torch.randn(5, 8))
    >>> f.shape, bool((f >= 0).all())
    (torch.Size([5, 32]), True)

    Args:
        decoder: whether it has a decoder; set by :meth:`fit_decoder` and when loading such a head.
    """

    kind = "ncl"

    def __init__(
        self,
        d_in: int,
        n_features: int,
        *,
        hidden: int | None = None,
        decoder: bool = False,
        name: str | None = "ncl",
        normalize_input: bool | Literal["layer_norm"] = True,
        seed: int = 0,
    ) -> None:
        super().__init__(d_in, n_features, name=name, normalize_input=normalize_input)
        self.hidden = hidden or max(1, round(2 * d_in * n_features / (d_in + n_features)))
        generator = torch.Generator().manual_seed(seed)
        # He initialisation keeps the scale of unit-norm inputs through both ReLU layers.
        self.W1 = nn.Parameter(torch.randn(self.hidden, d_in, generator=generator) * (2 / d_in) ** 0.5)
        self.b1 = nn.Parameter(torch.zeros(self.hidden))
        self.W2 = nn.Parameter(
            torch.randn(n_features, self.hidden, generator=generator) * (2 / self.hidden) ** 0.5
        )
        self.b2 = nn.Parameter(torch.zeros(n_features))
        if decoder:
            self._set_decoder(torch.zeros(n_features, d_in), torch.zeros(d_in))

    def config(self) -> dict[str, Any]:
        return super().config() | {"hidden": self.hidden} | ({"decoder": True} if self.has_decoder else {})

    def pre(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b n"]:
        """``W2 ReLU(W1 x + b1) + b2``: the features before the last ReLU."""
        self.check_width(x)
        return F.linear(F.linear(self.scaled_once(x)[0], self.W1, self.b1).relu(), self.W2, self.b2)

    def activate(self, pre: Float[Tensor, "*b n"]) -> Float[Tensor, "*b n"]:
        return pre.relu()

    def encode(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b n"]:
        return self.pre(x).relu()

    def decode(self, f: Float[Tensor, "*b n"]) -> Float[Tensor, "*b d"]:
        """``f W_dec + b_dec`` after a decoder was fitted; raises :class:`NoDecoder` before."""
        if not self.has_decoder:
            return super().decode(f)
        self.check_features(f)
        return f @ self.W_dec + self.b_dec

    @torch.no_grad()
    def fit_decoder(self, *x: Rows, ridge: float = RIDGE, batch_size: int = 4096) -> None:
        """Fits the linear map from features to vectors with the least squared error over the rows of ``x``.

        Args:
            x: raw training vectors of one or more modalities; normalised if the head expects it.
            ridge: penalty on the map, as a fraction of the features' mean variance: it keeps rarely active features
                from getting huge directions.

        Raises:
            MMHooksError: fewer than two rows, or a ridge below zero.

        >>> ncl, x = NCL(8, 64), torch.nn.functional.normalize(torch.randn(300, 8), dim=-1)
        >>> ncl.fit_decoder(x)
        >>> ncl.has_decoder, bool((ncl(x) - x).square().sum() < 0.2 * x.square().sum())
        (True, True)
        """
        if sum(len(part) for part in x) < 2 or ridge < 0:
            raise MMHooksError(
                f"expected at least 2 rows with ridge >= 0, got {sum(len(p) for p in x)} rows and {ridge}"
            )
        chunks = (
            self.prepare(c.to(self.W2.device, self.W2.dtype)) for part in x for c in part.split(batch_size)
        )
        self._set_decoder(*ridge_map(((self.encode(rows), rows) for rows in chunks), ridge))

    def _set_decoder(self, weight: Float[Tensor, "n d"], bias: Float[Tensor, " d"]) -> None:
        # Contiguous, as when loaded from a file: a product with another layout differs in the last bit.
        self.W_dec = nn.Parameter(weight.to(self.W2).contiguous())
        self.b_dec = nn.Parameter(bias.to(self.W2))
        self.has_decoder = True
