"""One row a pair from a store by token: the largest or the mean value of each feature, or whether any token has it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmhooks.data.sparse_rows import SparseRows
from mmhooks.data.store.buffers import Allocate, allocate
from mmhooks.data.store.layout import SiteSpec
from mmhooks.data.store.pair_runs import PairRuns
from mmhooks.data.store.site_rows import Rows, SiteRows
from mmhooks.errors import MMHooksError

Pool = Literal["max", "mean", "any"]
STEP = 2**24  # numbers of a table that is in memory at once


class PooledRows(SiteRows):
    """The tokens of each pair pooled, dense and in fp32, computed when read.

    ``max``: the largest value; ``mean``: of all tokens, a sparse row's absent features counting as 0; ``any``: 1 where a
    token's value is not 0, else 0.
    """

    def __init__(self, base: SiteRows, pairs: PairRuns, how: Pool) -> None:
        if how not in get_args(Pool):
            raise MMHooksError(f'pool: expected "max", "mean" or "any", got {how!r}')
        self.spec = SiteSpec(base.spec.name, base.spec.shape, "fp32", None, base.spec.head)
        self._base, self._pairs = base, pairs
        self._how: Pool = how
        starts = pairs.starts.tolist()
        # A shard of the base holds whole pairs; a view's rows are in one piece.
        self.cuts = [bisect_right(starts, cut) - 1 for cut in base.cuts]

    def span(self, begin: int, end: int) -> Float[Tensor, "p ..."]:
        return self.take(torch.arange(begin, end))

    def take(
        self, index: Int[Tensor, " b"], empty: Allocate = allocate, counts: Sequence[int] | None = None
    ) -> Float[Tensor, "p ..."]:
        found = empty((len(index), *self.spec.shape), torch.float32)
        width = max(1, found[:1].numel()) * max(1, int(self._pairs.counts[index].max())) if len(index) else 1
        step = max(1, STEP // width)
        for part in range(0, len(index), step):
            chosen = index[part : part + step]
            rows, lengths = self._pairs.rows_of(chosen), self._pairs.counts[chosen]
            one_piece = bool((rows.diff() == 1).all())
            read = self._base.span(int(rows[0]), int(rows[-1]) + 1) if one_piece else self._base.take(rows)
            found[part : part + step] = pooled(read, lengths, self._how)
        return found

    def release(self, begin: int, end: int) -> None:
        starts = self._pairs.starts
        self._base.release(int(starts[begin]), int(starts[end]))


def pooled(rows: Rows, lengths: Int[Tensor, " p"], how: Pool) -> Float[Tensor, "p ..."]:
    """Pools consecutive rows, ``lengths[i]`` of them for pair i.

    >>> pooled(torch.tensor([[1.0, 0.0], [3.0, -1.0], [5.0, 2.0]]), torch.tensor([2, 1]), "max")
    tensor([[3., 0.],
            [5., 2.]])
    """
    if isinstance(rows, SparseRows):
        if how == "max" and bool((rows.values < 0).any()):
            rows = rows.dense()  # a feature that every token has below 0 is not 0
        else:
            return _pooled_entries(rows, lengths, how)
    x = rows.float()
    if how == "any":
        x = (x != 0).float()
    if bool((lengths == lengths[:1]).all()):
        table = x.unflatten(0, (len(lengths), -1))
        return table.mean(1) if how == "mean" else table.amax(1)
    segment = torch.arange(len(lengths)).repeat_interleave(lengths)
    places = segment.view(-1, *[1] * (x.dim() - 1)).expand_as(x)
    out = x.new_zeros(len(lengths), *x.shape[1:])
    return out.scatter_reduce_(0, places, x, "mean" if how == "mean" else "amax", include_self=False)


def _pooled_entries(rows: SparseRows, lengths: Int[Tensor, " p"], how: Pool) -> Float[Tensor, "p n"]:
    """The same from active entries, none of them below 0 where the largest is asked for."""
    segment = torch.arange(len(lengths)).repeat_interleave(lengths)
    places = (segment[:, None] * rows.n_features + rows.indices.long()).flatten()
    values = rows.values.float().flatten()
    if how == "any":
        values = (values != 0).float()
    table = torch.zeros(len(lengths) * rows.n_features)
    table.scatter_reduce_(0, places, values, "sum" if how == "mean" else "amax", include_self=True)
    table = table.view(len(lengths), rows.n_features)
    return table / lengths[:, None] if how == "mean" else table
