"""Top-activating samples of every feature; streaming, with m candidates per feature instead of all samples."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import Metric

from mmhooks.analysis.inputs.checks import CHUNK_BYTES, check_finite
from mmhooks.analysis.inputs.sparse import Latents, check_latents, to_float32
from mmhooks.analysis.inputs.store_rows import (
    BATCH,
    ActivationStore,
    LatentRows,
    Side,
    check_store,
    latent_rows,
    row_batches,
)
from mmhooks.analysis.results import Records, Result
from mmhooks.data.sparse_rows import SparseRows
from mmhooks.errors import ShapeMismatch
from mmhooks.heads.base import Head
from mmhooks.utils.indexing import one_index

VECTOR = 3  # columns of the metric's state before a sample's vector: activation, number, family


@dataclass(frozen=True)
class TopActivating(Result):
    """The ``m`` strongest samples of each of ``n`` features, strongest first.

    Only samples with an activation above 0 count: the first ``count[k]`` entries of row k are samples, the others
    hold index -1 and value 0.
    """

    indices: Int[Tensor, "n m"]
    values: Float[Tensor, "n m"]
    count: Int[Tensor, " n"] = field(repr=False)
    n_samples: int = 0

    def of(self, feature: Any) -> Int[Tensor, " c"]:
        """The samples of one feature, strongest first; empty if it is dead.

        Raises:
            ShapeMismatch: ``feature`` is not one of these features.
        """
        place = one_index(feature, len(self.count), "features")
        return self.indices[place, : int(self.count[place])]

    def table(self) -> Records:
        return Records(
            {"feature": k, "samples": int(self.count[k]), "strongest": float(self.values[k, 0]) if c else 0.0}
            for k, c in enumerate(self.count.tolist())
        )


def top_activating(
    latents: Float[Tensor, "samples n"] | SparseRows | ActivationStore,
    m: int = 20,
    *,
    head: Head | None = None,
    side: Side = "image",
    site: str | None = None,
    families: Int[Tensor, " samples2"] | None = None,
    progress: bool = False,
) -> TopActivating:
    """Finds the ``m`` samples with the largest activation of every feature; ties go to the earlier sample.

    Args:
        latents: one row per sample, dense or sparse; or a store, whose ``side`` is read in one pass.
        head, site: with a store, as in :func:`mmhooks.analysis.measures.mds.mds`.
        families: the family of each sample (:func:`mmhooks.data.families`); of each family only the strongest
            sample is listed, so that near-duplicates of one image do not fill the list.

    Raises:
        ShapeMismatch: ``m`` is below 1, or there is not one family per sample. NotFinite: NaN or infinity in the
            latents.

    >>> top_activating(torch.tensor([[0.0, 2.0], [0.0, 5.0], [0.0, 0.0]]), m=2).indices
    tensor([[-1, -1],
            [ 1,  0]])
    """
    if m < 1:
        raise ShapeMismatch(f"m: expected at least 1, got {m}")
    if not isinstance(latents, Tensor):
        if not isinstance(latents, SparseRows):
            check_store(latents)
            return top_of_rows(
                latent_rows(latents, side, head, site), m, families=families, progress=progress
            )
        metric = TopSamples(latents.n_features, m=m, by_family=families is not None)
        metric.update(latents, families=families)
        return metric.result()
    check_finite(latents, "latents")
    check_families(families, len(latents))
    samples, n = latents.shape
    take = min(m, samples)
    indices = torch.full((n, m), -1, dtype=torch.long)
    values = torch.zeros((n, m), dtype=latents.dtype)
    # In runs of columns, so that the transposed copy that sorting needs stays small.
    width = max(1, CHUNK_BYTES // (max(1, samples) * 16))
    for begin in range(0, n, width):
        part = latents[:, begin : begin + width]
        part = (
            part.T.contiguous() if families is None else _strongest_of_families(part, families).T.contiguous()
        )
        best, where = _top(part, take)
        best, where = best.cpu(), where.cpu()
        fires = best > 0
        indices[begin : begin + width, :take] = torch.where(fires, where, -1)
        values[begin : begin + width, :take] = torch.where(fires, best, 0)
    return TopActivating(indices, values, (indices >= 0).sum(1), samples)


def _top(
    rows: Float[Tensor, "w samples"], take: int
) -> tuple[Float[Tensor, "w take"], Int[Tensor, "w take"]]:
    """Takes the first ``take`` of a stable descending sort at the cost of a top-k; ties at the cut go by position."""
    if take == 0:
        return rows[:, :0], torch.zeros((len(rows), 0), dtype=torch.long)
    cut = rows.topk(take, dim=1).values[:, -1:]
    above = (rows > cut).sum(1, keepdim=True)
    tied = rows == cut
    keep = (rows > cut) | (tied & (tied.cumsum(1) <= take - above))
    where = keep.nonzero()[:, 1].view(len(rows), take)
    best, order = rows.gather(1, where).sort(dim=1, descending=True, stable=True)
    return best, where.gather(1, order)


def _strongest_of_families(
    latents: Float[Tensor, "samples w"], families: Int[Tensor, " samples"]
) -> Float[Tensor, "samples w"]:
    """Sets to 0 all activations but the largest of each family and feature, the earliest of equal ones."""
    _, family = families.to(latents.device).unique(return_inverse=True)
    group = family[:, None].expand_as(latents)
    largest = latents.new_zeros(int(family.max()) + 1, latents.shape[1]).scatter_reduce(
        0, group, latents, "amax"
    )
    row = torch.arange(len(latents), device=latents.device)[:, None].expand_as(latents)
    row = torch.where(latents == largest[family], row, len(latents))
    first = torch.full_like(largest, len(latents), dtype=torch.long).scatter_reduce(0, group, row, "amin")
    keep = torch.arange(len(latents), device=latents.device)[:, None] == first[family]
    return torch.where(keep, latents, 0)


def first_of(top: TopActivating, m: int) -> TopActivating:
    """Returns the first ``m`` samples of each list."""
    return TopActivating(top.indices[:, :m], top.values[:, :m], top.count.clamp_max(m), top.n_samples)


def check_families(families: Int[Tensor, " samples"] | None, n: int) -> None:
    """Raises ShapeMismatch unless there is one family per sample (None: every sample is its own)."""
    if families is not None and len(families) != n:
        raise ShapeMismatch(f"families: expected one label for each of {n} samples, got {len(families)}")


def top_of_rows(
    rows: LatentRows, m: int, *, families: Int[Tensor, " samples"] | None = None, progress: bool = False
) -> TopActivating:
    """Finds the strongest samples of one side of a store, as row numbers."""
    check_families(families, len(rows))
    metric = TopSamples(rows.n_features, m=m, by_family=families is not None)
    for _, begin, end in row_batches(len(rows), BATCH, "top samples", reads=[rows], progress=progress):
        metric.update(
            rows[begin:end], start=begin, families=None if families is None else families[begin:end]
        )
    return metric.result()


class TopSamples(Metric):
    """Streaming ``m`` strongest samples of every feature: ``update(latents)``, then :meth:`result`.

    Equal to :func:`mmhooks.analysis.measures.top_activating.top_activating` on all samples at once, for any order of
    batches and merges: among equal activations the sample with the smaller number comes first. Samples are
    numbered: ``start`` is the number of a batch's first row, by default how many rows this metric has seen.
    Processes that share a stream must therefore give ``start``.

    A sparse batch costs one comparison per entry, with the weakest of the feature's m samples.

    Args:
        n_features: width of the latents. m: samples kept per feature.
        width: of the vector kept with each sample (``update(…, vectors=…)``); 0 keeps none. The state takes
            ``n_features * m * (3 + width)`` doubles.
        by_family: list at most one sample per family, the strongest; ``update`` then needs ``families``.

    >>> metric = TopSamples(2, m=2)
    >>> metric.update(torch.tensor([[0.0, 2.0], [0.0, 5.0]])); metric.update(torch.tensor([[0.0, 3.0]]))
    >>> metric.result().indices
    tensor([[-1, -1],
            [ 1,  2]])
    """

    best: Tensor  # [n, m, (activation, number, family, *vector)], strongest first; (0, -1, -1) where there is none
    n_samples: Tensor

    full_state_update = False
    is_differentiable = False
    higher_is_better = None

    def __init__(
        self, n_features: int, *, m: int = 20, width: int = 0, by_family: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if m < 1:
            raise ShapeMismatch(f"m: expected at least 1, got {m}")
        self.n_features, self.m, self.width, self.by_family = n_features, m, width, by_family
        empty = torch.zeros(n_features, m, VECTOR + width, dtype=torch.float64)
        empty[:, :, 1:VECTOR] = -1
        self._merge = merge_families if by_family else merge_strongest
        self.add_state("best", empty, dist_reduce_fx=self._merge)
        self.add_state("n_samples", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(
        self,
        latents: Latents,
        vectors: Float[Tensor, "samples2 d"] | None = None,
        *,
        start: int | None = None,
        families: Int[Tensor, " samples3"] | None = None,
    ) -> None:
        """Adds a batch.

        Raises:
            ShapeMismatch: the width is wrong, the vectors do not fit, or there is not one family per sample of a
                metric made ``by_family``. NotFinite: NaN or infinity.
        """
        start = int(self.n_samples) if start is None else start
        check_latents(latents, self.n_features, start=start)
        if (families is None) == self.by_family:
            made = "with" if self.by_family else "without"
            raise ShapeMismatch(
                f"families: expected {'one label per sample' if self.by_family else 'none'}, got "
                f"{'none' if families is None else len(families)}: this metric was made {made} by_family=True"
            )
        check_families(families, len(latents))
        got = (0, 0) if vectors is None else tuple(vectors.shape)
        expected = (len(latents), self.width) if self.width else (0, 0)
        if got != expected:
            raise ShapeMismatch(
                f"vectors: expected {self.width} numbers for each of {len(latents)} samples, got shape {got}"
            )
        self._add(latents, vectors, start, families)

    def _add(
        self, latents: Latents, vectors: Tensor | None, start: int, families: Tensor | None = None
    ) -> None:
        """Adds a batch that has been checked."""
        if isinstance(latents, SparseRows):
            self._add_entries(latents, vectors, start, families)
        else:
            self._add_table(latents, vectors, start, families)
        self.n_samples = self.n_samples + len(latents)

    def compute(self) -> dict[str, Tensor]:
        """``indices``, ``values`` (``[n, m]``; -1 and 0 where there is no sample) and ``count``."""
        indices = self.best[:, :, 1].long()
        values = self.best[:, :, 0].float()
        return {
            "indices": indices,
            "values": values,
            "count": (indices >= 0).sum(1),
            "n_samples": self.n_samples,
        }

    def result(self) -> TopActivating:
        state = {name: value.cpu() for name, value in self.compute().items()}
        shape = (self.n_features, self.m)  # torchmetrics makes a scalar of a single number
        return TopActivating(
            state["indices"].reshape(shape),
            state["values"].reshape(shape),
            state["count"].reshape(-1),
            int(state["n_samples"]),
        )

    def _add_table(
        self, latents: Tensor, vectors: Tensor | None, start: int, families: Tensor | None
    ) -> None:
        top = top_activating(to_float32(latents), self.m, families=families)
        fresh = torch.empty_like(self.best, device="cpu")
        fresh[:, :, 0] = top.values
        fresh[:, :, 1] = torch.where(top.indices >= 0, top.indices + start, -1)
        fresh[:, :, 2] = -1
        if families is not None and len(latents):
            of = families.cpu()[top.indices.clamp_min(0)]
            fresh[:, :, 2] = torch.where(top.indices >= 0, of, -1)
        if vectors is not None and len(latents):
            fresh[:, :, VECTOR:] = vectors.detach().cpu().double()[top.indices.clamp_min(0)]
        self.best = self._merge(torch.stack([self.best, fresh.to(self.best)]))

    def _add_entries(
        self, latents: SparseRows, vectors: Tensor | None, start: int, families: Tensor | None
    ) -> None:
        best = self.best.cpu()
        weakest, number = best[:, -1, 0].contiguous(), best[:, -1, 1].contiguous()
        values, indices = to_float32(latents.values).cpu(), latents.indices.cpu().long()
        # Most entries are dropped here, after one gather and one comparison.
        row, place = ((values > 0) & (values >= weakest[indices])).nonzero(as_tuple=True)
        value, feature, sample = values[row, place].double(), indices[row, place], (row + start).double()
        beats = (value > weakest[feature]) | ((value == weakest[feature]) & (sample < number[feature]))
        value, feature, sample, row = value[beats], feature[beats], sample[beats], row[beats]
        if not len(value):
            return
        touched = feature.unique()
        held = best[touched].flatten(0, 1)
        owner = torch.cat([touched.repeat_interleave(self.m), feature])
        values, samples = torch.cat([held[:, 0], value]), torch.cat([held[:, 1], sample])
        later = not len(held) or float(held[:, 1].max()) < start
        order = _ordered(owner, values, None if later else samples)
        family = None if families is None else families.cpu()[row].double()
        if family is not None:
            order = order[_first_of_family(owner[order], torch.cat([held[:, 2], family])[order])]
        owner = owner[order]
        rank = torch.arange(len(owner)) - torch.searchsorted(owner, owner)
        keep = rank < self.m
        owner, rank, order = owner[keep], rank[keep], order[keep]
        # Vectors are gathered only for samples that stay, few of many.
        new = order >= len(held)
        chosen = torch.empty(len(order), best.shape[2], dtype=torch.float64)
        chosen[~new] = held[order[~new]]
        fresh = order[new] - len(held)
        chosen[new, 0], chosen[new, 1] = value[fresh], sample[fresh]
        chosen[new, 2] = -1.0 if family is None else family[fresh]
        if vectors is not None:
            chosen[new, VECTOR:] = vectors.detach().cpu().double()[row[fresh]]
        if (
            family is not None
        ):  # fewer may be left than before, where a stronger sample of a listed family came
            best[touched] = self._defaults["best"][touched].to(best)
        best[owner, rank] = chosen
        self.best = best.to(self.best.device)


def _ordered(
    owner: Int[Tensor, " e"], values: Float[Tensor, " e"], samples: Float[Tensor, " e"] | None
) -> Int[Tensor, " e"]:
    """Sorts by owner, descending value, then sample number; ``samples`` None: ties are already in order."""
    order = np.arange(len(owner)) if samples is None else samples.numpy().argsort(kind="stable")
    order = order[(-values.numpy()[order]).argsort(kind="stable")]
    key = owner.numpy()[order]
    # 16-bit keys are radix sorted, which is faster.
    order = order[(key.astype(np.uint16) if len(key) and key.max() < 2**16 else key).argsort(kind="stable")]
    return torch.from_numpy(order)


def _first_of_family(owner: Int[Tensor, " e"], family: Float[Tensor, " e"]) -> Int[Tensor, " kept"]:
    """Places of the first entry of each family and owner, in order; entries without a sample (-1) all stay."""
    of, kin = owner.numpy(), family.numpy()
    order = np.lexsort((kin, of))  # stable: entries of one family and owner stay in order
    first = np.ones(len(order), dtype=bool)
    first[1:] = (np.diff(of[order]) != 0) | (np.diff(kin[order]) != 0)
    return torch.from_numpy(np.sort(order[first | (kin[order] < 0)]))


def merge_strongest(states: Float[Tensor, "parts n m c"]) -> Float[Tensor, "n m c"]:
    """Merges several states into the m strongest samples; ties go to the smaller number."""
    return _sorted_samples(states)[:, : states.shape[2]]


def merge_families(states: Float[Tensor, "parts n m c"]) -> Float[Tensor, "n m c"]:
    """Merges as :func:`merge_strongest`, with only the strongest sample of each family."""
    together = _sorted_samples(states)
    family = together[:, :, 2]
    same = (family[:, :, None] == family[:, None, :]) & (family >= 0)[:, :, None]
    again = same.tril(-1).any(2)
    together[again] = together.new_tensor([0, -1, -1] + [0] * (together.shape[2] - VECTOR))
    order = again.long().argsort(dim=1, stable=True)[:, : states.shape[2]]
    return together.gather(1, order[:, :, None].expand(-1, -1, together.shape[2]))


def _sorted_samples(states: Float[Tensor, "parts n m c"]) -> Float[Tensor, "n pm c"]:
    together = rearrange(states, "parts n m c -> n (parts m) c")
    order = together[:, :, 1].argsort(dim=1, stable=True)
    value = together[:, :, 0].gather(1, order)
    order = order.gather(1, value.argsort(dim=1, descending=True, stable=True))
    return together.gather(1, order[:, :, None].expand(-1, -1, together.shape[2]))
