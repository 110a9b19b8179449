"""CKNNA of batches, streaming: its mean, with how much batches differ."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric

from mmhooks.analysis.cknna import cknna
from mmhooks.analysis.results import Estimate


class CKNNA(Metric):
    """Mean over batches of :func:`mmhooks.analysis.cknna.cknna`: ``update(one, other)``, then :meth:`result`.

    Neighbours are sought within a batch, so its size is part of the measure: give batches of one size (the
    literature's is about 1,000). Batches without a value (their own kernels are degenerate) are left out.

    Args:
        k: neighbours.

    >>> metric = CKNNA(k=5)
    >>> x = torch.randn(50, 8); metric.update(x, 2 * x)
    >>> round(metric.result().value, 4)
    1.0
    """

    total: Tensor
    squares: Tensor
    batches: Tensor

    full_state_update = False
    is_differentiable = False
    higher_is_better = True

    def __init__(self, *, k: int = 10, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.k = k
        for name in ("total", "squares"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("batches", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, one: Float[Tensor, "b d"], other: Float[Tensor, "b2 d2"]) -> None:
        """Adds one batch of the same samples in two representations.

        Raises:
            ShapeMismatch: sides of different length, or fewer samples than neighbours.
        """
        value = cknna(one, other, k=self.k)
        if math.isnan(value):
            return
        self.total += value
        self.squares += value * value
        self.batches += 1

    def compute(self) -> dict[str, Tensor]:
        """``value`` (NaN without a batch), its ``error`` over batches, and ``batches``."""
        n = self.batches.double()
        mean = self.total / n
        variance = (self.squares / n - mean.square()).clamp_min(0)
        error = (variance / (n - 1).clamp_min(1)).sqrt()
        return {"value": mean, "error": error, "batches": self.batches}

    def result(self) -> Estimate:
        """The mean with Student's interval over batches; n counts batches."""
        from scipy.stats import t

        state = self.compute()
        n, value, error = int(state["batches"]), float(state["value"]), float(state["error"])
        if n < 2:
            return Estimate(value, math.nan, math.nan, n)
        half = float(t.ppf(0.975, n - 1)) * error
        return Estimate(value, value - half, value + half, n)
