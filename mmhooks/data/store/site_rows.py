"""The rows of one site: memory-mapped from shards, selected from others, or computed by a head on access."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from mmhooks.data.sparse_rows import SparseRows
from mmhooks.data.store.buffers import Allocate, allocate
from mmhooks.data.store.layout import TORCH, SiteSpec
from mmhooks.data.store.shard import Shards
from mmhooks.errors import ShapeMismatch
from mmhooks.utils.indexing import as_place, as_places

Rows = Tensor | SparseRows
Index = Any  # a slice, whole numbers or a bool mask in any form, or one number


class SiteRows(ABC):
    """One site of ``n`` pairs, row by row.

    Attributes:
        spec: shape of a row, precision, entries per row if sparse, head.
        cuts: first rows of shards, and ``n``; a slice between two neighbouring cuts needs no copy.

    ``rows[i]``, ``rows[a:b]`` and ``rows[indices or mask]`` return a Tensor, or :class:`SparseRows` for a site
    stored sparse (of one row for an ``int``). Negative numbers count from the end. Slices may refer to the mapped
    file: do not write to them.
    """

    spec: SiteSpec
    cuts: list[int]

    def __len__(self) -> int:
        return self.cuts[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense table: ``(n, *shape of a row)``."""
        return (len(self), *self.spec.shape)

    @property
    def dtype(self) -> torch.dtype:
        return TORCH[self.spec.dtype]

    @property
    def is_sparse(self) -> bool:
        return self.spec.sparse is not None

    @property
    def nbytes(self) -> int:
        """Bytes of all rows as stored."""
        return len(self) * sum(column.row_bytes for column in self.spec.columns())

    def __repr__(self) -> str:
        kept = f", {self.spec.sparse} entries a row" if self.is_sparse else ""
        return f"{type(self).__name__}({self.spec.name!r}, {self.shape}, {self.spec.dtype}{kept})"

    def __getitem__(self, index: Index) -> Rows:
        if isinstance(index, slice):
            begin, end, step = index.indices(len(self))
            return (
                self.span(begin, max(begin, end)) if step == 1 else self.take(torch.arange(begin, end, step))
            )
        place = as_place(index, len(self), "rows")
        if place is None:
            return self.take(as_places(index, len(self), "rows"))
        row = self.span(place, place + 1)
        return row if isinstance(row, SparseRows) else row[0]

    def chunks(self, size: int) -> Iterator[tuple[int, Rows]]:
        """``(begin, rows)`` in order, at most ``size`` rows each, never across shards, without copying.

        Pages of finished shards are released, so memory does not grow with the store.
        """
        for first, last in pairwise(self.cuts):
            for begin, end in spans([first, last], size):
                yield begin, self.span(begin, end)
            self.release(first, last)

    def tensor(self) -> Rows:
        """All rows at once; memory-mapped if they are in one shard, else copied."""
        return self.span(0, len(self))

    @abstractmethod
    def span(self, begin: int, end: int) -> Rows:
        """Rows ``begin`` to ``end``."""

    @abstractmethod
    def take(
        self, index: Int[Tensor, " b"], empty: Allocate = allocate, counts: Sequence[int] | None = None
    ) -> Rows:
        """A copy of these rows, in this order.

        Args:
            index: each in ``0..n-1``.
            empty: allocates the result.
            counts: lengths of consecutive parts of ``index`` that are known to lie in one shard each.
        """

    def read(self, begin: int, end: int, empty: Allocate = allocate) -> Rows:
        """A copy of rows ``begin`` to ``end``, which may be written to; ``empty`` allocates it."""
        return self.span(begin, end)

    def prefetch(self, begin: int, end: int) -> None:  # noqa: B027 - most rows hold no pages
        """Announces that these rows are read soon, so that the system may read their shards ahead."""

    def release(self, begin: int, end: int) -> None:  # noqa: B027 - likewise
        """Announces that these rows were read, so that their shards' pages may be released."""


