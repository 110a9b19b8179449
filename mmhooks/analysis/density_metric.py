"""How often features fire and how many fire for a sample, streaming: two tables of counts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchmetrics import Metric

from mmhooks.analysis.checks import chunks
from mmhooks.analysis.entries import Latents, check_latents, count
from mmhooks.data.rows import SparseRows

if TYPE_CHECKING:
    from mmhooks.analysis.geometry import Density


class FeatureDensity(Metric):
    """Share of samples that each feature is active for, and the distribution of L0: ``update(latents)``, then
    :meth:`result`.

    L0 is a whole number, so that its histogram holds all of its distribution: the bootstrap over samples
    that it gives is that of the samples themselves.

    >>> metric = FeatureDensity(2)
    >>> metric.update(torch.tensor([[1.0, 0.0], [2.0, 0.0]]))
    >>> metric.result().values
    tensor([1., 0.], dtype=torch.float64)
    """

    counts: Tensor
    l0_counts: Tensor
    n_samples: Tensor

    full_state_update = False
    is_differentiable = False
    higher_is_better = None

    def __init__(self, n_features: int, *, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.n_features, self.seed = n_features, seed
        self.add_state("counts", torch.zeros(n_features, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("l0_counts", torch.zeros(n_features + 1, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("n_samples", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, latents: Latents) -> None:
        """Adds a batch of samples.

        Raises:
            ShapeMismatch: another width. NotFinite: NaN or infinity.
        """
        check_latents(latents, self.n_features, start=int(self.n_samples))
        device = self.counts.device
        if isinstance(latents, SparseRows):
            active = latents.active
            self.counts += count(latents.indices.long(), active, self.n_features).to(device)
            self._add_l0(active.sum(1))
        else:
            for _, part in chunks(latents):
                fires = part != 0
                self.counts += fires.sum(0).to(device)
                self._add_l0(fires.sum(1))
        self.n_samples = self.n_samples + len(latents)

    def _add_l0(self, l0: Tensor) -> None:
        self.l0_counts += torch.bincount(l0, minlength=self.n_features + 1).to(self.l0_counts.device)

    def compute(self) -> dict[str, Tensor]:
        """``values`` (density of every feature), ``l0`` (mean), and the counts."""
        n = self.n_samples.clamp_min(1).double()
        l0 = (self.l0_counts * torch.arange(len(self.l0_counts), device=n.device)).sum() / n
        return {"values": self.counts / n, "l0": l0, "counts": self.counts, "l0_counts": self.l0_counts,
                "n_samples": self.n_samples}  # fmt: skip

    def result(self) -> Density:
        from mmhooks.analysis.geometry import Density
        from mmhooks.analysis.intervals import bootstrap_histogram

        state = {name: torch.atleast_1d(value.cpu()) for name, value in self.compute().items()}
        l0 = bootstrap_histogram(torch.arange(self.n_features + 1), state["l0_counts"], seed=self.seed)
        dead = float((state["counts"] == 0).float().mean())
        return Density(state["values"], l0, dead, int(state["n_samples"]))
