"""The ReLU SAE, with an L1 penalty that weights each feature by its decoder row's norm."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mmhooks.heads.sae.base import SAE, TrainingPass, firing


class ReLUSAE(SAE):
    """``f = ReLU((x - b_pre) W_enc^T + b_enc)`` (Bricken et al. 2023; the weighting, Conerly et al. 2024).

    The penalty is ``sum_i f_i |W_dec_i|``, the size of each feature's contribution, so that it cannot be evaded with
    small activations and long rows, and rows need no constraint. The objective normalises them at the end, which
    changes no reconstruction (:meth:`fold_norms`).

    >>> sae = ReLUSAE(8, 32)
    >>> sae.encode(torch.randn(5, 8)).shape
    torch.Size([5, 32])
    """

    kind = "relu"
    unit_decoder = False
    penalty_weight = 0.1

    def activate(self, pre: Float[Tensor, "*b n"]) -> Float[Tensor, "*b n"]:
        return pre.relu()

    def training_pass(self, x: Float[Tensor, "b d"]) -> TrainingPass:
        f = self.encode(x)
        l1 = (f @ self.W_dec.norm(dim=1)).mean()
        return TrainingPass([self.decode(f)], *firing(f), penalty=l1)

    @torch.no_grad()
    def fold_norms(self) -> None:
        """Moves the decoder rows' norms into the encoder: reconstructions do not change, features are rescaled."""
        norm = self.W_dec.norm(dim=1, keepdim=True).clamp_min(torch.finfo(self.W_dec.dtype).tiny)
        self.W_dec.div_(norm)
        self.W_enc.mul_(norm)
        self.b_enc.mul_(norm[:, 0])
