"""From a store to what measures need: top samples in one pass, then only the vectors that count."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mmhooks.analysis.checks import unit_rows
from mmhooks.analysis.passes import (
    BATCH,
    ActivationStore,
    LatentRows,
    Side,
    VectorRows,
    latent_rows,
    share,
    vector_rows,
)
from mmhooks.analysis.similarity import Samples, check_sizes, mean_cosine, random_pool, random_samples
from mmhooks.analysis.top import TopActivating
from mmhooks.analysis.top_metric import TopSamples
from mmhooks.heads.base import Head


def top_of(rows: LatentRows, m: int, *, progress: bool = False) -> TopActivating:
    """The strongest samples of one side of a store, as row numbers."""
    metric = TopSamples(rows.n_features, m=m)
    for _, begin, end in share(len(rows), BATCH, "top samples", reads=[rows], progress=progress):
        metric.update(rows[begin:end], start=begin)
    return metric.result()


def stored_samples(
    store: ActivationStore,
    side: Side,
    head: Head | None,
    site: str | None,
    embeddings: Float[Tensor, "n d"] | str | None,
    *,
    m: int,
    pool: int | None,
    min_samples: int,
    seed: int,
) -> Samples:
    """What EmbedSim and WinRate compare, equal to that of the whole tables in memory.

    Raises:
        UnknownSite, ShapeMismatch: as :func:`mmhooks.analysis.passes.latent_rows`.
    """
    check_sizes(m, min_samples, len(store))
    top = top_of(latent_rows(store, side, head, site), m)
    vectors = vector_rows(store, f"{side}.embed" if embeddings is None else embeddings)
    return samples_of(top, vectors, len(store), m=m, pool=pool, seed=seed)


def samples_of(
    top: TopActivating,
    vectors: VectorRows,
    n: int,
    *,
    m: int,
    pool: int | None,
    seed: int,
    s_minus: float | None = None,
) -> Samples:
    """Reads the vectors of top samples, of the pool and of the paper's controls; no others are kept.

    ``s_minus``, where it is known from a pass over all vectors, replaces the pool's.
    """
    drawn = torch.empty(0, dtype=torch.long) if pool is None else random_pool(n, pool, seed)
    if pool is None and s_minus is None:
        s_minus = _mean_cosine_of(vectors, n)
    control = random_samples(n, m, range(len(top.indices)), seed)
    needed = torch.cat([top.indices.clamp_min(0).flatten(), drawn, control.flatten()]).unique()
    unit = unit_rows(vectors[needed].cpu()).float()
    rows = torch.where(top.indices >= 0, torch.searchsorted(needed, top.indices.clamp_min(0)), -1)
    pool_rows, control_rows = torch.searchsorted(needed, drawn), torch.searchsorted(needed, control)
    size = n if s_minus is not None else len(drawn)
    return Samples(
        unit,
        TopActivating(rows, top.values, top.count, n),
        pool_rows,
        mean_cosine(unit[pool_rows]) if s_minus is None else s_minus,
        size,
        lambda features: control_rows[features.start : features.stop],
    )


def _mean_cosine_of(vectors: VectorRows, n: int) -> float:
    """:func:`mean_cosine` of all ``n`` unit vectors, a batch at a time."""
    total = torch.zeros(vectors.width, dtype=torch.float64)
    squares = 0.0
    for begin in range(0, n, BATCH):
        unit = unit_rows(vectors[begin : begin + BATCH].cpu(), start=begin).float().double()
        total += unit.sum(0)
        squares += float(unit.square().sum())
    return (float(total.square().sum()) - squares) / (n * n - n)