class StoredRows(SiteRows):
    """Rows of a site in the shards of one store."""

    def __init__(self, spec: SiteSpec, shards: Shards) -> None:
        self.spec, self._shards, self.cuts = spec, shards, shards.starts
        self._columns = [column.name for column in spec.columns()]
        self._starts = torch.tensor(shards.starts)

    def span(self, begin: int, end: int) -> Rows:
        parts = self._parts(begin, end)
        return self._wrap([column[0] if len(column) == 1 else torch.cat(column) for column in parts])

    def read(self, begin: int, end: int, empty: Allocate = allocate) -> Rows:
        found = self._empty(end - begin, empty)
        for parts, out in zip(self._parts(begin, end), found, strict=True):
            torch.cat(parts, out=out)
        return self._wrap(found)

    def _parts(self, begin: int, end: int) -> list[list[Tensor]]:
        """For each column, the memory-mapped pieces of these rows, one per shard."""
        parts: list[list[Tensor]] = [[] for _ in self._columns]
        for number in self._shard_range(begin, end):
            start, shard = self.cuts[number], self._shards[number]
            for column, kept in zip(self._columns, parts, strict=True):
                kept.append(shard.tensor(column)[max(0, begin - start) : end - start])
        return parts

    def take(
        self, index: Int[Tensor, " b"], empty: Allocate = allocate, counts: Sequence[int] | None = None
    ) -> Rows:
        back = None
        if counts is None:
            index, counts, back = self._by_shard(index)
        found = self._empty(len(index), empty)
        targets = [out.flatten(1).split(list(counts)) for out in found]
        for i, rows in enumerate(index.split(list(counts))):
            number = self._shard_of(int(rows[0]))
            local, shard = rows - self.cuts[number], self._shards[number]
            for column, outs in zip(self._columns, targets, strict=True):
                torch.index_select(shard.tensor(column).flatten(1), 0, local, out=outs[i])
        return self._wrap(found if back is None else [out.index_select(0, back) for out in found])

    def _by_shard(self, index: Tensor) -> tuple[Tensor, list[int], Tensor | None]:
        """The rows sorted by shard, the number per shard, and the inverse permutation (None: order unchanged)."""
        number = torch.searchsorted(self._starts, index, right=True)
        back = None
        if bool((number[1:] < number[:-1]).any()):
            order = number.argsort(stable=True)
            number, index = number.index_select(0, order), index.index_select(0, order)
            back = torch.empty_like(order)
            back[order] = torch.arange(len(order))
        return index, number.unique_consecutive(return_counts=True)[1].tolist(), back

    def prefetch(self, begin: int, end: int) -> None:
        for number in self._shard_range(begin, end):
            start, shard = self.cuts[number], self._shards[number]
            for column in self._columns:
                shard.prefetch(column, max(0, begin - start), min(shard.rows, end - start))

    def release(self, begin: int, end: int) -> None:
        for number in self._shard_range(begin, end):
            self._shards.release(number)

    def _shard_range(self, begin: int, end: int) -> range:
        first = self._shard_of(min(begin, len(self) - 1))
        return range(first, max(first + 1, bisect_left(self.cuts, end)))

    def _shard_of(self, row: int) -> int:
        return bisect_right(self.cuts, row) - 1

    def _empty(self, rows: int, empty: Allocate) -> list[Tensor]:
        return [empty((rows, *c.shape), TORCH[c.dtype]) for c in self.spec.columns()]

    def _wrap(self, columns: list[Tensor]) -> Rows:
        return SparseRows(columns[0], columns[1], self.spec.shape[0]) if self.is_sparse else columns[0]


class ChosenRows(SiteRows):
    """Some rows of another site, in any order, as from ``select`` and ``join``. Nothing is copied before it is read."""

    def __init__(self, base: SiteRows, index: Int[Tensor, " n"]) -> None:
        self.spec, self._base, self._index, self.cuts = base.spec, base, index, [0, len(index)]

    def span(self, begin: int, end: int) -> Rows:
        return self._base.take(self._index[begin:end])

    def take(
        self, index: Int[Tensor, " b"], empty: Allocate = allocate, counts: Sequence[int] | None = None
    ) -> Rows:
        return self._base.take(self._index[index], empty)


class HeadRows(SiteRows):
    """Latents of stored vectors, computed chunk by chunk when read, without running the encoder.

    Sparse if the head returns its active entries (``encode_topk``) and they are few.
    """

    def __init__(self, base: SiteRows, head: Any, name: str) -> None:
        if base.is_sparse or base.spec.shape[-1] != head.d_in:
            raise ShapeMismatch(
                f"head {head.name!r}: expected vectors of width {head.d_in}, got rows of shape {base.spec.shape} at "
                f"{base.spec.name!r}; apply it to the site that it was trained on"
            )
        shape = (*base.spec.shape[:-1], head.n_features)
        self.spec = SiteSpec(name, shape, "fp32", sparse_entries(head, shape), head.id, base.spec.positions)
        self._base, self._head, self.cuts = base, head, base.cuts

    def span(self, begin: int, end: int) -> Rows:
        return self._encode(self._base.span(begin, end))

    def take(
        self, index: Int[Tensor, " b"], empty: Allocate = allocate, counts: Sequence[int] | None = None
    ) -> Rows:
        return self._encode(self._base.take(index, allocate, counts))  # its cuts are the base's

    def prefetch(self, begin: int, end: int) -> None:
        self._base.prefetch(begin, end)

    def release(self, begin: int, end: int) -> None:
        self._base.release(begin, end)

    def _encode(self, x: Rows) -> Rows:
        assert isinstance(x, Tensor)
        weight = next(self._head.parameters())
        with torch.no_grad():
            unit = self._head.prepare(x.to(weight.device, weight.dtype))
            if self.spec.sparse is None:
                return self._head.encode(unit).float()
            values, indices = self._head.encode_topk(unit)
            return SparseRows(values.float(), indices, self._head.n_features)


def sparse_entries(head: Any, shape: Sequence[int]) -> int | None:
    """The head's number of active entries per row if storing only these halves the bytes at least, else None."""
    k = getattr(head, "k", None)
    if len(shape) != 1 or not isinstance(k, int) or not hasattr(head, "encode_topk"):
        return None
    return k if 4 * k <= shape[0] else None


def spans(cuts: Sequence[int], size: int) -> Iterator[tuple[int, int]]:
    """Ranges of at most ``size`` rows that do not cross a cut.

    >>> list(spans([0, 5, 8], 3))
    [(0, 3), (3, 5), (5, 8)]
    """
    for begin, end in pairwise(cuts):
        for start in range(begin, end, size):
            yield start, min(start + size, end)
