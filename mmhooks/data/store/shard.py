"""One shard: an Arrow stream of one record batch, written atomically and read memory-mapped."""

from __future__ import annotations

import json
import mmap
import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

from mmhooks.data.store.layout import ARROW, TORCH, Column
from mmhooks.errors import StoreError
from mmhooks.utils.files import sha256_of, write_atomic

MARK = "mmhooks.content"
# Only on Linux; elsewhere the kernel reclaims pages when it needs memory.
_DONTNEED: int | None = getattr(mmap, "MADV_DONTNEED", None)
_WILLNEED: int | None = getattr(mmap, "MADV_WILLNEED", None)


def write_shard(
    path: Path,
    ids: Sequence[str],
    columns: Sequence[Column],
    values: Mapping[str, Shaped[Tensor, "..."]],
) -> dict[str, Any]:
    """Writes ids and columns, in the order of ``columns``; returns the shard's entry of the manifest.

    The bytes depend only on the content.
    """
    import pyarrow as pa

    arrays: list[Any] = [pa.array(ids, pa.string())]
    for column in columns:
        array: Any = pa.array(_as_numpy(values[column.name]).reshape(-1))
        for length in reversed(column.shape):
            array = pa.FixedSizeListArray.from_arrays(array, length)
        arrays.append(array)
    schema = pa.schema(
        [
            pa.field(name, array.type)
            for name, array in zip(["id", *(c.name for c in columns)], arrays, strict=True)
        ],
        metadata={MARK: _content_digest(ids, columns, values)},
    )
    batch = pa.RecordBatch.from_arrays(arrays, schema=schema)

    def write(file: Any) -> None:
        with pa.ipc.new_stream(file, batch.schema) as stream:
            stream.write_batch(batch)

    write_atomic(path, write)
    return {
        "file": path.name,
        "rows": len(ids),
        "bytes": path.stat().st_size,
        "sha256": sha256_of(path),
        "head": _header(path),
    }


