"""WinRate: how often two samples that activate a feature are more similar than two random samples."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmhooks.analysis.inputs.store_rows import ActivationStore, Side
from mmhooks.analysis.measures.samples import (
    TIE,
    Samples,
    Similarity,
    Zeros,
    check_kind,
    compared_samples,
    top_cosines,
    upper_triangle,
)
from mmhooks.analysis.results import Estimate, Records, Result
from mmhooks.analysis.statistics.intervals import bootstrap
from mmhooks.heads.base import Head

WinKind = Literal["expectation", "paper"]


@torch.no_grad()
def win_rate(
    latents: Float[Tensor, "samples n"] | ActivationStore,
    embeddings: Float[Tensor, "samples2 d"] | str | None = None,
    *,
    m: int = 20,
    kind: WinKind = "expectation",
    pool: int = 2048,
    min_samples: int = 2,
    seed: int = 0,
    head: Head | None = None,
    side: Side = "image",
    site: str | None = None,
    families: Int[Tensor, " samples3"] | None = None,
    zeros: Zeros = "drop",
) -> WinRateResult:
    """Computes WinRate: how often two top samples of a feature are more similar than two random samples.

    ``expectation`` is P(S+ > S-) with S- over all pairs of a random pool of ``pool`` samples; ``paper`` compares
    each pair with one pair of random samples (equation 6), m per feature, drawn by ``seed``. Chance is one half.
    Arguments and errors as in :func:`embed_sim`.

    >>> x = torch.eye(4)[[0, 0, 1, 2]]; latents = torch.tensor([[1.0], [1.0], [0.0], [0.0]])
    >>> round(win_rate(latents, x, m=2).estimate.value, 3)
    0.833
    """
    check_kind("WinRate", kind, ("expectation", "paper"))
    samples = compared_samples(
        latents, embeddings, m, pool, min_samples, seed, head, side, site, families, zeros
    )
    return win_rate_of(samples, kind=kind, min_samples=min_samples, seed=seed)


@dataclass(frozen=True)
class WinRateResult(Result):
    """WinRate of ``n`` features: ``values`` (NaN if too few samples activate a feature), and their mean."""

    values: Float[Tensor, " n"]
    estimate: Estimate
    counts: Int[Tensor, " n"] = field(repr=False)
    kind: str
    m: int
    pool: int
    seed: int

    def table(self) -> Records:
        return Records([{"form": self.kind, **self.estimate.columns("WinRate", "features"), "m": self.m}])


@torch.no_grad()
def win_rate_of(
    samples: Samples, *, kind: WinKind = "expectation", min_samples: int = 2, seed: int = 0
) -> WinRateResult:
    """Computes WinRate from samples; arguments as in :func:`mmhooks.analysis.measures.win_rate.win_rate`."""
    check_kind("WinRate", kind, ("expectation", "paper"))
    unit, top = samples.unit, samples.top
    enough = top.count >= min_samples
    values = torch.full((len(enough),), math.nan)
    if kind == "expectation":
        random_cosines = upper_triangle(unit[samples.pool][None])[0].sort().values
        for rows, cosines, valid in top_cosines(unit, top):
            below = torch.searchsorted(random_cosines, cosines - TIE, right=False) / len(random_cosines)
            values[rows] = (below * valid).sum(1) / valid.sum(1).clamp_min(1)
    else:
        for rows, cosines, valid in top_cosines(unit, top):
            other = upper_triangle(unit[samples.control(rows)])
            values[rows] = ((cosines > other + TIE) & valid).sum(1) / valid.sum(1).clamp_min(1)
    values[~enough] = math.nan
    m = top.indices.shape[1]
    return WinRateResult(values, bootstrap(values, seed=seed), top.count, kind, m, len(samples.pool), seed)


class WinRate(Similarity):
    """Streaming WinRate of every feature; equal to :func:`mmhooks.analysis.measures.win_rate.win_rate` over the
    random pool kept here (all samples, if there are at most ``pool``).

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
