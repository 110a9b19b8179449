"""The TopK SAE: a fixed number of active features per vector (Gao et al. 2024)."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmhooks.errors import ShapeMismatch
from mmhooks.heads.sae import topk_kernels as sparse
from mmhooks.heads.sae.base import SAE, TrainingPass, firing_at


class TopKSAE(SAE):
    """Keeps the ``k`` largest pre-activations of a vector, clipped at zero (Gao et al. 2024, 2.3).

    >>> sae = TopKSAE(d_in=8, n_features=32, k=4)
    >>> x = torch.nn.functional.normalize(torch.randn(5, 8), dim=-1)
    >>> f = sae.encode(x)
    >>> f.shape, int((f > 0).sum(-1).max()) <= 4
    (torch.Size([5, 32]), True)
    """

    kind = "topk"

    def __init__(self, d_in: int, n_features: int, k: int = 32, **kwargs: Any) -> None:
        super().__init__(d_in, n_features, **kwargs)
        if not 1 <= k <= n_features:
            raise ShapeMismatch(f"k must lie in 1..n_features = {n_features}, got {k}")
        self.k = k

    def config(self) -> dict[str, Any]:
        return super().config() | {"k": self.k}

    def select(self, pre: Float[Tensor, "*b n"]) -> tuple[Float[Tensor, "*b k"], Int[Tensor, "*b k"]]:
        """Values (clipped at zero) and indices of the ``k`` largest pre-activations, in no particular order."""
        values, indices = pre.topk(self.k, dim=-1, sorted=False)
        return values.relu(), indices

    def activate(self, pre: Float[Tensor, "*b n"]) -> Float[Tensor, "*b n"]:
        values, indices = self.select(pre)
        return torch.zeros_like(pre).scatter(-1, indices, values)

    def encode_topk(self, x: Float[Tensor, "*b d"]) -> tuple[Float[Tensor, "*b k"], Int[Tensor, "*b k"]]:
        """The same features as :meth:`encode` in sparse form: values and feature indices, ``[*b k]`` each.

        A selected feature whose value is 0 is not active.
        """
        return self.select(self.pre(x))

    def training_pass(self, x: Float[Tensor, "b d"]) -> TrainingPass:
        """The sparse step where it is faster (:mod:`mmhooks.heads.sae.topk_kernels`), else the dense one."""
        if not sparse.sparse_is_faster(self.k, self.n_features, x.device):
            return super().training_pass(x)
        values, selection = sparse.encode(x - self.b_pre, self.W_enc, self.b_enc, self.k)
        recon = sparse.decode(values, selection, self.W_dec) + self.b_pre
        return TrainingPass([recon], *firing_at(values, selection.indices, self.n_features))
