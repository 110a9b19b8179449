"""A batch of latents as measures add it up: only the active entries where it is sparse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.nn.functional import embedding_bag

from mmhooks.analysis.inputs.checks import check_finite
from mmhooks.data.sparse_rows import SparseRows
from mmhooks.errors import NotFinite, ShapeMismatch

# One row a sample. Dimensions are not named: two sides that differ must meet our own check, which says more.
Latents: TypeAlias = Float[Tensor, "_ _"] | SparseRows


def check_latents(latents: Latents, n_features: int, what: str = "latents", *, start: int = 0) -> None:
    """Raises ShapeMismatch for another width or an index outside it, NotFinite for NaN or infinity.

    ``start`` is the number of the first row, so that errors name rows of the whole stream.
    """
    if latents.shape[1] != n_features:
        raise ShapeMismatch(
            f"{what} of {latents.shape[1]} features, expected {n_features}: are they of another head?"
        )
    if not isinstance(latents, SparseRows):
        return check_finite(latents, what, start=start)
    finite = torch.isfinite(latents.values)
    if not bool(finite.all()):
        row, place = (int(i) for i in (~finite).nonzero()[0])
        raise NotFinite(
            f"{what}: {int((~finite).sum())} of {latents.values.numel()} sparse entries are NaN or infinite, first in "
            f"row {row + start}, feature {int(latents.indices[row, place])}; find the pair or the head that makes "
            "them, or leave these rows out"
        )
    if latents.indices.numel():
        low, high = (int(x) for x in latents.indices.aminmax())
        if low < 0 or high >= n_features:
            raise ShapeMismatch(
                f"{what}: sparse entries name features {low} to {high}, but there are {n_features}"
            )


def check_samples(
    latents: Latents, vectors: Float[Tensor, "_ _"], n_features: int, dim: int, *, start: int = 0
) -> None:
    """:func:`check_latents`, and that there is one finite vector of width ``dim`` a sample."""
    check_latents(latents, n_features, start=start)
    if tuple(vectors.shape) != (len(latents), dim):
        raise ShapeMismatch(
            f"{len(latents)} samples with embeddings of shape {tuple(vectors.shape)}, expected {dim} numbers a sample"
        )
    check_finite(vectors, "embeddings", start=start)


def rise(values: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
    """Half precision to single, so that sums do not lose what was stored; others as they are."""
    values = values.detach()
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def sums(indices: Int[Tensor, "b k"], weights: Shaped[Tensor, "b k"], n_features: int) -> Float[Tensor, " n"]:
    """For every feature the sum of the weights of its entries, in double precision."""
    return torch.bincount(indices.reshape(-1), weights.reshape(-1).double(), minlength=n_features)


def count(indices: Int[Tensor, "b k"], which: Bool[Tensor, "b k"], n_features: int) -> Int[Tensor, " n"]:
    """For every feature how many of its entries are among ``which``."""
    return torch.bincount(indices[which], minlength=n_features)


@dataclass(frozen=True)
class Columns:
    """The active entries of a batch, feature by feature: those of ``f`` are ``offsets[f] : offsets[f + 1]``."""

    rows: Int[Tensor, " e"]
    values: Float[Tensor, " e"]
    offsets: Int[Tensor, " n1"]

    @classmethod
    def of(cls, batch: SparseRows) -> Columns:
        """By counting, in time proportional to the entries. On the CPU, wherever the batch is."""
        from scipy.sparse import csr_array

        values, indices = rise(batch.values).cpu(), batch.indices.cpu()
        active = values != 0
        starts = np.zeros(len(batch) + 1, dtype=np.int32)
        np.cumsum(active.sum(1).numpy(), out=starts[1:])
        if not bool(active.all()):
            values, indices = values[active], indices[active]
        table = csr_array(
            (values.reshape(-1).numpy(), indices.reshape(-1).int().numpy(), starts), shape=batch.shape
        )
        columns = table.tocsc()
        return cls(*(torch.from_numpy(x) for x in (columns.indices, columns.data, columns.indptr)))

    @property
    def counts(self) -> Int[Tensor, " n"]:
        return self.offsets.diff().long()

    def extremes(self) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """Smallest and largest entry of every feature; infinities where it has none."""
        n = len(self.offsets) - 1
        low, high = torch.full((n,), torch.inf), torch.full((n,), -torch.inf)
        some = self.counts > 0
        if bool(some.any()):
            starts = self.offsets[:-1][some].numpy()
            for into, by in ((low, np.minimum), (high, np.maximum)):
                into[some] = torch.from_numpy(by.reduceat(self.values.numpy(), starts)).to(into.dtype)
        return low, high

    def transposed_times(self, table: Float[Tensor, "b d"]) -> Float[Tensor, "n d"]:
        """``batch.dense().T @ table``, at the cost of the entries."""
        return embedding_bag(
            self.rows.long(),
            table,
            offsets=self.offsets[:-1].long(),
            per_sample_weights=self.values.to(table.dtype),
            mode="sum",
        )
