"""The samples that EmbedSim and WinRate compare (seed paper, equations 5 and 6): top samples and random samples.

They come from tensors, or from a store: top samples in one pass, then only the vectors that are needed. The streaming
metric keeps the vectors of the top samples and of one random pool.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmhooks.analysis.inputs.checks import check_rows, unit_rows
from mmhooks.analysis.inputs.sparse import Latents, check_samples
from mmhooks.analysis.inputs.store_rows import (
    BATCH,
    ActivationStore,
    Side,
    VectorRows,
    check_store,
    latent_rows,
    vector_rows,
)
from mmhooks.analysis.measures.top_activating import (
    VECTOR,
    TopActivating,
    TopSamples,
    top_activating,
    top_of_rows,
)
from mmhooks.errors import MMHooksError, ShapeMismatch
from mmhooks.heads.base import Head

# Cosines closer than this are equal: a pair of top samples may occur in the random pool too, computed by another matrix
# product, and would win or lose by rounding.
TIE = 1e-6

# Whether a feature's list of top samples leaves out samples that do not activate it, or is filled up with them.
Zeros = Literal["drop", "keep"]


@dataclass(frozen=True)
class Samples:
    """Unit vectors and row numbers from which EmbedSim and WinRate are computed.

    Attributes:
        unit: unit vectors of the samples that are needed. numbers: which samples these are.
        top: the strongest samples of each feature, as rows of ``unit``.
        pool: the shared random pool, as rows of ``unit``.
        s_minus: mean cosine of all pairs of random samples, over ``s_minus_pool`` of them.
        control: given a range of features, m random samples per feature, as rows of ``unit`` (for the paper's forms).
    """

    unit: Float[Tensor, "rows d"]
    numbers: Int[Tensor, " rows"]
    top: TopActivating
    pool: Int[Tensor, " p"]
    s_minus: float
    s_minus_pool: int
    control: Callable[[range], Tensor]


def check_kind(name: str, kind: str, known: tuple[str, ...]) -> None:
    """Raises MMHooksError unless ``kind`` is one of the ``known`` kinds of the measure ``name``."""
    if kind not in known:
        raise MMHooksError(f"kind: expected one of {', '.join(known)} for {name}, got {kind!r}")


def check_sizes(m: int, min_samples: int, n: int) -> None:
    """Raises ShapeMismatch unless there can be a pair of samples, and a list of top samples that is long enough."""
    if m < 2 or min_samples < 2 or n < 2:
        raise ShapeMismatch(
            f"similarity: expected at least 2 of each, got m = {m}, min_samples = {min_samples} and {n} samples"
        )
    if min_samples > m:  # every feature would be NaN: its list of top samples holds m at the most
        raise ShapeMismatch(
            f"similarity: expected min_samples of at most m = {m}, got {min_samples}; lower min_samples or raise m"
        )


def mean_cosine(unit: Float[Tensor, "n d"]) -> float:
    """Computes the mean cosine over all pairs of different unit rows: ``(|sum|^2 - n) / (n^2 - n)``."""
    n = len(unit)
    if n < 2:
        return math.nan
    # The exact squared norms instead of n: the rounding of unit vectors matters where the mean is near zero.
    total = unit.double().sum(0).square().sum() - unit.double().square().sum()
    return float(total) / (n * n - n)


def random_samples(n: int, m: int, features: range, seed: int) -> Int[Tensor, "f m"]:
    """Draws ``m`` different random samples per feature, which depend only on the feature and the seed."""
    rows = []
    for feature in features:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + feature)
        if 4 * m < n:  # a few of many: draw until m differ instead of shuffling all
            picked: dict[int, None] = {}
            while len(picked) < m:
                picked.update(dict.fromkeys(torch.randint(n, (2 * m,), generator=generator).tolist()))
            rows.append(torch.tensor(list(picked)[:m]))
        else:
            order = torch.randperm(n, generator=generator)[:m]
            rows.append(order if len(order) == m else order.repeat(-(-m // n))[:m])
    return torch.stack(rows)


def random_pool(n: int, size: int | None, seed: int) -> Int[Tensor, " p"]:
    """Draws ``size`` different samples of ``n``; all of them if ``size`` is None or at least ``n``."""
    if size is None or size >= n:
        return torch.arange(n)
    if size < 2:
        raise ShapeMismatch(f"pool: expected at least 2 random samples, got {size}")
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:size]


def one_per_family(families: Int[Tensor, " n"] | None, n: int, seed: int) -> Int[Tensor, " f"]:
    """Draws one random sample of each family, in order of their rows; all ``n`` samples if there are no families."""
    if families is None:
        return torch.arange(n)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    first = np.unique(families.cpu().numpy()[order.numpy()], return_index=True)[1]
    return order[torch.from_numpy(first)].sort().values


def with_inactive(
    top: TopActivating,
    alive: Bool[Tensor, " n"],
    *,
    families: Int[Tensor, " samples"] | None = None,
    seed: int = 0,
) -> TopActivating:
    """Fills the lists of alive features with random samples that do not activate them, as a plain top-m would.

    A feature that fires for fewer than m samples has listed all of them (or one of each family), so any other sample
    (of another family) has activation 0. The public top-m takes whichever zeros sort first; these are random.
    """
    n, m = top.n_samples, top.indices.shape[1]
    rows = one_per_family(families, n, seed)
    indices, count = top.indices.clone(), top.count.clone()
    kin = torch.arange(n) if families is None else families
    for feature in (alive & (top.count < m)).nonzero().flatten().tolist():
        listed = indices[feature, : int(count[feature])]
        drawn = rows[random_samples(len(rows), min(2 * m, len(rows)), range(feature, feature + 1), seed)[0]]
        free = drawn[~torch.isin(kin[drawn], kin[listed])][: m - len(listed)]
        indices[feature, len(listed) : len(listed) + len(free)] = free
        count[feature] = len(listed) + len(free)
    return TopActivating(indices, top.values, count, n)


def upper_triangle(unit: Float[Tensor, "f m d"]) -> Float[Tensor, "f p"]:
    """Computes the cosines of all pairs i < j in each set."""
    cosines = unit @ unit.transpose(1, 2)
    i, j = torch.triu_indices(unit.shape[1], unit.shape[1], 1)
    return cosines[:, i, j]


def top_cosines(unit: Tensor, top: TopActivating) -> Iterator[tuple[range, Tensor, Tensor]]:
    """Yields, per range of features, the range, the cosines of all pairs of top samples, and which pairs exist."""
    n, m = top.indices.shape
    i, j = torch.triu_indices(m, m, 1)
    width = max(1, 2**22 // (m * unit.shape[1]))
    for begin in range(0, n, width):
        rows = range(begin, min(begin + width, n))
        indices = top.indices[rows.start : rows.stop]
        real = indices >= 0
        yield rows, upper_triangle(unit[indices.clamp_min(0)]), real[:, i] & real[:, j]


def compared_samples(
    latents: Tensor | ActivationStore,
    embeddings: Tensor | str | None,
    m: int,
    pool: int | None,
    min_samples: int,
    seed: int,
    head: Head | None,
    side: Side,
    site: str | None,
    families: Int[Tensor, " samples"] | None,
    zeros: Zeros,
) -> Samples:
    """Collects the samples to compare, from tensors or from a store."""
    check_kind("zeros", zeros, get_args(Zeros))
    if not isinstance(latents, Tensor):
        check_store(latents)
        return stored_samples(
            latents, side, head, site, embeddings, m=m, pool=pool, min_samples=min_samples, seed=seed,
            families=families, zeros=zeros,
        )  # fmt: skip
    if not isinstance(embeddings, Tensor):
        raise ShapeMismatch(
            f"expected embeddings as a tensor, as the latents are, got {type(embeddings).__name__}"
        )
    check_rows(latents, embeddings)
    n = len(latents)
    check_sizes(m, min_samples, n)
    unit = unit_rows(embeddings.cpu()).float()
    top = top_activating(latents.detach(), m, families=families)
    if zeros == "keep":
        top = with_inactive(top, torch.ones(len(top.count), dtype=torch.bool), families=families, seed=seed)
    rows = one_per_family(families, n, seed)
    drawn = rows[random_pool(len(rows), pool, seed)]
    return Samples(
        unit,
        torch.arange(n),
        top,
        drawn,
        mean_cosine(unit[drawn]),
        len(drawn),
        lambda features: rows[random_samples(len(rows), m, features, seed)],
    )


class Similarity(TopSamples):
    """Base of the streaming EmbedSim and WinRate: top samples and a random pool with unit vectors, and sums over all.

    The pool holds the samples whose numbers have the lowest hashes, a uniform draw that does not depend on the
    order of batches or merges. If vectors can be read again by number, as in a store, the functions of
    :mod:`mmhooks.analysis.measures.samples` need none of this state.
    """

    pool: Tensor  # [size, (hash, number, *vector)], lowest hash first; (inf, -1) where there is none
    unit_sum: Tensor
    unit_squares: Tensor

    def __init__(
        self, n_features: int, dim: int, *, m: int, pool: int, min_samples: int, seed: int, **kwargs: Any
    ) -> None:
        check_sizes(m, min_samples, 2)
        if pool < max(2, m):
            raise ShapeMismatch(f"pool: expected at least m = {m} random samples, got {pool}")
        super().__init__(n_features, m=m, width=dim, **kwargs)
        self.min_samples, self.seed = min_samples, seed
        empty = torch.zeros(pool, 2 + dim, dtype=torch.float64)
        empty[:, 0], empty[:, 1] = torch.inf, -1
        self.add_state("pool", empty, dist_reduce_fx=merge_pools)
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
            ShapeMismatch: rows or widths differ. NotFinite: NaN or infinity in either.
        """
        if vectors is None:
            raise ShapeMismatch(
                f"similarity: expected the samples' embeddings, {self.width} numbers each, got None"
            )
        start = int(self.n_samples) if start is None else start
        check_samples(latents, vectors, self.n_features, self.width, start=start)
        unit = unit_rows(vectors, start=start).float()
        self._add(latents, unit, start)
        self.unit_sum += unit.sum(0, dtype=torch.float64)
        self.unit_squares += unit.double().square().sum()
        samples = torch.arange(start, start + len(unit))
        keys = hash_keys(samples, self.seed)
        enters = keys < float(self.pool[-1, 0])
        if bool(enters.any()):
            unit = unit.cpu().double()[enters]
            fresh = torch.cat([torch.stack([keys[enters], samples[enters].double()], 1), unit], 1)
            self.pool = _lowest_keys(torch.cat([self.pool, fresh.to(self.pool)]), len(self.pool))

    def _samples(self, state: dict[str, Tensor]) -> Samples:
        n = int(state["n_samples"])
        check_sizes(self.m, self.min_samples, n)
        best, pool = state["best"].cpu(), state["pool"].cpu()
        pool = pool[pool[:, 1] >= 0]
        number = best[:, :, 1].long()
        rows = torch.where(number >= 0, torch.arange(number.numel()).view_as(number), -1)
        unit = torch.cat([best[:, :, VECTOR:].flatten(0, 1), pool[:, 2:]]).float()
        total = float(state["unit_sum"].square().sum()) - float(state["unit_squares"])
        return Samples(
            unit,
            torch.cat([number.flatten(), pool[:, 1].long()]),
            TopActivating(rows, best[:, :, 0].float(), (number >= 0).sum(1), n),
            torch.arange(number.numel(), len(unit)),
            total / (n * n - n),
            n,
            lambda features: random_samples(len(pool), self.m, features, self.seed) + number.numel(),
        )

    def compute(self) -> dict[str, Tensor]:
        """The state; the subclasses' ``result()`` computes the measure from it."""
        names = ("best", "pool", "unit_sum", "unit_squares", "n_samples")
        return {name: getattr(self, name) for name in names}


def merge_pools(states: Float[Tensor, "parts p c"]) -> Float[Tensor, "p c"]:
    """Merges several pools into one."""
    return _lowest_keys(states.flatten(0, 1), states.shape[1])


def _lowest_keys(rows: Float[Tensor, "r c"], size: int) -> Float[Tensor, "p c"]:
    # Keys of 53 bits hardly ever tie; the sample's number breaks ties.
    order = np.lexsort((rows[:, 1].cpu().numpy(), rows[:, 0].cpu().numpy()))[:size]
    return rows[torch.from_numpy(order).to(rows.device)]


def hash_keys(numbers: Int[Tensor, " b"], seed: int) -> Float[Tensor, " b"]:
    """Hashes every number to a random key in [0, 1), the same in every process and run (splitmix64)."""
    mask = 2**64 - 1
    x = numbers.numpy().astype(np.uint64) + np.uint64((seed * 0x632BE59BD9B4E019) & mask)
    x = (x + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x = x ^ (x >> np.uint64(31))
    return torch.from_numpy((x >> np.uint64(11)).astype(np.float64) / 2**53)


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
    families: Int[Tensor, " samples"] | None = None,
    zeros: Zeros = "drop",
) -> Samples:
    """Collects the samples to compare from a store, equal to those of the whole tables in memory.

    Raises:
        UnknownSite, ShapeMismatch: as :func:`mmhooks.analysis.inputs.store_rows.latent_rows`.
    """
    check_sizes(m, min_samples, len(store))
    top = top_of_rows(latent_rows(store, side, head, site), m, families=families)
    if zeros == "keep":
        top = with_inactive(top, torch.ones(len(top.count), dtype=torch.bool), families=families, seed=seed)
    vectors = vector_rows(store, f"{side}.embed" if embeddings is None else embeddings)
    return samples_of(top, vectors, len(store), m=m, pool=pool, seed=seed, families=families)


def samples_of(
    top: TopActivating,
    vectors: VectorRows,
    n: int,
    *,
    m: int,
    pool: int | None,
    seed: int,
    s_minus: float | None = None,
    families: Int[Tensor, " samples"] | None = None,
) -> Samples:
    """Reads the vectors of top samples, of the pool and of the paper's controls, and no others.

    ``s_minus``, if known from a pass over all vectors, replaces that of the pool. With ``families``, all random samples
    are of different families.
    """
    rows = one_per_family(families, n, seed)
    if families is not None:
        pool, s_minus = pool or len(rows), None
    drawn = rows[:0] if pool is None else rows[random_pool(len(rows), pool, seed)]
    if pool is None and s_minus is None:
        s_minus = _mean_cosine_of(vectors, n)
    control = rows[random_samples(len(rows), m, range(len(top.indices)), seed)]
    needed = torch.cat([top.indices.clamp_min(0).flatten(), drawn, control.flatten()]).unique()
    unit = unit_rows(vectors[needed].cpu()).float()
    top_rows = torch.where(top.indices >= 0, torch.searchsorted(needed, top.indices.clamp_min(0)), -1)
    pool_rows, control_rows = torch.searchsorted(needed, drawn), torch.searchsorted(needed, control)
    size = n if s_minus is not None else len(drawn)
    return Samples(
        unit,
        needed,
        TopActivating(top_rows, top.values, top.count, n),
        pool_rows,
        mean_cosine(unit[pool_rows]) if s_minus is None else s_minus,
        size,
        lambda features: control_rows[features.start : features.stop],
    )


def _mean_cosine_of(vectors: VectorRows, n: int) -> float:
    """Computes :func:`mean_cosine` of all ``n`` unit vectors, one batch at a time."""
    total = torch.zeros(vectors.width, dtype=torch.float64)
    squares = 0.0
    for begin in range(0, n, BATCH):
        unit = unit_rows(vectors[begin : begin + BATCH].cpu(), start=begin).float().double()
        total += unit.sum(0)
        squares += float(unit.square().sum())
    return (float(total.square().sum()) - squares) / (n * n - n)
