"""Batches of latents, dense or sparse: checks, and sums that only visit the active entries of sparse ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.nn.functional import embedding_bag

from mmhooks.analysis.inputs.checks import check_finite, check_numbers, check_shapes
from mmhooks.data.sparse_rows import SparseRows
from mmhooks.errors import NotFinite, ShapeMismatch

# One row per sample. Dimensions are not named: our own check of two differing sides says more than jaxtyping's.
Latents: TypeAlias = Float[Tensor, "_ _"] | SparseRows


def check_latents(latents: Latents, n_features: int, what: str = "latents", *, start: int = 0) -> None:
    """Raises ShapeMismatch for another width or an index outside it, NotFinite for NaN or infinity.

    ``start`` is the number of the first row, so that errors name rows by their place in the whole stream.
    """
    if latents.shape[1] != n_features:
        raise ShapeMismatch(
            f"{what}: expected {n_features} features, got {latents.shape[1]}: are they of another head?"
        )
    if not isinstance(latents, SparseRows):
        return check_finite(latents, what, start=start)
    finite = torch.isfinite(latents.values)
    if not bool(finite.all()):
        row, place = (int(i) for i in (~finite).nonzero()[0])
        raise NotFinite(
            f"{what}: {int((~finite).sum())} of {latents.values.numel()} sparse entries are NaN or infinite, first in "
            f"row {row + start}, feature {int(latents.indices[row, place])}; find the pair or the head that produces "
            "them, or leave these rows out"
        )
    if latents.indices.numel():
        low, high = (int(x) for x in latents.indices.aminmax())
        if low < 0 or high >= n_features:
            raise ShapeMismatch(
                f"{what}: expected sparse entries of features 0 to {n_features - 1}, got {low} to {high}"
            )


def check_latent_pair(image: Latents, text: Latents, n_features: int, *, start: int = 0) -> None:
    """Checks both sides of a batch of pairs as :func:`check_latents` does.

    Raises:
        ShapeMismatch: a side that is no table of numbers; sides that differ in shape; another width.
        NotFinite: NaN or infinity in either.
    """
    for what, given in (("image latents", image), ("text latents", text)):
        if not isinstance(given, SparseRows):
            check_numbers(given, what)
    check_shapes(tuple(image.shape), tuple(text.shape))
    check_latents(image, n_features, "image latents", start=start)
    check_latents(text, n_features, "text latents", start=start)


def check_samples(
    latents: Latents, vectors: Float[Tensor, "_ _"], n_features: int, dim: int, *, start: int = 0
) -> None:
    """Checks as :func:`check_latents`, and that there is one finite vector of width ``dim`` per sample."""
    check_latents(latents, n_features, start=start)
    if tuple(vectors.shape) != (len(latents), dim):
        raise ShapeMismatch(
            f"embeddings: expected shape {(len(latents), dim)}, one vector per sample, got {tuple(vectors.shape)}"
        )
    check_finite(vectors, "embeddings", start=start)


def to_float32(values: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
    """Converts half precision to float32, so that sums keep what was stored; float64 stays as it is."""
    values = values.detach()
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def sums(indices: Int[Tensor, "b k"], weights: Shaped[Tensor, "b k"], n_features: int) -> Float[Tensor, " n"]:
    """Sums the weights of each feature's entries, in double precision."""
    return torch.bincount(indices.reshape(-1), weights.reshape(-1).double(), minlength=n_features)


def count(indices: Int[Tensor, "b k"], which: Bool[Tensor, "b k"], n_features: int) -> Int[Tensor, " n"]:
    """Counts, per feature, the entries selected by ``which``."""
    return torch.bincount(indices[which], minlength=n_features)


@dataclass(frozen=True)
class Columns:
    """The active entries of a batch grouped by feature: those of ``f`` are ``offsets[f] : offsets[f + 1]``."""

    rows: Int[Tensor, " e"]
    values: Float[Tensor, " e"]
    offsets: Int[Tensor, " n1"]

    @classmethod
    def of(cls, batch: SparseRows) -> Columns:
        """Groups by counting, in time proportional to the entries; on the CPU, wherever the batch is."""
        from scipy.sparse import csr_array

        values, indices = to_float32(batch.values).cpu(), batch.indices.cpu()
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
        """Smallest and largest entry of every feature; infinities for a feature without entries."""
        n = len(self.offsets) - 1
        low, high = torch.full((n,), torch.inf), torch.full((n,), -torch.inf)
        some = self.counts > 0
        if bool(some.any()):
            starts = self.offsets[:-1][some].numpy()
            for into, by in ((low, np.minimum), (high, np.maximum)):
                into[some] = torch.from_numpy(by.reduceat(self.values.numpy(), starts)).to(into.dtype)
        return low, high

    def transposed_times(self, table: Float[Tensor, "b d"]) -> Float[Tensor, "n d"]:
        """Computes ``batch.dense().T @ table`` at a cost proportional to the entries."""
        return embedding_bag(
            self.rows.long(),
            table,
            offsets=self.offsets[:-1].long(),
            per_sample_weights=self.values.to(table.dtype),
            mode="sum",
        )
