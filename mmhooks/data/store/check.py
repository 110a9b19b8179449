"""Verification and summary of a store: every fault of its files, and what it contains."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mmhooks.data.store.layout import (
    MANIFEST,
    columns_in,
    dataset_files,
    is_by_token,
    pairs_in,
    read_manifest,
    specs_of,
)
from mmhooks.data.store.pair_runs import run_starts
from mmhooks.data.store.shard import Shard
from mmhooks.data.store.writer import finished
from mmhooks.errors import StoreError
from mmhooks.utils.files import sha256_of
from mmhooks.utils.progress import track


@dataclass(frozen=True)
class Fault:
    """A fault of one file of a store, or of its ids."""

    file: str
    kind: Literal["missing", "truncated", "altered", "unreadable", "surplus", "unfinished", "repeated id"]
    detail: str

    def __str__(self) -> str:
        return f"{self.file}: {self.kind}, {self.detail}"


def verify(folder: str | Path, *, progress: bool = False) -> list[Fault]:
    """Every fault of the store in ``folder``, an empty list if there is none. Reads every byte.

    Raises:
        StoreError: no store there. An altered manifest is reported as the only fault, since the rest depends on it.
    """
    place = Path(folder).expanduser()
    if not (place / MANIFEST).exists():
        read_manifest(place)  # raises
    try:
        manifest = read_manifest(place)
    except StoreError as fault:
        return [Fault(MANIFEST, "altered", str(fault))]
    entries = manifest["shards"] if manifest["complete"] else _journal_entries(place)
    faults = [] if manifest["complete"] else [_unfinished(manifest, entries)]
    columns = columns_in(manifest)
    whole = []
    for entry in track(entries, len(entries), f"verifying {place.name}", show=progress):
        fault = _shard_fault(place, entry)
        if fault is not None:
            faults.append(fault)
            continue
        try:
            shard = Shard(place / entry["file"], entry, columns)
            _ = shard.ids, [shard.tensor(column.name) for column in columns]
            whole.append(shard)
        except StoreError as broken:  # the file is intact, so the manifest is at fault
            faults.append(Fault(entry["file"], "altered", str(broken)))
    known = {MANIFEST, *(entry["file"] for entry in entries)}
    if manifest["complete"]:
        derived = dataset_files(manifest)
        known |= derived.keys()
        for name, content in derived.items():
            if not (place / name).is_file():
                faults.append(
                    Fault(name, "missing", "datasets needs it; repeat the mm.extract call to write it again")
                )
            elif (place / name).read_bytes() != content:
                faults.append(Fault(name, "altered", "it does not match the manifest"))
        surplus = sorted(p.name for p in place.iterdir() if p.name not in known)
        faults += [Fault(name, "surplus", "it is not in the manifest") for name in surplus]
    return [*faults, *_repeated(whole, is_by_token(manifest))]


def _shard_fault(place: Path, entry: Mapping[str, Any]) -> Fault | None:
    path = place / entry["file"]
    rows = f"its {entry['rows']} rows"
    if not path.is_file():
        return Fault(path.name, "missing", f"{rows} are lost")
    try:
        size, found = path.stat().st_size, sha256_of(path)
    except OSError as fault:
        return Fault(path.name, "unreadable", f"{fault.strerror}; {rows} cannot be checked")
    if size != entry["bytes"]:
        kind = "truncated" if size < entry["bytes"] else "altered"
        return Fault(path.name, kind, f"{size} bytes, the manifest says {entry['bytes']}")
    if found != entry["sha256"]:
        return Fault(path.name, "altered", f"sha256 {found[:16]}…, the manifest says {entry['sha256'][:16]}…")
    return None


def _repeated(shards: list[Shard], by_token: bool) -> Iterator[Fault]:
    said = repeated_id((run_starts(shard.ids)[1] if by_token else shard.ids) for shard in shards)
    if said is not None:
        yield Fault(MANIFEST, "repeated id", said)


def repeated_id(chunks: Iterable[Any]) -> str | None:
    """A message with the number of duplicate ids in these Arrow arrays and the first of them; None if there is none."""
    import pyarrow as pa
    import pyarrow.compute

    pc: Any = pyarrow.compute  # its functions are created at run time
    counts = pc.value_counts(pa.chunked_array(list(chunks), pa.string()).cast(pa.large_string()))
    twice = counts.filter(pc.greater(counts.field("counts"), 1))
    if not len(twice):
        return None
    first = twice[0].as_py()
    return (
        f"{len(twice)} ids occur more than once, the first is {first['values']!r} ({first['counts']} times)"
    )


def _journal_entries(place: Path) -> list[dict[str, Any]]:
    return [entry for _, entry in sorted(finished(place).items()) if entry["rows"]]


def _unfinished(manifest: Mapping[str, Any], entries: list[dict[str, Any]]) -> Fault:
    rows, total = sum(map(pairs_in, entries)), manifest["data"].get("pairs")
    return Fault(
        MANIFEST, "unfinished", f"{rows} {f'of {total} ' if total else ''}pairs are written in {len(entries)} shards; "
        "repeat the mm.extract call to resume",
    )  # fmt: skip


def summary(folder: str | Path) -> dict[str, Any]:
    """A summary of a store's contents, finished or not."""
    place = Path(folder).expanduser()
    manifest = read_manifest(place)
    entries = manifest["shards"] if manifest["complete"] else _journal_entries(place)
    specs = specs_of(manifest)
    return {
        "complete": manifest["complete"],
        "pairs": sum(map(pairs_in, entries)),
        "of": manifest["data"].get("pairs"),
        **({"rows": sum(entry["rows"] for entry in entries)} if is_by_token(manifest) else {}),
        "skipped": len(manifest.get("skipped", {})),
        "shards": len(entries),
        "bytes": sum(entry["bytes"] for entry in entries),
        "model": manifest["model"],
        "data": manifest["data"],
        "sites": {
            name: {
                "row": list(spec.shape),
                "kept as": f"{spec.sparse} of {spec.shape[0]} entries"
                if spec.sparse is not None
                else "dense",
                "dtype": spec.dtype,
                "bytes a row": sum(column.row_bytes for column in spec.columns()),
                **({"head": spec.head} if spec.head else {}),
            }
            for name, spec in specs.items()
        },
        "settings": manifest["settings"],
        "versions": manifest["versions"],
    }
