"""Writes a store: shards atomically, a journal of finished shards, and the manifest at the end.

While a store is being written, its manifest contains the plan and ``"complete": false``, and every rank records its
finished shards in its own journal. A resumed run keeps the recorded shards. The rows of a shard are determined by the
settings, so a resumed store has the same bytes as an uninterrupted one.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from mmhooks.data.store.layout import (
    MANIFEST,
    TORCH,
    Column,
    columns_in,
    dataset_files,
    differences,
    is_by_token,
    manifest_bytes,
    pairs_in,
    read_manifest,
    shard_name,
)
from mmhooks.data.store.lock import LOCK_FILE
from mmhooks.data.store.schema import BY_PAIR, BY_TOKEN, check_count, is_entry
from mmhooks.data.store.shard import write_shard
from mmhooks.errors import NotFinite, ShapeMismatch, StoreError
from mmhooks.utils.files import PARTS, explain_os_errors, sync_folder, write_bytes

JOURNALS = ".journal-*.jsonl"
PLAN = ("model", "sites", "data", "settings", "content")


def begin(folder: Path, plan: Mapping[str, Any], versions: Mapping[str, str]) -> bool:
    """Opens ``folder`` for this plan, new or to resume an earlier run; returns whether the store is finished already.

    Called by one process, which holds the :class:`~mmhooks.data.store.lock.Lock`, before any other writes.

    Raises:
        StoreError: the folder contains a store of another plan, one of an older format, or other files; or it was begun
            with other versions and is not finished.
    """
    if not (folder / MANIFEST).exists():
        others = [p.name for p in folder.iterdir() if p.name != LOCK_FILE and not p.match(PARTS)]
        if others:
            raise StoreError(
                f"{folder}: expected an empty folder or a store, got one with {', '.join(sorted(others)[:3])}; choose a "
                "new folder"
            )
        number = BY_TOKEN if is_by_token(plan) else BY_PAIR
        head = {"format": number, "complete": False, **plan, "versions": dict(versions), "shards": []}
        with explain_store_errors(folder, "its manifest"):
            write_bytes(folder / MANIFEST, manifest_bytes(head))
        return False
    manifest = read_manifest(folder)
    if manifest["format"] < BY_PAIR:
        raise StoreError(
            f"{folder} contains a store of format {manifest['format']}, which does not record enough to tell whether its "
            f"rows are those of this call{'; mm.Store still opens it' if manifest['complete'] else ''}: choose another "
            "folder"
        )
    now = json.loads(json.dumps(plan))
    faults = differences({k: now.get(k) for k in PLAN}, {k: manifest.get(k) for k in PLAN})
    if faults:
        raise StoreError(
            f"{folder} was begun with other settings: {'; '.join(faults[:4])}{'; …' if len(faults) > 4 else ''}. "
            "Resume with the same ones, or choose another folder"
        )
    if manifest["complete"]:
        _remove_leftovers(folder)
        return True
    faults = differences(json.loads(json.dumps(versions)), manifest["versions"])
    if faults:
        raise StoreError(
            f"{folder} was begun with other versions ({'; '.join(faults)}) and is not finished: its rows would be a "
            "mixture. Resume with the same versions, or choose another folder"
        )
    for part in folder.glob(PARTS):
        part.unlink(missing_ok=True)
    return False


def finished(folder: Path) -> dict[int, dict[str, Any]]:
    """The shards recorded in the journals whose files have their full size: number -> entry."""
    found: dict[int, dict[str, Any]] = {}
    for entry in _journal_notes(folder):
        if is_entry(entry):
            path = folder / entry["file"]
            if entry["rows"] == 0 or (path.is_file() and path.stat().st_size == entry["bytes"]):
                found[entry["shard"]] = entry
    return found


def _journal_notes(folder: Path) -> Iterator[dict[str, Any]]:
    """The entries of the journals. Truncated or damaged lines are ignored, so their shards are written again."""
    for journal in sorted(folder.glob(JOURNALS)):
        for line in journal.read_bytes().split(b"\n")[:-1]:  # a line without newline was truncated
            with suppress(ValueError, RecursionError):
                note = json.loads(line)
                if isinstance(note, dict) and note.pop("check", None) == _check_of(note):
                    yield note


def _check_of(note: Mapping[str, Any]) -> str:
    return sha256(json.dumps(note).encode()).hexdigest()[:16]


def finish(folder: Path, *, ranks: int | None = None) -> None:
    """Completes the store: the files for ``datasets``, then the manifest. Safe to repeat after a kill.

    Called by one process, when all ranks have written their shards.

    Args:
        ranks: number of processes that read a stream, each of which has recorded its end.

    Raises:
        StoreError: rows of the source are missing; the store is not marked as complete then.
    """
    manifest, found = read_manifest(folder), finished(folder)
    _check_whole(folder, manifest, found, ranks)
    entries = [entry for _, entry in sorted(found.items())]
    keys = ("file", "rows", "pairs", "bytes", "sha256", "head")
    shards = [{k: entry[k] for k in keys if k in entry} for entry in entries if entry["rows"]]
    skipped = {key: why for entry in entries for key, why in entry["skipped"].items()}
    whole = {
        **manifest,
        "complete": True,
        "pairs": sum(map(pairs_in, shards)),
        "skipped": skipped,
        "shards": shards,
    }
    check_count(whole, folder / MANIFEST)
    with explain_store_errors(folder, "its manifest"):
        for name, content in dataset_files(whole).items():
            write_bytes(folder / name, content)
        write_bytes(folder / MANIFEST, manifest_bytes(whole))
    _remove_leftovers(folder)


def _check_whole(
    folder: Path, manifest: Mapping[str, Any], found: Mapping[int, Mapping[str, Any]], ranks: int | None
) -> None:
    """Raises StoreError if shards are missing or have fewer rows than they should."""
    total, size = manifest["data"].get("pairs"), manifest["settings"]["shard_rows"]
    if total is not None:
        expected = {n: min(size, total - n * size) for n in range(-(-total // size))}
        short = [n for n, rows in expected.items() if n in found and _rows_accounted(found[n]) != rows]
        missing = [n for n in expected if n not in found]
    else:
        ends = {note["rank"]: note["shards"] for note in _journal_notes(folder) if "rank" in note}
        silent = [rank for rank in range(ranks or 0) if rank not in ends]
        if silent:
            raise StoreError(
                f"{folder} is not complete: rank {silent[0]} of {ranks} has not recorded the end of its stream; repeat "
                "the call to resume from the finished shards"
            )
        numbers = (
            [rank + i * ranks for rank in range(ranks) for i in range(ends[rank])]
            if ranks
            else range(max(found, default=-1) + 1)
        )
        short, missing = [], [n for n in numbers if n not in found]
    if missing or short:
        names = ", ".join(shard_name(n) for n in (*missing, *short)[:4])
        remedy = f"delete {names} and repeat" if short else "repeat"
        raise StoreError(
            f"{folder} is not complete: {len(missing)} shards are missing and {len(short)} too short ({names}), although "
            "all were written: a journal or shard was changed or removed meanwhile. Finished shards are kept; "
            f"{remedy} the same call, which writes the rest again"
        )


def _rows_accounted(entry: Mapping[str, Any]) -> int:
    return pairs_in(entry) + len(entry["skipped"])


def _remove_leftovers(folder: Path) -> None:
    for pattern in (JOURNALS, PARTS):
        for path in folder.glob(pattern):
            with suppress(OSError):  # a finished store may be in a read-only folder
                path.unlink(missing_ok=True)
    sync_folder(folder)


class ShardWriter:
    """Collects the rows of one rank's shards and writes each shard when it is complete.

    ``add`` takes batches in the order of shards; ``close`` ends the current shard.

    Raises:
        ShapeMismatch: rows of a shape other than the manifest's.
        NotFinite: NaN or infinity, including overflow to fp16; the message names the pair.
        StoreError: the disk is full or cannot be written; finished shards are kept.
    """

    def __init__(self, folder: Path, *, rank: int = 0) -> None:
        manifest = read_manifest(folder)
        self._folder, self._by_token = folder, is_by_token(manifest)
        self._columns = columns_in(manifest)
        self._capacity = int(manifest["settings"]["shard_rows"])
        self._journal = folder / f".journal-{rank:05d}.jsonl"
        if self._journal.exists():
            with explain_os_errors(self._journal), self._journal.open("rb+") as file:
                file.truncate(file.read().rfind(b"\n") + 1)  # drops a line truncated by a kill
        self._ids: list[str] = []
        self._skipped: dict[str, str] = {}
        self._rows: dict[str, Tensor] = {}
        self._filled = self._pairs = 0

    def add(
        self,
        ids: Sequence[str],
        columns: Mapping[str, Shaped[Tensor, "..."]],
        skipped: Mapping[str, str],
        counts: Sequence[int] | None = None,
    ) -> None:
        """Appends rows to the current shard; ``columns`` by the column names of the manifest's sites.

        Args:
            ids: of the pairs.
            counts: how many rows each pair has, in a store by token.
        """
        self._skipped |= skipped
        if not ids:
            return
        self._pairs += len(ids)
        if self._pairs > self._capacity:
            raise ShapeMismatch(f"expected at most {self._capacity} pairs in a shard, got {self._pairs}")
        if counts is not None:
            ids = [key for key, count in zip(ids, counts, strict=True) for _ in range(count)]
        begin, end = self._filled, self._filled + len(ids)
        for column in self._columns:
            value = columns[column.name]
            if tuple(value.shape[1:]) != column.shape:
                raise ShapeMismatch(
                    f"site {column.name!r}: expected rows of shape {column.shape}, got {tuple(value.shape[1:])}; a store "
                    "holds one shape per site"
                )
            if len(value) != len(ids):
                raise ShapeMismatch(
                    f"site {column.name!r}: expected one row for each of {len(ids)} "
                    f"{'tokens' if self._by_token else 'pairs'}, got {len(value)} rows"
                )
            kept = self._buffer(column, end)[begin:end]
            kept.copy_(value)
            if kept.is_floating_point():
                _check_finite(kept, value, ids, column.name, column.dtype)
        self._ids.extend(ids)
        self._filled = end

    def close(self, number: int) -> None:
        """Writes the current shard as ``number`` and records it in the journal."""
        name = shard_name(number)
        entry: dict[str, Any] = {"file": name, "rows": 0, "bytes": 0, "sha256": "", "head": None}
        with explain_store_errors(self._folder, name):
            if self._ids:
                values = {column: rows[: self._filled] for column, rows in self._rows.items()}
                entry = write_shard(self._folder / name, self._ids, self._columns, values)
            if self._by_token:
                entry = {**entry, "pairs": self._pairs}
            self._note({"shard": number, **entry, "skipped": self._skipped})
        self._ids, self._skipped, self._filled, self._pairs = [], {}, 0, 0

    def end(self, rank: int, shards: int) -> None:
        """Records that this rank reached the end of its stream after ``shards`` shards in all."""
        with explain_store_errors(self._folder, self._journal.name):
            self._note({"rank": rank, "shards": shards})

    def _buffer(self, column: Column, rows: int) -> Tensor:
        """Room for ``rows`` rows of a column; of pairs for a whole shard, of tokens, whose number is not known, growing."""
        room = self._rows.get(column.name)
        if room is None or len(room) < rows:
            size = max(rows, 2 * len(room if room is not None else ())) if self._by_token else self._capacity
            grown = torch.empty(size, *column.shape, dtype=TORCH[column.dtype])
            if room is not None:
                grown[: self._filled].copy_(room[: self._filled])
            room = self._rows[column.name] = grown
        return room

    def _note(self, entry: Mapping[str, Any]) -> None:
        with self._journal.open("ab") as file:
            file.write(json.dumps({**entry, "check": _check_of(entry)}).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def _check_finite(kept: Tensor, value: Tensor, ids: Sequence[str], name: str, dtype: str) -> None:
    if bool(torch.isfinite(kept).all()):
        return
    bad = ~torch.isfinite(kept).flatten(1).all(1)
    first = int(bad.nonzero()[0])
    if bool(torch.isfinite(value[first]).all()):
        why = f"values up to {float(value[first].abs().max()):.3g} do not fit {dtype} (largest 65504); use fp32 or bf16"
    else:
        why = "check its image and text, or leave it out"
    raise NotFinite(
        f"{name}: NaN or infinity in {int(bad.sum())} of {len(ids)} rows of a batch, the first is pair {ids[first]!r}: "
        f"{why}. Finished shards are kept"
    )


class explain_store_errors:
    """Turns an ``OSError`` while writing into a StoreError that says which shards are safe and how to resume."""

    def __init__(self, folder: Path, what: str) -> None:
        self._folder, self._what = folder, what

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, fault: BaseException | None, trace: Any) -> None:
        if not isinstance(fault, OSError) or isinstance(fault, StoreError):
            return
        done = finished(self._folder)
        rows = sum(map(pairs_in, done.values()))
        full = fault.errno in (errno.ENOSPC, errno.EDQUOT)
        why = "the disk is full" if full else fault.__cause__ or fault
        raise StoreError(
            f"{self._folder}: {self._what} could not be written, {why} "
            f"(errno {fault.errno}). {len(done)} finished shards with {rows} pairs are kept; make room and repeat the "
            "call to resume"
        ) from fault
