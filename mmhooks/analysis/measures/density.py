"""Density and L0: how often each feature fires, and how many features fire per sample; streaming, from counts."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric

from mmhooks.analysis.inputs.checks import check_numbers, chunks
from mmhooks.analysis.inputs.sparse import Latents, check_latents, count
from mmhooks.analysis.inputs.store_rows import (
    BATCH,
    ActivationStore,
    Side,
    check_store,
    latent_rows,
    row_batches,
)
from mmhooks.analysis.results import Estimate, Records, Result
from mmhooks.analysis.statistics.intervals import bootstrap_histogram
from mmhooks.data.sparse_rows import SparseRows
from mmhooks.errors import ShapeMismatch
from mmhooks.heads.base import Head


class FeatureDensity(Metric):
    """Share of samples for which each feature is active, and the distribution of L0: ``update(latents)``, then
    :meth:`result`.

    L0 is an integer, so its histogram holds the whole distribution, and the bootstrap from it equals the bootstrap
    over samples.

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
            ShapeMismatch: the width is not ``n_features``. NotFinite: NaN or infinity.
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
        """The densities, and the mean L0 with its bootstrap interval."""
        state = {name: torch.atleast_1d(value.cpu()) for name, value in self.compute().items()}
        l0 = bootstrap_histogram(torch.arange(self.n_features + 1), state["l0_counts"], seed=self.seed)
        dead = float((state["counts"] == 0).float().mean())
        return Density(state["values"], l0, dead, int(state["n_samples"]))


@dataclass(frozen=True)
class Density(Result):
    """Share of samples that activate each feature, and how many features a sample activates (L0)."""

    values: Float[Tensor, " n"]
    l0: Estimate
    dead: float
    n_samples: int = field(default=0)

    def histogram(self, per_decade: int = 4) -> tuple[list[float], list[int]]:
        """How many alive features fire how often: bin edges in equal steps of the logarithm, from below 1 in
        ``n_samples`` up to 1, and the count per bin. Dead features are in no bin.

        >>> density(torch.tensor([[1.0, 0.0, 2.0]] + [[1.0, 0.0, 0.0]] * 9)).histogram(per_decade=1)
        ([0.1, 1.0], [2])
        """
        decades = max(1, math.ceil(math.log10(max(self.n_samples, 2)) - 1e-12))
        steps = decades * per_decade
        edges = [10 ** (k / per_decade - decades) for k in range(steps + 1)]
        alive = self.values[self.values > 0]
        # Rounded, so that a density that equals an edge up to rounding falls into the bin above it.
        place = ((alive.log10() + decades) * per_decade + 1e-9).floor().clamp(0, steps - 1).long()
        return edges, torch.bincount(place, minlength=steps).tolist()

    def table(self) -> Records:
        return Records([self.l0.columns("L0", "samples") | {"dead": self.dead, "samples": self.n_samples}])


@torch.no_grad()
def density(
    latents: Latents | ActivationStore,
    *,
    seed: int = 0,
    head: Head | None = None,
    side: Side = "image",
    site: str | None = None,
) -> Density:
    """Computes how often each feature is not 0, and the samples' mean L0 with its interval.

    Args:
        latents: one row per sample, dense or sparse; or a store, whose ``side`` is read in one pass.
        head, site: with a store, as in :func:`mmhooks.analysis.measures.mds.mds`.

    Raises:
        NotFinite: NaN or infinity in the latents.

    >>> density(torch.tensor([[1.0, 0.0], [2.0, 0.0]])).values
    tensor([1., 0.], dtype=torch.float64)
    """
    if isinstance(latents, (Tensor, SparseRows)):
        if isinstance(latents, Tensor):
            check_numbers(latents, "latents")
        if not len(latents):
            raise ShapeMismatch("density: expected at least one sample, got none")
        metric = FeatureDensity(latents.shape[1], seed=seed)
        metric.update(latents)
        return metric.result()
    check_store(latents)
    rows = latent_rows(latents, side, head, site)
    metric = FeatureDensity(rows.n_features, seed=seed)
    for _, begin, end in row_batches(len(rows), BATCH, reads=[rows]):
        metric.update(rows[begin:end])
    return metric.result()
