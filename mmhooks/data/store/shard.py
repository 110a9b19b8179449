"""One shard: an Arrow stream of one record batch, written whole or not at all, and read memory-mapped."""

from __future__ import annotations

import mmap
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from hashlib import file_digest
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

from mmhooks.data.store.layout import ARROW, TORCH, Column
from mmhooks.errors import StoreError
from mmhooks.utils.files import write_whole

# Linux; elsewhere pages are given back when the kernel needs them.
_DONTNEED: int | None = getattr(mmap, "MADV_DONTNEED", None)
_WILLNEED: int | None = getattr(mmap, "MADV_WILLNEED", None)


def checksum(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def write_shard(
    path: Path,
    ids: Sequence[str],
    columns: Sequence[Column],
    values: Mapping[str, Shaped[Tensor, "..."]],
) -> dict[str, Any]:
    """Writes ids and columns, in the order of ``columns``; returns the shard's entry of the manifest.

    The bytes follow from the content alone.
    """
    import pyarrow as pa

    arrays: list[Any] = [pa.array(ids, pa.string())]
    for column in columns:
        array: Any = pa.array(_as_numpy(values[column.name]).reshape(-1))
        for length in reversed(column.shape):
            array = pa.FixedSizeListArray.from_arrays(array, length)
        arrays.append(array)
    batch = pa.RecordBatch.from_arrays(arrays, names=["id", *(c.name for c in columns)])

    def write(file: Any) -> None:
        with pa.ipc.new_stream(file, batch.schema) as stream:
            stream.write_batch(batch)

    write_whole(path, write)
    return {"file": path.name, "rows": len(ids), "bytes": path.stat().st_size, "sha256": checksum(path)}


def _as_numpy(value: Tensor) -> np.ndarray:
    value = value.contiguous()
    return value.view(torch.uint16).numpy() if value.dtype == torch.bfloat16 else value.numpy()


class Shard:
    """A shard in memory-mapped pages: columns as tensors without copying, ids as an Arrow array.

    The mapping is private: whoever writes into such a tensor changes their own copy of that page, never the file.
    """

    def __init__(self, path: Path, entry: Mapping[str, Any], columns: Sequence[Column]) -> None:
        import pyarrow as pa

        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size != entry["bytes"]:
                    raise StoreError(
                        f"{path} has {size} bytes, the manifest says {entry['bytes']}: {_ADVICE}"
                    )
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except FileNotFoundError:
            raise StoreError(f"{path} is missing: {_ADVICE}") from None
        whole = pa.py_buffer(self._map)
        try:
            batch = pa.ipc.open_stream(whole).read_next_batch()
            expected = {"id": pa.string()} | {c.name: _arrow_type(c) for c in columns}
            there = dict(zip(batch.schema.names, batch.schema.types, strict=True))
            if there != expected or batch.num_rows != entry["rows"]:
                raise StoreError(
                    f"{path} holds {batch.num_rows} rows of {_spell(there)}; the manifest says {entry['rows']} rows "
                    f"of {_spell(expected)}: {_ADVICE}"
                )
        except (pa.ArrowInvalid, OSError, StopIteration) as fault:
            if isinstance(fault, StoreError):
                raise
            raise StoreError(f"{path} is no Arrow stream any more ({fault}): {_ADVICE}") from fault
        self.rows: int = batch.num_rows
        self.ids: Any = batch.column("id")
        self._tensors: dict[str, Tensor] = {}
        self._columns = {c.name: (c, _address(batch.column(c.name)) - whole.address) for c in columns}

    def tensor(self, column: str) -> Shaped[Tensor, "rows ..."]:
        """All rows of a column, in the mapped pages."""
        found = self._tensors.get(column)
        if found is None:
            about, offset = self._columns[column]
            shape = (self.rows, *about.shape)
            flat = torch.frombuffer(self._map, dtype=TORCH[about.dtype], count=prod(shape), offset=offset)
            found = self._tensors[column] = flat.view(shape)
        return found

    def want(self, column: str, begin: int, end: int) -> None:
        """Asks the system to read these rows ahead."""
        if _WILLNEED is not None:
            about, offset = self._columns[column]
            first = (offset + begin * about.row_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.madvise(_WILLNEED, first, offset + end * about.row_bytes - first)

    def release(self) -> None:
        """Gives the pages back; a tensor that still looks at them reads them from the file again."""
        if _DONTNEED is not None:
            self._map.madvise(_DONTNEED)


_ADVICE = "`mmhooks store verify` lists every fault; copy the file again or extract anew"


def _arrow_type(column: Column) -> Any:
    import pyarrow as pa

    kind: Any = pa.type_for_alias("halffloat" if column.dtype == "fp16" else ARROW[column.dtype])
    for length in reversed(column.shape):
        kind = pa.list_(kind, length)
    return kind


def _spell(types: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {kind}" for name, kind in types.items())


def _address(array: Any) -> int:
    while hasattr(array, "values"):
        array = array.values
    return array.buffers()[1].address


class Shards:
    """The shards of one store, opened when asked for; the last ones stay open."""

    def __init__(
        self,
        folder: Path,
        entries: Sequence[Mapping[str, Any]],
        columns: Sequence[Column],
        *,
        keep: int = 512,
    ) -> None:
        self.folder, self.entries, self.columns, self._keep = folder, list(entries), list(columns), keep
        # starts[i] is the first row of shard i; the last entry is the number of rows.
        self.starts: list[int] = [0, *np.cumsum([e["rows"] for e in self.entries], dtype=np.int64).tolist()]
        self._open: OrderedDict[int, Shard] = OrderedDict()

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, number: int) -> Shard:
        shard = self._open.get(number)
        if shard is None:
            entry = self.entries[number]
            shard = self._open[number] = Shard(self.folder / entry["file"], entry, self.columns)
            if len(self._open) > self._keep:
                self._open.popitem(last=False)
        else:
            self._open.move_to_end(number)
        return shard

    def release(self, number: int) -> None:
        if number in self._open:
            self._open[number].release()
