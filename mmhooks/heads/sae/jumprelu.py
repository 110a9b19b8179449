"""JumpReLU: a learned threshold for every feature (Rajamanoharan et al. 2024).

``f_i = z_i [z_i > theta_i]`` and ``L0 = sum_i [z_i > theta_i]`` are flat in ``theta`` almost everywhere, so their
gradients are estimated from the entries within half a ``bandwidth`` of the threshold (a rectangular kernel,
eq. 11-12 there). The gradient to ``z``, and so to ``x``, is the exact one.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from mmhooks.errors import MMHooksError
from mmhooks.heads.sae.base import SAE, TrainingPass, firing

SPEED = 10.0
"""The parameter is ``log(threshold) / SPEED``: Adam moves each parameter by about the learning rate per step, and
a threshold must change by orders of magnitude in a few hundred steps (measured: docs/heads.md)."""


def from_log(log_threshold: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """The parameter ``threshold_log`` for thresholds given by their logarithm."""
    return log_threshold / SPEED


def jump_relu(
    z: Float[Tensor, "*b n"], threshold: Float[Tensor, " n"], bandwidth: float
) -> Float[Tensor, "*b n"]:
    """``z [z > threshold]``; the threshold's gradient by the kernel estimator."""
    out = _Jump.apply(z, threshold, bandwidth)
    assert isinstance(out, Tensor)
    return out


def count_above(
    z: Float[Tensor, "*b n"], threshold: Float[Tensor, " n"], bandwidth: float
) -> Float[Tensor, "*b n"]:
    """``[z > threshold]`` as 0 and 1; the threshold's gradient by the kernel estimator, none for ``z``."""
    out = _Step.apply(z, threshold, bandwidth)
    assert isinstance(out, Tensor)
    return out


class JumpReLUSAE(SAE):
    """Keeps a pre-activation that exceeds its feature's own learned threshold.

    The number of active features is controlled by the penalty (``SAEObjective(penalty=...)`` or ``target_l0=``).

    Args:
        threshold: initial value of every threshold; learned as its logarithm, so that it stays positive.
        bandwidth: of the kernel; about the spread of the pre-activations near the threshold, or less.

    >>> sae = JumpReLUSAE(8, 32, threshold=0.2)
    >>> x = torch.nn.functional.normalize(torch.randn(5, 8), dim=-1)
    >>> f = sae.encode(x)
    >>> f.shape, bool((f[f > 0] > 0.2).all())
    (torch.Size([5, 32]), True)
    """

    kind = "jumprelu"
    penalty_weight = 1e-3

    def __init__(
        self, d_in: int, n_features: int, *, threshold: float = 0.03, bandwidth: float = 0.03, **kwargs: Any
    ) -> None:
        super().__init__(d_in, n_features, **kwargs)
        if threshold <= 0 or bandwidth <= 0:
            raise MMHooksError(
                f"expected threshold and bandwidth above zero, got {threshold} and {bandwidth}"
            )
        self.bandwidth = bandwidth
        self.threshold_log = nn.Parameter(from_log(torch.full((n_features,), threshold).log()))

    def config(self) -> dict[str, Any]:
        return super().config() | {"bandwidth": self.bandwidth}

    @property
    def threshold(self) -> Float[Tensor, " n"]:
        return (SPEED * self.threshold_log).exp()

    @torch.no_grad()
    def set_threshold(self, threshold: Float[Tensor, "*n"]) -> None:
        """Sets one threshold for all features, or one per feature; at zero or below a feature is a plain ReLU."""
        self.threshold_log.copy_(from_log(threshold.clamp_min(0).log()))

    def activate(self, pre: Float[Tensor, "*b n"]) -> Float[Tensor, "*b n"]:
        return jump_relu(pre, self.threshold, self.bandwidth)

    def training_pass(self, x: Float[Tensor, "b d"]) -> TrainingPass:
        """The penalty is L0, with the estimator's gradient."""
        pre, threshold = self.pre(x), self.threshold
        f = jump_relu(pre, threshold, self.bandwidth)
        l0 = count_above(pre, threshold, self.bandwidth).sum(dim=1).mean()
        return TrainingPass([self.decode(f)], *firing(f), penalty=l0)


def _near(z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """The kernel ``K((z - threshold) / bandwidth) / bandwidth``."""
    return ((z - threshold).abs() < bandwidth / 2).to(z.dtype) / bandwidth


class _Jump(Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        return torch.where(z > threshold, z, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, threshold = ctx.saved_tensors
        dz = torch.where(z > threshold, grad, 0)
        if not ctx.needs_input_grad[1]:
            return dz, None, None
        moved = -threshold * _near(z, threshold, ctx.bandwidth) * grad
        return dz, moved.reshape(-1, len(threshold)).sum(dim=0), None


class _Step(Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        return (z > threshold).to(z.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, threshold = ctx.saved_tensors
        moved = -_near(z, threshold, ctx.bandwidth) * grad
        return None, moved.reshape(-1, len(threshold)).sum(dim=0), None
