"""The samples that a feature responds to most."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmhooks.analysis.checks import CHUNK_BYTES, check_finite
from mmhooks.analysis.passes import ActivationStore, Side, is_table, latent_rows
from mmhooks.analysis.results import Records, Result
from mmhooks.data.rows import SparseRows
from mmhooks.errors import ShapeMismatch
from mmhooks.heads.base import Head
from mmhooks.utils.indexing import one_index


@dataclass(frozen=True)
class TopActivating(Result):
    """The ``m`` strongest samples of each of ``n`` features, strongest first.

    Only samples with an activation above 0 count: of row k the first ``count[k]`` entries are samples,
    the others hold index -1 and value 0.
    """

    indices: Int[Tensor, "n m"]
    values: Float[Tensor, "n m"]
    count: Int[Tensor, " n"] = field(repr=False)
    n_samples: int = 0

    def of(self, feature: Any) -> Int[Tensor, " c"]:
        """The samples of one feature, strongest first; empty where it is dead.

        Raises:
            ShapeMismatch: not one feature of these.
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
    progress: bool = False,
) -> TopActivating:
    """The ``m`` samples with the largest activation of every feature; equal activations: the earlier sample.

    Args:
        latents: one row a sample, dense or sparse; or a store, whose ``side`` is read in one pass.
        head, site: with a store, as in :func:`mmhooks.analysis.mds.mds`.

    Raises:
        ShapeMismatch: ``m`` below 1. NotFinite: NaN or infinity in the latents.

    >>> top_activating(torch.tensor([[0.0, 2.0], [0.0, 5.0], [0.0, 0.0]]), m=2).indices
    tensor([[-1, -1],
            [ 1,  0]])
    """
    if m < 1:
        raise ShapeMismatch(f"m must be at least 1, came {m}")
    if not is_table(latents) or not isinstance(latents, Tensor):
        from mmhooks.analysis.stored import top_of
        from mmhooks.analysis.top_metric import TopSamples

        if not isinstance(latents, SparseRows):
            return top_of(latent_rows(latents, side, head, site), m, progress=progress)
        metric = TopSamples(latents.n_features, m=m)
        metric.update(latents)
        return metric.result()
    check_finite(latents, "latents")
    samples, n = latents.shape
    take = min(m, samples)
    indices = torch.full((n, m), -1, dtype=torch.long)
    values = torch.zeros((n, m), dtype=latents.dtype)
    # By columns: the transposed copy that sorting makes stays small.
    width = max(1, CHUNK_BYTES // (max(1, samples) * 16))
    for begin in range(0, n, width):
        part = latents[:, begin : begin + width].T.contiguous()
        best, where = _top(part, take)
        best, where = best.cpu(), where.cpu()
        fires = best > 0
        indices[begin : begin + width, :take] = torch.where(fires, where, -1)
        values[begin : begin + width, :take] = torch.where(fires, best, 0)
    return TopActivating(indices, values, (indices >= 0).sum(1), samples)


def _top(
    rows: Float[Tensor, "w samples"], take: int
) -> tuple[Float[Tensor, "w take"], Int[Tensor, "w take"]]:
    """As a stable descending sort, at the price of a top-k: ties at the cut are settled by position."""
    if take == 0:
        return rows[:, :0], torch.zeros((len(rows), 0), dtype=torch.long)
    cut = rows.topk(take, dim=1).values[:, -1:]
    above = (rows > cut).sum(1, keepdim=True)
    tied = rows == cut
    keep = (rows > cut) | (tied & (tied.cumsum(1) <= take - above))
    where = keep.nonzero()[:, 1].view(len(rows), take)
    best, order = rows.gather(1, where).sort(dim=1, descending=True, stable=True)
    return best, where.gather(1, order)
