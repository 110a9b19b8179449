"""EmbedSim and WinRate, streaming: vectors of the top samples and of one random pool are all that is kept."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmhooks.analysis.checks import unit_rows
from mmhooks.analysis.entries import Latents, check_samples
from mmhooks.analysis.similarity import (
    EmbedSimResult,
    Samples,
    SimKind,
    WinKind,
    WinRateResult,
    check_kind,
    check_sizes,
    embed_sim_of,
    random_samples,
    win_rate_of,
)
from mmhooks.analysis.top import TopActivating
from mmhooks.analysis.top_metric import TopSamples
from mmhooks.errors import ShapeMismatch


class _Similarity(TopSamples):
    """Top samples with their unit vectors, a random pool of samples with theirs, and the sum of all.

    The pool holds the samples whose numbers hash lowest, a uniform draw that does not depend on the order of
    batches or merges. Where the vectors can be read again by number (a store), the functions of
    :mod:`mmhooks.analysis.interpretability` need none of these states.
    """

    pool: Tensor  # [size, (hash, number, *vector)], lowest hash first; (inf, -1) where there is none
    unit_sum: Tensor
    unit_squares: Tensor

    def __init__(
        self, n_features: int, dim: int, *, m: int, pool: int, min_samples: int, seed: int, **kwargs: Any
    ) -> None:
        check_sizes(m, min_samples, 2)
        if pool < max(2, m):
            raise ShapeMismatch(f"the random pool needs at least m = {m} samples, came {pool}")
        super().__init__(n_features, m=m, width=dim, **kwargs)
        self.min_samples, self.seed = min_samples, seed
        empty = torch.zeros(pool, 2 + dim, dtype=torch.float64)
        empty[:, 0], empty[:, 1] = torch.inf, -1
        self.add_state("pool", empty, dist_reduce_fx=lowest)
        self.add_state("unit_sum", torch.zeros(dim, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("unit_squares", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(
        self,
        latents: Latents,
        vectors: Float[Tensor, "samples2 d"] | None = None,
        *,
        start: int | None = None,
    ) -> None:
        """Adds a batch of samples: their latents and their embeddings by another model.

        Raises:
            ShapeMismatch: rows or widths that differ. NotFinite: NaN or infinity in either.
        """
        if vectors is None:
            raise ShapeMismatch(f"similarity needs the embeddings of the samples, {self.width} numbers each")
        start = int(self.n_samples) if start is None else start
        check_samples(latents, vectors, self.n_features, self.width, start=start)
        unit = unit_rows(vectors, start=start).float()
        self._add(latents, unit, start)
        self.unit_sum += unit.sum(0, dtype=torch.float64)
        self.unit_squares += unit.double().square().sum()
        samples = torch.arange(start, start + len(unit))
        keys = scattered(samples, self.seed)
        among = keys < float(self.pool[-1, 0])
        if bool(among.any()):
            unit = unit.cpu().double()[among]
            fresh = torch.cat([torch.stack([keys[among], samples[among].double()], 1), unit], 1)
            self.pool = _lowest(torch.cat([self.pool, fresh.to(self.pool)]), len(self.pool))

    def _samples(self, state: dict[str, Tensor]) -> Samples:
        n = int(state["n_samples"])
        check_sizes(self.m, self.min_samples, n)
        best, pool = state["best"].cpu(), state["pool"].cpu()
        pool = pool[pool[:, 1] >= 0]
        number = best[:, :, 1].long()
        rows = torch.where(number >= 0, torch.arange(number.numel()).view_as(number), -1)
        unit = torch.cat([best[:, :, 2:].flatten(0, 1), pool[:, 2:]]).float()
        total = float(state["unit_sum"].square().sum()) - float(state["unit_squares"])
        return Samples(
            unit,
            TopActivating(rows, best[:, :, 0].float(), (number >= 0).sum(1), n),
            torch.arange(number.numel(), len(unit)),
            total / (n * n - n),
            n,
            lambda features: random_samples(len(pool), self.m, features, self.seed) + number.numel(),
        )

    def compute(self) -> dict[str, Tensor]:
        """The states; ``values`` of the subclasses hold the measure."""
        names = ("best", "pool", "unit_sum", "unit_squares", "n_samples")
        return {name: getattr(self, name) for name in names}


class EmbedSim(_Similarity):
    """EmbedSim of every feature, streaming: ``update(latents, embeddings)``, then :meth:`result`.

    Equal to :func:`mmhooks.analysis.interpretability.embed_sim` with its default pool (all samples). The
    paper's form draws each feature's random samples from the pool kept here instead of from all.

    Args:
        n_features, dim: widths of latents and embeddings.
        m, kind, min_samples, eps, seed: as in ``embed_sim``. pool: random samples kept.

    >>> metric = EmbedSim(1, 4, m=2)
    >>> metric.update(torch.tensor([[1.0], [1.0], [0.0], [0.0]]), torch.eye(4)[[0, 0, 1, 2]])
    >>> metric.result().s_plus
    tensor([1.])
    """

    def __init__(
        self,
        n_features: int,
        dim: int,
        *,
        m: int = 20,
        kind: SimKind = "primary",
        pool: int = 2048,
        min_samples: int = 2,
        eps: float = 1e-3,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        check_kind("EmbedSim", kind, ("primary", "difference", "paper"))
        super().__init__(n_features, dim, m=m, pool=pool, min_samples=min_samples, seed=seed, **kwargs)
        self.kind: SimKind = kind
        self.eps = eps

    def result(self) -> EmbedSimResult:  # type: ignore[override]
        samples = self._samples(self.compute())
        return embed_sim_of(
            samples, kind=self.kind, min_samples=self.min_samples, eps=self.eps, seed=self.seed
        )


class WinRate(_Similarity):
    """WinRate of every feature, streaming; equal to :func:`mmhooks.analysis.interpretability.win_rate` over
    the random pool kept here (all samples, where they are no more than ``pool``).

    >>> metric = WinRate(1, 4, m=2)
    >>> metric.update(torch.tensor([[1.0], [1.0], [0.0], [0.0]]), torch.eye(4)[[0, 0, 1, 2]])
    >>> round(metric.result().estimate.value, 3)
    0.833
    """

    def __init__(
        self,
        n_features: int,
        dim: int,
        *,
        m: int = 20,
        kind: WinKind = "expectation",
        pool: int = 2048,
        min_samples: int = 2,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        check_kind("WinRate", kind, ("expectation", "paper"))
        super().__init__(n_features, dim, m=m, pool=pool, min_samples=min_samples, seed=seed, **kwargs)
        self.kind: WinKind = kind

    def result(self) -> WinRateResult:  # type: ignore[override]
        samples = self._samples(self.compute())
        return win_rate_of(samples, kind=self.kind, min_samples=self.min_samples, seed=self.seed)


def lowest(states: Float[Tensor, "parts p c"]) -> Float[Tensor, "p c"]:
    """The pool of several pools."""
    return _lowest(states.flatten(0, 1), states.shape[1])


def _lowest(rows: Float[Tensor, "r c"], size: int) -> Float[Tensor, "p c"]:
    # Keys of 53 bits hardly ever tie; the number of the sample settles it.
    order = np.lexsort((rows[:, 1].cpu().numpy(), rows[:, 0].cpu().numpy()))[:size]
    return rows[torch.from_numpy(order).to(rows.device)]


def scattered(numbers: Int[Tensor, " b"], seed: int) -> Float[Tensor, " b"]:
    """A random key in [0, 1) for every number, the same wherever and whenever it is met (splitmix64)."""
    mask = 2**64 - 1
    x = numbers.numpy().astype(np.uint64) + np.uint64((seed * 0x632BE59BD9B4E019) & mask)
    x = (x + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x = x ^ (x >> np.uint64(31))
    return torch.from_numpy((x >> np.uint64(11)).astype(np.float64) / 2**53)
