"""The base class of sparse autoencoders: everything but the activation function.

One SAE serves both modalities (seed 001, Section 2.1): ``f = act((x - b_pre) W_enc^T + b_enc)``,
``x' = f W_dec + b_pre``. Each activation function has its own module.
"""

from __future__ import annotations

from typing import ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from mmhooks.heads.base import Head
from mmhooks.heads.linalg import to_unit


class TrainingPass(NamedTuple):
    """The outputs of one batch that the objective needs.

    Attributes:
        recons: reconstructions whose errors are averaged; more than one for nested heads.
        fired: features active for any row.
        l0: mean number of active features per row.
        penalty: the head's own differentiable measure of density (L1, L0), which the objective weights; None if the
            activation itself fixes the number of active features.
        auxiliary: another reconstruction, whose error is added to the loss with weight 1.
    """

    recons: list[Tensor]
    fired: Bool[Tensor, " n"]
    l0: Float[Tensor, ""]
    penalty: Float[Tensor, ""] | None = None
    auxiliary: Tensor | None = None


def firing(f: Float[Tensor, "b n"]) -> tuple[Bool[Tensor, " n"], Float[Tensor, ""]]:
    """Features active for any row, and the mean number of active features per row."""
    active = f.detach() > 0
    return active.any(dim=0), active.sum(dim=1).float().mean()


def firing_at(
    values: Float[Tensor, "b k"], indices: Int[Tensor, "b k"], n: int
) -> tuple[Bool[Tensor, " n"], Float[Tensor, ""]]:
    """:func:`firing` of ``n`` features given by values and indices."""
    active = values.detach() > 0
    fired = torch.zeros(n, dtype=torch.bool, device=values.device)
    fired[indices[active]] = True
    return fired, active.sum(dim=1).float().mean()


class SAE(Head):
    """Base class of SAEs: everything but the activation.

    ``W_enc`` and ``W_dec`` are both ``[n_features, d_in]``: row ``i`` of the decoder is the direction that
    feature ``i`` writes. The encoder is initialised to the decoder (tied initialisation), with rows drawn at random
    on the unit sphere from ``seed``.

    Attributes:
        tied: whether the encoder is the decoder, without a bias.
        unit_decoder: whether training keeps the decoder's rows at unit norm; if not, they are normalised at its end.
        penalty_weight: the objective's default weight of the head's own ``penalty``.
    """

    has_decoder = True
    tied: ClassVar[bool] = False
    unit_decoder: ClassVar[bool] = True
    penalty_weight: ClassVar[float] = 0.0
    W_dec: nn.Parameter | Tensor

    def __init__(
        self,
        d_in: int,
        n_features: int,
        *,
        name: str | None = "sae",
        normalize_input: bool | Literal["layer_norm"] = True,
        seed: int = 0,
    ) -> None:
        super().__init__(d_in, n_features, name=name, normalize_input=normalize_input)
        rows = torch.randn(n_features, d_in, generator=torch.Generator().manual_seed(seed))
        self.W_dec = nn.Parameter(to_unit(rows))
        if not self.tied:
            self.W_enc = nn.Parameter(self.W_dec.detach().clone())
            self.b_enc = nn.Parameter(torch.zeros(n_features))
        self.b_pre = nn.Parameter(torch.zeros(d_in))

    def activate(self, pre: Float[Tensor, "*b n"]) -> Float[Tensor, "*b n"]:
        """The sparsifying non-linearity."""
        raise NotImplementedError

    def training_pass(self, x: Float[Tensor, "b d"]) -> TrainingPass:
        """Encodes and decodes one batch for the objective; by default as at inference."""
        f = self.encode(x)
        return TrainingPass([self.decode(f)], *firing(f))

    def pre(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b n"]:
        """``(x - b_pre) W_enc^T + b_enc``, before any selection."""
        self.check_width(x)
        centred = self.scaled_once(x)[0] - self.b_pre
        return F.linear(centred, self.W_dec) if self.tied else F.linear(centred, self.W_enc, self.b_enc)

    def encode(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b n"]:
        return self.activate(self.pre(x))

    def decode(self, f: Float[Tensor, "*b n"]) -> Float[Tensor, "*b d"]:
        self.check_features(f)
        return f @ self.W_dec + self.b_pre
