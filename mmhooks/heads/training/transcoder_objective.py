"""The transcoder's training objective: the squared error at the site that it predicts, and AuxK for dead features."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mmhooks.errors import MMHooksError
from mmhooks.heads.linalg import ridge_map, total_variance
from mmhooks.heads.reconstruction import prediction
from mmhooks.heads.training.objective import Objective, StepLoss
from mmhooks.heads.training.resample import strongest_dead
from mmhooks.heads.transcoder import Transcoder
from mmhooks.heads.vectors import Rows

RIDGE = 1e-3
"""Ridge penalty of the affine map that a skip connection starts as, as a fraction of the inputs' mean variance."""


@dataclass
class TranscoderObjective(Objective):
    """``FVU of y + aux_weight * AuxK`` on paired rows: ``train_head(transcoder, x, y)``.

    The squared error is divided by the variance of ``y`` over the training data. Every parameter learns at the scale of
    the sites it stands between, so the result does not depend on the units of ``x`` and ``y``.

    A skip connection starts as the best affine map of ``x`` to ``y``, each decoder row as its own feature's least-squares
    map to what is left, all of them times the gain that predicts best.

    Attributes:
        aux_k: number of dead features that predict the error of the live ones (default: half of ``d_in``).
        dead_after: epochs without firing after which a feature is dead.
    """

    default_batch_size = 256
    default_lr = 2e-3

    aux_k: int | None = None
    aux_weight: float = 1 / 32
    dead_after: float = 1.0
    spread: tuple[float, float] = field(default=(1.0, 1.0), init=False)

    def measure(self, image: Rows, text: Rows | None) -> None:
        if text is None:
            raise MMHooksError(
                "a transcoder trains on rows of two sites: expected train_head(head, x, y), got x alone"
            )
        spread = total_variance(image) ** 0.5, total_variance(text) ** 0.5
        if min(spread) < 1e-6:
            raise MMHooksError(f"expected vectors that vary at both sites, got standard deviations {spread}")
        self.spread = spread

    def lr_scale(self, head: Transcoder, name: str) -> float:
        x, y = self.spread
        scales = {
            "W_dec": y / x,
            "W_skip": y / x,
            "b_dec": y / head.d_out**0.5,
            "b_enc": x / head.d_in**0.5,
            "b_pre": x / head.d_in**0.5,
        }
        return scales.get(name, 1.0)

    @torch.no_grad()
    def start(self, head: Transcoder, image: Tensor, text: Tensor | None) -> None:
        assert text is not None  # checked by measure()
        if head.activation != "topk":
            raise MMHooksError(
                f"expected a transcoder with a k to train, got one with {head.activation}, which nothing here makes sparse"
            )
        x, y = image, text
        head.b_pre.copy_(x.mean(dim=0))
        head.b_dec.copy_(y.mean(dim=0))
        if head.skip:
            weight, bias = ridge_map([(x, y)], RIDGE)
            head.W_skip.copy_(weight)
            head.b_dec.copy_(bias)
        head.W_dec.zero_()
        some = slice(None, None, max(1, len(x) // 16384))
        left = (y - head(x))[some]
        f = head.encode(x[some])
        head.W_dec.copy_((f.T @ left) / f.square().sum(dim=0).clamp_min(1e-30)[:, None])
        guess = f @ head.W_dec
        head.W_dec.mul_((left * guess).sum() / guess.square().sum().clamp_min(1e-30))

    def loss(
        self, head: Transcoder, image: Tensor, text: Tensor | None, dead: Bool[Tensor, " n"]
    ) -> StepLoss:
        assert text is not None
        out = head.training_pass(image)
        error = text - out.recons[0]
        fvu = error.square().sum(dim=1).mean() / self.spread[1] ** 2
        loss, parts = fvu, {"fvu": fvu.detach(), "l0": out.l0}
        if self.aux_weight > 0 and bool(dead.any()):
            aux = self.auxiliary(head, image, error.detach(), dead)
            loss, parts = loss + self.aux_weight * aux, parts | {"aux": aux.detach()}
        return StepLoss(loss, out.fired, parts)

    def auxiliary(
        self, head: Transcoder, x: Float[Tensor, "b d"], error: Float[Tensor, "b e"], dead: Bool[Tensor, " n"]
    ) -> Float[Tensor, ""]:
        """AuxK: ``|e - e'|^2 / |e|^2`` with ``e'`` predicted by the strongest dead features only."""
        guess = strongest_dead(head, x, dead, self.aux_k or max(1, head.d_in // 2))
        return (error - guess).square().sum() / self.across(error.square().sum()).clamp_min(1e-30)

    def score(self, head: Transcoder, image: Tensor, text: Tensor | None) -> dict[str, float]:
        assert text is not None
        fvu = prediction(head, image, text).fvu
        return {"fvu": fvu, "score": fvu}
