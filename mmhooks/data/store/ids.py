"""Pair ids of a store, kept in Arrow arrays: a sequence whose strings are created on access."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from mmhooks.data.store.shard import Shards
from mmhooks.errors import DataError
from mmhooks.utils.indexing import as_place, as_places

CHUNK = 65_536


class Ids(Sequence[Any]):  # not of str: type checks at run time must not open shards
    """Ids in row order; equal to any sequence of the same strings. Indexed like a list, or by indices or a mask."""

    @abstractmethod
    def arrow(self) -> Any:
        """All of them as one ``pyarrow.ChunkedArray``."""

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.arrow()[index].to_pylist() if index.step in (None, 1) else list(self)[index]
        place = as_place(index, len(self), "ids")
        if place is None:
            return self.arrow().take(as_places(index, len(self), "ids").numpy()).to_pylist()
        return self.arrow()[place].as_py()

    def __iter__(self) -> Iterator[str]:
        whole = self.arrow()
        for begin in range(0, len(self), CHUNK):
            yield from whole[begin : begin + CHUNK].to_pylist()

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Ids):
            return len(self) == len(other) and self.arrow().equals(other.arrow())
        if isinstance(other, Sequence) and not isinstance(other, str):
            return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))
        return NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)})"

    def rows_of(self, ids: Any, *, where: str, partial: bool = False) -> Int[Tensor, " m"]:
        """The row of each id; with ``partial``, ids that are not found are left out.

        Raises:
            DataError: an id is not found (without ``partial``); the message counts them.
        """
        import pyarrow as pa
        import pyarrow.compute

        wanted = ids.arrow() if isinstance(ids, Ids) else _strings(ids)
        pc: Any = pyarrow.compute  # its functions are created at run time
        found = pc.index_in(wanted.cast(pa.large_string()), value_set=self.arrow().cast(pa.large_string()))
        missing = found.null_count
        if missing and not partial:
            first = wanted.filter(pc.is_null(found))[0].as_py()
            raise DataError(
                f"{missing} of {len(wanted)} ids are not in {where} ({len(self)} rows), the first is {first!r}"
            )
        return torch.from_numpy(found.drop_null().to_numpy().astype(np.int64))


def _strings(ids: Any) -> Any:
    import pyarrow as pa

    if isinstance(ids, str):
        raise DataError(
            f"expected ids, a list of strings, got the string {ids!r}; pass [{ids!r}], or store.rows([0])"
        )
    wanted = list(ids) if isinstance(ids, Iterable) else [ids]
    odd = [item for item in wanted if not isinstance(item, str)]
    if odd:
        raise DataError(
            f"expected ids, a list of strings, got {type(odd[0]).__name__} {odd[0]!r}; to select rows by number or mask "
            "use store.rows([3])"
        )
    return pa.chunked_array([pa.array(wanted, pa.large_string())])


class StoredIds(Ids):
    """The ids of all shards of a store, memory-mapped."""

    def __init__(self, shards: Shards) -> None:
        self._shards = shards
        self._whole: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_whole": None}  # it refers to pages mapped in this process

    def __len__(self) -> int:
        return self._shards.starts[-1]

    def arrow(self) -> Any:
        import pyarrow as pa

        if self._whole is None:
            parts = [self._shards[i].ids for i in range(len(self._shards))]
            self._whole = pa.chunked_array(parts, pa.string())
        return self._whole


class ChosenIds(Ids):
    """The ids of selected rows."""

    def __init__(self, base: Ids, index: Int[Tensor, " n"]) -> None:
        self._base, self._index = base, index

    def __len__(self) -> int:
        return len(self._index)

    def arrow(self) -> Any:
        import pyarrow as pa

        return self._base.arrow().take(pa.array(self._index.numpy()))
