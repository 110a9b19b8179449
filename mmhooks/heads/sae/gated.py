"""The gated SAE: one path decides which features are active, another how much (Rajamanoharan et al. 2024)."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmhooks.heads.sae.base import SAE, TrainingPass, firing


class GatedSAE(SAE):
    """``f = [z + b_gate > 0] ReLU(exp(r_mag) z + b_mag)`` with ``z = (x - b_pre) W_enc^T`` and ``b_gate`` as ``b_enc``.

    Both paths share ``W_enc``; ``exp(r_mag)`` rescales it for the magnitudes (eq. 6-7 there). An L1 penalty only reaches
    the gate, so it does not shrink magnitudes. The gate has no gradient from the reconstruction: an auxiliary loss trains
    it to reconstruct by itself, ``ReLU(z + b_gate)``, through a decoder that this loss cannot change (eq. 8).

    The number of active features is controlled by ``SAEObjective(penalty=...)``.

    >>> sae = GatedSAE(8, 32)
    >>> f = sae.encode(torch.randn(5, 8))
    >>> f.shape, bool((f >= 0).all())
    (torch.Size([5, 32]), True)
    """

    kind = "gated"
    penalty_weight = 0.1

    def __init__(self, d_in: int, n_features: int, **kwargs: Any) -> None:
        super().__init__(d_in, n_features, **kwargs)
        self.r_mag = nn.Parameter(torch.zeros(n_features))
        self.b_mag = nn.Parameter(torch.zeros(n_features))

    def activate(self, pre: Float[Tensor, "*b n"]) -> Float[Tensor, "*b n"]:
        """Features of the gate's pre-activations ``z + b_gate``."""
        magnitude = (self.r_mag.exp() * (pre - self.b_enc) + self.b_mag).relu()
        return torch.where(pre > 0, magnitude, 0)

    def training_pass(self, x: Float[Tensor, "b d"]) -> TrainingPass:
        """The penalty is the L1 norm of the gate; the auxiliary reconstruction is the gate's own."""
        pre = self.pre(x)
        f, gate = self.activate(pre), pre.relu()
        l1 = (gate @ self.W_dec.detach().norm(dim=1)).mean()
        own = gate @ self.W_dec.detach() + self.b_pre.detach()
        return TrainingPass([self.decode(f)], *firing(f), penalty=l1, auxiliary=own)
