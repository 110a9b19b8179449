"""Sparse rows: the active entries of each row, as returned by a TopK head and stored in a store."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmhooks.errors import ShapeMismatch


@dataclass(frozen=True)
class SparseRows:
    """A table ``[rows, n_features]`` stored as ``k`` entries per row, in no particular order.

    An entry of value 0 is padding and not active, whatever its index. Indices of active entries are distinct within a
    row.

    Raises:
        ShapeMismatch: values and indices of different shapes.

    >>> rows = SparseRows(torch.tensor([[2.0, 0.0]]), torch.tensor([[1, 0]]), n_features=3)
    >>> rows.dense()
    tensor([[0., 2., 0.]])
    """

    values: Float[Tensor, "rows k"]
    indices: Int[Tensor, "rows2 k2"]
    n_features: int

    def __post_init__(self) -> None:
        if self.values.shape != self.indices.shape:
            raise ShapeMismatch(
                f"sparse rows: expected one index per value, got values {tuple(self.values.shape)} and indices "
                f"{tuple(self.indices.shape)}"
            )

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: slice | Tensor) -> SparseRows:
        return SparseRows(self.values[rows], self.indices[rows], self.n_features)

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the dense table."""
        return len(self.values), self.n_features

    @property
    def active(self) -> Tensor:
        """Which entries are active, that is, not 0."""
        return self.values != 0

    def to(self, device: torch.device | str) -> SparseRows:
        return SparseRows(self.values.to(device), self.indices.to(device), self.n_features)

    def dense(self) -> Float[Tensor, "rows n"]:
        """The dense table."""
        table = self.values.new_zeros(self.shape)
        # Added, not assigned: padding may have the index of an active entry.
        return table.scatter_add_(1, self.indices.long(), self.values)
