"""Transcoders: sparse heads that read one site and predict another, such as the input and the output of an MLP.

``f = topk(ReLU((x - b_pre) W_enc^T + b_enc))``, ``y' = f W_dec + b_dec``, and with an affine skip connection
``y' = f W_dec + x W_skip + b_dec`` (Dunefsky et al. 2024; with the skip, Paulo et al. 2025). Trained by
:class:`mmhooks.heads.training.transcoder_objective.TranscoderObjective`, spliced in by :mod:`mmhooks.hooks.between_sites`.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from mmhooks.errors import MMHooksError, ShapeMismatch
from mmhooks.heads.base import Head
from mmhooks.heads.linalg import to_unit
from mmhooks.heads.sae import topk_kernels as sparse
from mmhooks.heads.sae.base import TrainingPass, firing, firing_at


class Transcoder(Head):
    """Reads vectors of one site and predicts those of another through ``k`` active features.

    It takes vectors as the site carries them: a prediction has no scale to give back. Row ``i`` of ``W_dec`` is what
    feature ``i`` writes into the second site.

    Args:
        d_in, d_out: widths of the site that is read and of the one that is written (default: the same).
        skip: whether an affine map of the input is added, so that features need only carry what is not linear.
        activation: "topk", the kind that is trained here; "relu" and "jumprelu" (a threshold for every feature, in the
            buffer ``thresholds``) are read from files of other libraries.

    Attributes:
        sites: the site that it reads and the one that it writes, where known.

    >>> head = Transcoder(8, 32, k=4, skip=True)
    >>> x = torch.randn(5, 8)
    >>> f = head.encode(x)
    >>> int((f > 0).sum(-1).max()) <= 4, torch.equal(head(x), head.predict(f, x))
    (True, True)
    """

    kind = "transcoder"
    has_decoder = True
    reconstructs = False
    thresholds: Tensor

    def __init__(
        self,
        d_in: int,
        n_features: int,
        k: int = 32,
        *,
        d_out: int | None = None,
        skip: bool = False,
        activation: Literal["topk", "relu", "jumprelu"] = "topk",
        name: str | None = "transcoder",
        seed: int = 0,
    ) -> None:
        super().__init__(d_in, n_features, name=name, normalize_input=False)
        d_out = d_in if d_out is None else d_out
        if activation not in ("topk", "relu", "jumprelu"):
            raise MMHooksError(f"activation: expected topk, relu or jumprelu, got {activation!r}")
        if d_out < 1 or (activation == "topk" and not 1 <= k <= n_features):
            raise ShapeMismatch(f"expected d_out >= 1 and k in 1..{n_features}, got {d_out} and {k}")
        self.d_out, self.skip, self.activation = d_out, skip, activation
        self.k = k if activation == "topk" else n_features
        generator = torch.Generator().manual_seed(seed)
        self.W_enc = nn.Parameter(to_unit(torch.randn(n_features, d_in, generator=generator)))
        self.W_dec = nn.Parameter(to_unit(torch.randn(n_features, d_out, generator=generator)))
        self.b_enc = nn.Parameter(torch.zeros(n_features))
        self.b_pre = nn.Parameter(torch.zeros(d_in))
        self.b_dec = nn.Parameter(torch.zeros(d_out))
        if skip:
            self.W_skip = nn.Parameter(torch.zeros(d_in, d_out))
        if activation == "jumprelu":
            self.register_buffer("thresholds", torch.zeros(n_features))

    def config(self) -> dict[str, Any]:
        shape = {"d_in": self.d_in, "d_out": self.d_out, "n_features": self.n_features}
        active = {"k": self.k} if self.activation == "topk" else {"activation": self.activation}
        return shape | active | {"skip": self.skip}

    def pre(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b n"]:
        """``(x - b_pre) W_enc^T + b_enc``, before any selection."""
        self.check_width(x)
        return F.linear(x - self.b_pre, self.W_enc, self.b_enc)

    def activate(self, pre: Float[Tensor, "*b n"]) -> Float[Tensor, "*b n"]:
        """The ``k`` largest pre-activations, clipped at zero; or all that are positive, or above their thresholds."""
        if self.activation == "relu":
            return pre.relu()
        if self.activation == "jumprelu":
            return torch.where(pre > self.thresholds, pre, 0).relu()
        values, indices = pre.topk(self.k, dim=-1, sorted=False)
        return torch.zeros_like(pre).scatter(-1, indices, values.relu())

    def encode(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b n"]:
        return self.activate(self.pre(x))

    def encode_topk(self, x: Float[Tensor, "*b d"]) -> tuple[Float[Tensor, "*b k"], Int[Tensor, "*b k"]]:
        """The same features as :meth:`encode` in sparse form: values and feature indices; value 0 is not active."""
        values, indices = self.encode(x).topk(self.k, dim=-1, sorted=False)
        return values, indices

    def decode(self, f: Float[Tensor, "*b n"]) -> Float[Tensor, "*b e"]:
        """``f W_dec + b_dec``: what the features write, without the skip connection."""
        self.check_features(f)
        return f @ self.W_dec + self.b_dec

    def predict(self, f: Float[Tensor, "*b n"], x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b e"]:
        """:meth:`decode`, plus the skip connection's part if there is one."""
        return self.decode(f) + x @ self.W_skip if self.skip else self.decode(f)

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b e"]:
        """The prediction of the second site."""
        return self.predict(self.encode(x), x)

    def training_pass(self, x: Float[Tensor, "b d"]) -> TrainingPass:
        """The prediction of one batch, by the sparse step where it is faster."""
        if not sparse.sparse_is_faster(self.k, self.n_features, x.device):
            f = self.encode(x)
            return TrainingPass([self.predict(f, x)], *firing(f))
        values, selection = sparse.encode(x - self.b_pre, self.W_enc, self.b_enc, self.k)
        y = sparse.decode(values, selection, self.W_dec) + self.b_dec
        y = y + x @ self.W_skip if self.skip else y
        return TrainingPass([y], *firing_at(values, selection.indices, self.n_features))
