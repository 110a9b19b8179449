"""Writing a store: shards whole or not at all, a journal of the finished ones, and the manifest at the end.

While a store is written its manifest says what is being written and ``"complete": false``; every rank notes
its finished shards in a journal of its own. A run that comes later leaves the noted shards alone. Which rows a
shard holds follows from the settings, so a resumed store has the bytes of an unbroken one.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
    columns_of,
    dataset_files,
    differences,
    read_manifest,
    sealed,
    shard_name,
    specs_of,
)
from mmhooks.data.store.lock import NAME as LOCK
from mmhooks.data.store.schema import FORMAT, check_count, is_entry
from mmhooks.data.store.shard import write_shard
from mmhooks.errors import NotFinite, ShapeMismatch, StoreError
from mmhooks.utils.files import PARTS, sync_folder, wrapped, write_bytes

JOURNALS = ".journal-*.jsonl"
PLAN = ("model", "sites", "data", "settings", "content")


def begin(folder: Path, plan: Mapping[str, Any], versions: Mapping[str, str]) -> bool:
    """Opens ``folder`` for this plan, new or where an earlier run stopped; True where it is finished already.

    Called by one process, which holds the :class:`~mmhooks.data.store.lock.Lock`, before any other writes.

    Raises:
        StoreError: the folder holds a store of another plan, one of an older format, or other files; or it was begun
            with other versions and is not finished.
    """
    if not (folder / MANIFEST).exists():
        others = [p.name for p in folder.iterdir() if p.name != LOCK and not p.match(PARTS)]
        if others:
            raise StoreError(
                f"{folder} is not empty (it holds {', '.join(sorted(others)[:3])}) and no store; choose a new folder"
            )
        head = {"format": FORMAT, "complete": False, **plan, "versions": dict(versions), "shards": []}
        with guarded(folder, "its manifest"):
            write_bytes(folder / MANIFEST, sealed(head))
        return False
    manifest = read_manifest(folder)
    if manifest["format"] < FORMAT:
        raise StoreError(
            f"{folder} holds a store of format {manifest['format']}, which does not say enough to know whether its rows "
            f"are those of this call{'; mm.Store still opens it' if manifest['complete'] else ''}: choose another folder"
        )
    now = json.loads(json.dumps(plan))
    faults = differences({k: now.get(k) for k in PLAN}, {k: manifest.get(k) for k in PLAN})
    if faults:
        raise StoreError(
            f"{folder} was begun with other settings: {'; '.join(faults[:4])}{'; …' if len(faults) > 4 else ''}. "
            "Go on with the same ones, or choose another folder"
        )
    if manifest["complete"]:
        _tidy(folder)
        return True
    faults = differences(json.loads(json.dumps(versions)), manifest["versions"])
    if faults:
        raise StoreError(
            f"{folder} was begun with other versions ({'; '.join(faults)}) and is not finished: its rows would be a "
            "mixture. Go on with the same versions, or choose another folder"
        )
    for part in folder.glob(PARTS):
        part.unlink(missing_ok=True)
    return False


def finished(folder: Path) -> dict[int, dict[str, Any]]:
    """The shards that the journals note and that are there in their full size: number -> entry."""
    found: dict[int, dict[str, Any]] = {}
    for entry in _notes(folder):
        if is_entry(entry):
            path = folder / entry["file"]
            if entry["rows"] == 0 or (path.is_file() and path.stat().st_size == entry["bytes"]):
                found[entry["shard"]] = entry
    return found


def _notes(folder: Path) -> Iterator[dict[str, Any]]:
    """What the journals note. Lines that were cut off or damaged count as never written: their shards come again."""
    for journal in sorted(folder.glob(JOURNALS)):
        for line in journal.read_bytes().split(b"\n")[:-1]:  # what follows the last newline was cut off
            with suppress(ValueError, RecursionError):
                note = json.loads(line)
                if isinstance(note, dict) and note.pop("check", None) == _check_of(note):
                    yield note


def _check_of(note: Mapping[str, Any]) -> str:
    return sha256(json.dumps(note).encode()).hexdigest()[:16]


def finish(folder: Path, *, ranks: int | None = None) -> None:
    """Makes the store whole: the files for ``datasets``, then the manifest. Safe to repeat after a kill.

    Called by one process, when all ranks have written their shards.

    Args:
        ranks: how many processes read a stream, each of which has noted its end.

    Raises:
        StoreError: rows are missing that the source has; nothing is marked as complete then.
    """
    manifest, found = read_manifest(folder), finished(folder)
    _check_whole(folder, manifest, found, ranks)
    entries = [entry for _, entry in sorted(found.items())]
    keys = ("file", "rows", "bytes", "sha256", "head")
    shards = [{k: entry[k] for k in keys} for entry in entries if entry["rows"]]
    skipped = {key: why for entry in entries for key, why in entry["skipped"].items()}
    whole = {
        **manifest,
        "complete": True,
        "pairs": sum(s["rows"] for s in shards),
        "skipped": skipped,
        "shards": shards,
    }
    check_count(whole, folder / MANIFEST)
    with guarded(folder, "its manifest"):
        for name, content in dataset_files(whole).items():
            write_bytes(folder / name, content)
        write_bytes(folder / MANIFEST, sealed(whole))
    _tidy(folder)


def _check_whole(
    folder: Path, manifest: Mapping[str, Any], found: Mapping[int, Mapping[str, Any]], ranks: int | None
) -> None:
    """Raises StoreError where shards are missing or hold fewer rows than the source has for them."""
    total, size = manifest["data"].get("pairs"), manifest["settings"]["shard_rows"]
    if total is not None:
        expected = {n: min(size, total - n * size) for n in range(-(-total // size))}
        short = [n for n, rows in expected.items() if n in found and _counted(found[n]) != rows]
        missing = [n for n in expected if n not in found]
    else:
        ends = {note["rank"]: note["shards"] for note in _notes(folder) if "rank" in note}
        silent = [rank for rank in range(ranks or 0) if rank not in ends]
        if silent:
            raise StoreError(
                f"{folder} is not complete: rank {silent[0]} of {ranks} has not noted that it came to the end of its "
                "stream; the same call goes on from the shards that are there"
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
            f"{folder} is not complete: {len(missing)} shards are missing and {len(short)} short ({names}), though all "
            "were written: a journal or a shard was changed or removed meanwhile. What is there stays; "
            f"{remedy} the same call, it writes the rest again"
        )


def _counted(entry: Mapping[str, Any]) -> int:
    return entry["rows"] + len(entry["skipped"])


def _tidy(folder: Path) -> None:
    for pattern in (JOURNALS, PARTS):
        for path in folder.glob(pattern):
            with suppress(OSError):  # a finished store may lie in a folder that is read-only by now
                path.unlink(missing_ok=True)
    sync_folder(folder)


class ShardWriter:
    """Collects the rows of one rank's shards and writes each when it is full.

    ``add`` takes batches in the order of shards; ``close`` ends the shard that is open.

    Raises:
        ShapeMismatch: rows of another shape than the manifest's.
        NotFinite: NaN or infinity, also by the conversion to fp16; the message names the pair.
        StoreError: the disk is full or cannot be written; shards that are finished stay.
    """

    def __init__(self, folder: Path, *, rank: int = 0) -> None:
        manifest = read_manifest(folder)
        self._folder, self._specs = folder, specs_of(manifest)
        self._columns = columns_of(self._specs.values())
        self._capacity = int(manifest["settings"]["shard_rows"])
        self._journal = folder / f".journal-{rank:05d}.jsonl"
        if self._journal.exists():
            with wrapped(self._journal), self._journal.open("rb+") as file:
                file.truncate(file.read().rfind(b"\n") + 1)  # drops a line that a kill cut off
        self._ids: list[str] = []
        self._skipped: dict[str, str] = {}
        self._rows: dict[str, Tensor] = {}
        self._filled = 0

    def add(
        self,
        ids: Sequence[str],
        columns: Mapping[str, Shaped[Tensor, "..."]],
        skipped: Mapping[str, str],
    ) -> None:
        """Appends rows to the open shard: ``columns`` by the names that the manifest's sites give."""
        self._skipped |= skipped
        if not ids:
            return
        begin, end = self._filled, self._filled + len(ids)
        if end > self._capacity:
            raise ShapeMismatch(f"{end} rows for a shard of {self._capacity}")
        for column in self._columns:
            value = columns[column.name]
            if tuple(value.shape) != (len(ids), *column.shape):
                raise ShapeMismatch(
                    f"site {column.name!r} gave rows of shape {tuple(value.shape[1:])} ({len(value)} for {len(ids)} "
                    f"pairs), the store keeps {column.shape}; a store holds one shape a site"
                )
            kept = self._room(column.name, column.shape, column.dtype)[begin:end]
            kept.copy_(value)
            if kept.is_floating_point():
                _check_finite(kept, value, ids, column.name, column.dtype)
        self._ids.extend(ids)
        self._filled = end

    def close(self, number: int) -> None:
        """Writes the open shard as ``number`` and notes it in the journal."""
        name = shard_name(number)
        entry: dict[str, Any] = {"file": name, "rows": 0, "bytes": 0, "sha256": "", "head": None}
        with guarded(self._folder, name):
            if self._ids:
                values = {column: rows[: self._filled] for column, rows in self._rows.items()}
                entry = write_shard(self._folder / name, self._ids, self._columns, values)
            self._note({"shard": number, **entry, "skipped": self._skipped})
        self._ids, self._skipped, self._filled = [], {}, 0

    def end(self, rank: int, shards: int) -> None:
        """Notes that this rank came to the end of its stream, after so many shards in all."""
        with guarded(self._folder, self._journal.name):
            self._note({"rank": rank, "shards": shards})

    def _room(self, name: str, shape: tuple[int, ...], dtype: str) -> Tensor:
        if name not in self._rows:
            self._rows[name] = torch.empty(self._capacity, *shape, dtype=TORCH[dtype])
        return self._rows[name]

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
        why = "look at its picture and text, or leave it out"
    raise NotFinite(
        f"{name}: NaN or infinity in {int(bad.sum())} of {len(ids)} rows of a batch, the first is pair {ids[first]!r}: "
        f"{why}. Shards that were finished before are kept"
    )


class guarded:
    """A disk that is full or cannot be written becomes an error that says what is safe and how to go on."""

    def __init__(self, folder: Path, what: str) -> None:
        self._folder, self._what = folder, what

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, fault: BaseException | None, trace: Any) -> None:
        if not isinstance(fault, OSError) or isinstance(fault, StoreError):
            return
        done = finished(self._folder)
        rows = sum(entry["rows"] for entry in done.values())
        full = fault.errno in (errno.ENOSPC, errno.EDQUOT)
        why = "the disk is full" if full else fault.__cause__ or fault
        raise StoreError(
            f"{self._folder}: {self._what} could not be written, {why} "
            f"(errno {fault.errno}). {len(done)} shards with {rows} pairs are whole and stay; make room and run the "
            "same call again, it goes on from there"
        ) from fault


def numbers(total: int, shard_rows: int, rank: int, world: int) -> Iterable[int]:
    """The shards of a rank: every ``world``-th, so that rows lie where one process would put them."""
    return range(rank, -(-total // shard_rows), world)