def _content_digest(ids: Sequence[str], columns: Sequence[Column], values: Mapping[str, Tensor]) -> str:
    """A digest of a shard's content, stored in its header, so that shards with equal headers are identical."""
    digest = sha256(json.dumps(list(ids)).encode())
    for column in columns:
        digest.update(_as_numpy(values[column.name]).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _header(path: Path) -> dict[str, Any]:
    """Length and digest of the bytes before the first value: schema, content digest and column offsets."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as file:
        whole = file.read_buffer()
        batch = pa.ipc.open_stream(whole).read_next_batch()
        length = min(_addresses(batch)) - whole.address
        return {"bytes": length, "sha256": sha256(memoryview(whole)[:length]).hexdigest()}


def _addresses(batch: Any) -> Iterator[int]:
    for array in batch.columns:
        while array is not None:
            yield from (buffer.address for buffer in array.buffers() if buffer is not None and buffer.size)
            array = getattr(array, "values", None)


def _as_numpy(value: Tensor) -> np.ndarray:
    value = value.contiguous()
    return value.view(torch.uint16).numpy() if value.dtype == torch.bfloat16 else value.numpy()


class Shard:
    """A memory-mapped shard: columns as tensors without copying, ids as an Arrow array.

    The mapping is private: writing to such a tensor changes a private copy of the page, never the file.
    """

    def __init__(self, path: Path, entry: Mapping[str, Any], columns: Sequence[Column]) -> None:
        import pyarrow as pa

        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size != entry["bytes"]:
                    raise StoreError(
                        f"{path}: expected {entry['bytes']} bytes by the manifest, got {size} (if the store was replaced "
                        f"since it was opened, open it again): {_ADVICE}"
                    )
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except FileNotFoundError:
            raise StoreError(f"{path} is missing: {_ADVICE}") from None
        except OSError as fault:
            if isinstance(fault, StoreError):
                raise
            raise StoreError(
                f"{path} cannot be read ({fault.strerror}); check its permissions and disk"
            ) from fault
        head = entry.get("head")
        if head is not None and sha256(memoryview(self._map)[: head["bytes"]]).hexdigest() != head["sha256"]:
            raise StoreError(f"{path} {_describe_other_header(self._map)}: {_ADVICE}")
        whole = pa.py_buffer(self._map)
        try:
            batch = pa.ipc.open_stream(whole).read_next_batch()
            batch.validate()
            expected = {"id": pa.string()} | {c.name: _arrow_type(c) for c in columns}
            there = dict(zip(batch.schema.names, batch.schema.types, strict=True))
            if list(there.items()) != list(expected.items()) or batch.num_rows != entry["rows"]:
                raise StoreError(
                    f"{path}: expected {entry['rows']} rows of {_describe_columns(expected)} by the manifest, got "
                    f"{batch.num_rows} rows of {_describe_columns(there)}: {_ADVICE}"
                )
            self._columns = {c.name: (c, self._offset(batch.column(c.name), c, whole)) for c in columns}
        except _arrow_errors() as fault:
            if isinstance(fault, StoreError):
                raise
            raise StoreError(f"{path} is no longer an Arrow stream ({fault}): {_ADVICE}") from fault
        self.path, self.rows = path, int(batch.num_rows)
        self._ids: Any = batch.column("id")
        self._ids_checked = False
        self._tensors: dict[str, Tensor] = {}

    def _offset(self, array: Any, column: Column, whole: Any) -> int:
        """The offset of a column's values in the file, after checking that all of them lie in it."""
        begin, size = _address(array) - whole.address, len(array) * column.row_bytes
        if begin < 0 or begin % TORCH[column.dtype].itemsize or begin + size > whole.size:
            raise ValueError(f"column {column.name!r} lies at {begin} of {whole.size} bytes")
        return begin

    @property
    def ids(self) -> Any:
        """The ids as an Arrow array, whose offsets and UTF-8 are validated on first access.

        Raises:
            StoreError: damaged ids.
        """
        import pyarrow as pa

        if not self._ids_checked:
            try:
                self._ids.validate(full=True)
                if self._ids.null_count:
                    raise ValueError(f"{self._ids.null_count} ids are missing")
            except (pa.ArrowException, ValueError) as fault:
                raise StoreError(f"the ids of {self.path} are damaged ({fault}): {_ADVICE}") from fault
            self._ids_checked = True
        return self._ids

    def tensor(self, column: str) -> Shaped[Tensor, "rows ..."]:
        """All rows of a column, memory-mapped."""
        found = self._tensors.get(column)
        if found is None:
            about, offset = self._columns[column]
            shape = (self.rows, *about.shape)
            flat = torch.frombuffer(self._map, dtype=TORCH[about.dtype], count=prod(shape), offset=offset)
            if about.below is not None:
                self._check_indices(flat, about)
            found = self._tensors[column] = flat.view(shape)
        return found

    def _check_indices(self, flat: Tensor, about: Column) -> None:
        """Raises for an index out of range, which would access foreign memory when a row is made dense."""
        low, high = (int(x) for x in flat.aminmax())
        if low < 0 or high >= int(about.below or 0):
            raise StoreError(
                f"{self.path}: expected indices from 0 to {int(about.below or 0) - 1} in {about.name}, got {low} to {high}: "
                f"it is damaged; {_ADVICE}"
            )

    def prefetch(self, column: str, begin: int, end: int) -> None:
        """Asks the system to read these rows ahead."""
        if _WILLNEED is not None:
            about, offset = self._columns[column]
            first = (offset + begin * about.row_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.madvise(_WILLNEED, first, offset + end * about.row_bytes - first)

    def release(self) -> None:
        """Releases the pages; a tensor that still uses them reads them from the file again."""
        if _DONTNEED is not None:
            self._map.madvise(_DONTNEED)


# What Arrow raises for damaged files, in which it may trust offsets and lengths of any size.
def _arrow_errors() -> tuple[type[BaseException], ...]:
    import pyarrow as pa

    return (pa.ArrowException, OSError, StopIteration, ValueError, MemoryError, OverflowError, AttributeError)


def _describe_other_header(content: mmap.mmap) -> str:
    length = int.from_bytes(content[4:8], "little")
    if content[:4] != b"\xff\xff\xff\xff" or not 0 < length < len(content):
        return "is no longer an Arrow stream"
    return (
        "is not the shard in the manifest (if the store was replaced since it was opened, open it again; else the file "
        "was altered)"
    )


_ADVICE = "`mmhooks store verify` lists every fault; copy the file again or extract again"


def _arrow_type(column: Column) -> Any:
    import pyarrow as pa

    kind: Any = pa.type_for_alias("halffloat" if column.dtype == "fp16" else ARROW[column.dtype])
    for length in reversed(column.shape):
        kind = pa.list_(kind, length)
    return kind


def _describe_columns(types: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {kind}" for name, kind in types.items())


def _address(array: Any) -> int:
    while hasattr(array, "values"):
        array = array.values
    return array.buffers()[1].address


class Shards:
    """The shards of one store, opened on access; the most recent ones stay open."""

    def __init__(
        self,
        folder: Path,
        entries: Sequence[Mapping[str, Any]],
        columns: Sequence[Column],
        *,
        keep: int = 512,
    ) -> None:
        self.folder, self.entries, self.columns, self._keep = (
            folder.absolute(),
            list(entries),
            list(columns),
            keep,
        )
        # starts[i] is the first row of shard i; the last entry is the number of rows.
        self.starts: list[int] = [0, *np.cumsum([e["rows"] for e in self.entries], dtype=np.int64).tolist()]
        self._open: OrderedDict[int, Shard] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        """A copy, for instance in a worker process, opens its own shards."""
        return {**vars(self), "_open": OrderedDict()}

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

    def column(self, name: str) -> Tensor:
        """A column of all shards in memory."""
        return torch.cat([self[i].tensor(name) for i in range(len(self))])
