"""The Matching-Pursuit SAE: features are chosen one after another, each for what the others left (Costa et al. 2025)."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from mmhooks.errors import ShapeMismatch
from mmhooks.heads.sae.base import SAE

LARGEST_TABLE = 4096
"""Up to this many features, the products of all rows with each other are computed once (64 MiB)."""


class MatchingPursuitSAE(SAE):
    """Takes ``k`` steps; each adds the feature whose unit row explains most of the residual, and subtracts its part.

    ``r = x - b_pre``, then ``k`` times: ``i = argmax W_dec r``, ``f_i += v``, ``r -= v W_dec_i`` with ``v = ReLU(W_dec_i r)``.
    Encoder and decoder are one matrix. A feature may be chosen again, so at most ``k`` are active; a step at which no row
    points along the residual changes nothing. The residual never grows.

    ``pre`` are the first step's products; later steps follow from them and from the products of rows, so features of
    edited pre-activations are well defined. With many features a step costs as much as the encoder's product.

    >>> sae = MatchingPursuitSAE(d_in=8, n_features=32, k=4)
    >>> x = torch.nn.functional.normalize(torch.randn(5, 8), dim=-1)
    >>> f = sae.encode(x)
    >>> int((f > 0).sum(-1).max()) <= 4, bool(((sae(x) - x).norm(dim=-1) < x.norm(dim=-1)).all())
    (True, True)
    """

    kind = "matching_pursuit"
    tied = True

    def __init__(self, d_in: int, n_features: int, k: int = 32, **kwargs: Any) -> None:
        super().__init__(d_in, n_features, **kwargs)
        if not 1 <= k <= n_features:
            raise ShapeMismatch(f"k must lie in 1..n_features = {n_features}, got {k}")
        self.k = k

    def config(self) -> dict[str, Any]:
        return super().config() | {"k": self.k}

    def activate(self, pre: Float[Tensor, "*b n"]) -> Float[Tensor, "*b n"]:
        """The features that pursuit finds, starting from the products of all rows with the vector."""
        # All rows' products with each other once, where that is less than k products for every vector.
        once = self.n_features <= min(LARGEST_TABLE, self.k * (pre.numel() // self.n_features))
        table = F.linear(self.W_dec, self.W_dec) if once else None
        left, f = pre, torch.zeros_like(pre)
        for _ in range(self.k):
            value, index = left.max(dim=-1, keepdim=True)
            value, chosen = value.relu(), index.squeeze(-1)
            f = f.scatter_add(-1, index, value)
            products = F.linear(self.W_dec[chosen], self.W_dec) if table is None else table[chosen]
            left = left - value * products
        return f
