"""BatchTopK: ``k`` active features per row on average, not in every row (Bussmann et al. 2024)."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmhooks.errors import MMHooksError, ShapeMismatch
from mmhooks.heads.sae.base import SAE, TrainingPass, firing

RATE = 0.05
"""Rate of the threshold's running average, whose memory is about 20 steps."""


class BatchTopKSAE(SAE):
    """Trains on the ``B k`` largest pre-activations of a batch of ``B`` rows; at inference it applies a threshold.

    A single row has no batch to compete with, so :meth:`encode` keeps what exceeds ``threshold``: during training, the
    running average of the smallest selected activation; at the end, the value that ``k`` features exceed on the
    training data (:meth:`calibrate`). It is part of the state dict (NaN until set), so a saved head computes the same
    as the trained one.

    >>> sae = BatchTopKSAE(d_in=8, n_features=32, k=4)
    >>> x = torch.nn.functional.normalize(torch.randn(500, 8), dim=-1)
    >>> float(sae.training_pass(x).l0)
    4.0
    >>> sae.calibrate(x)
    >>> round(float((sae.encode(x) > 0).sum(-1).float().mean()), 1)
    4.0
    """

    kind = "batchtopk"
    threshold: Tensor

    def __init__(self, d_in: int, n_features: int, k: int = 32, **kwargs: Any) -> None:
        super().__init__(d_in, n_features, **kwargs)
        if not 1 <= k <= n_features:
            raise ShapeMismatch(f"k must lie in 1..n_features = {n_features}, got {k}")
        self.k = k
        self.register_buffer("threshold", torch.tensor(float("nan")))
        self._has_threshold = False

    def config(self) -> dict[str, Any]:
        return super().config() | {"k": self.k}

    def activate(self, pre: Float[Tensor, "*b n"]) -> Float[Tensor, "*b n"]:
        """What exceeds the threshold.

        Raises:
            MMHooksError: the threshold was never set.
        """
        if not self._has_threshold:  # checked only until it is set, since on a GPU the check synchronises
            self._has_threshold = not bool(self.threshold.isnan())
        if not self._has_threshold:
            raise MMHooksError(
                f"head {self.name!r} (batchtopk) has no inference threshold yet: train it, load it from a file "
                "that has one, or set it on your own vectors with head.calibrate(x)"
            )
        return torch.where(pre > self.threshold, pre, 0).relu()

    def select_over_batch(self, pre: Float[Tensor, "b n"]) -> Float[Tensor, "b n"]:
        """The ``b k`` largest entries of the whole batch, clipped at zero; zeros elsewhere."""
        flat = pre.flatten()
        values, places = flat.topk(self.k * len(pre), sorted=False)
        return torch.zeros_like(flat).scatter(0, places, values.relu()).view_as(pre)

    def training_pass(self, x: Float[Tensor, "b d"]) -> TrainingPass:
        """Selects over the batch and moves the threshold towards the smallest activation in it."""
        f = self.select_over_batch(self.pre(x))
        self._move_threshold(f.detach())
        return TrainingPass([self.decode(f)], *firing(f))

    @torch.no_grad()
    def _move_threshold(self, f: Float[Tensor, "b n"]) -> None:
        smallest = torch.where(f > 0, f, torch.inf).amin().to(self.threshold.dtype)
        moved = torch.where(
            self.threshold.isnan(), smallest, self.threshold + RATE * (smallest - self.threshold)
        )
        self.threshold.copy_(torch.where(smallest.isfinite(), moved, self.threshold))

    @torch.no_grad()
    def calibrate(self, *x: Float[Tensor, "_ d"], batch_size: int = 4096) -> None:
        """Sets the threshold to where ``k`` features are active on average over the rows of ``x``.

        Args:
            x: raw vectors of one or more modalities; normalised if the head expects it.
        """
        if sum(len(part) for part in x) == 0:
            raise MMHooksError("calibrate: expected at least one vector, got none")
        chunks = (chunk.to(self.W_enc) for part in x for chunk in part.split(batch_size))
        self.threshold.copy_(threshold_at(self, self.k, *(self.prepare(chunk) for chunk in chunks)))


@torch.no_grad()
def threshold_at(
    head: SAE, l0: int | float, *x: Float[Tensor, "_ d"], batch_size: int = 4096
) -> Float[Tensor, ""]:
    """The threshold that ``l0`` pre-activations per row exceed on average; rows as ``head.pre`` takes them."""
    head = head.bare()
    wanted, largest = round(l0 * sum(len(part) for part in x)), torch.empty(0)
    for chunk in (c for part in x for c in part.split(batch_size)):
        pre = head.pre(chunk).flatten()
        pool = torch.cat([largest.to(pre), pre])
        # One more than wanted: the threshold is the largest value that no longer fires.
        largest = pool.topk(min(wanted + 1, len(pool)), sorted=False).values
    return largest.min().relu() if len(largest) > wanted else largest.new_zeros(())
