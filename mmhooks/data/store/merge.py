"""Merging of stores: shards are linked, not copied."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any

from mmhooks.data.store.check import repeated_id, verify
from mmhooks.data.store.layout import (
    INFO,
    MANIFEST,
    STATE,
    dataset_files,
    differences,
    is_by_token,
    manifest_bytes,
    pairs_in,
    shard_name,
)
from mmhooks.data.store.lock import LOCK_FILE, Lock
from mmhooks.data.store.schema import BY_PAIR, BY_TOKEN, SHARD_NAME
from mmhooks.data.store.store import Store
from mmhooks.errors import StoreError
from mmhooks.utils.files import PARTS, explain_os_errors, make_folder, sync_folder, write_atomic, write_bytes

_EQUAL = ("model", "sites", "content")  # manifest entries that stores to be merged must share
# Where a merge is built; what an interrupted merge leaves there is removed by the next one.
_ASIDE = ".merging"


def merge(stores: Sequence[str | Path], out: str | Path) -> Store:
    """Merges stores of the same sites and model into one, with pairs in the order given.

    Everything is checked before anything is written. Shards are hard links if the file system supports them, else
    copies. The store is built in a folder inside ``out`` and moved up with the manifest last, so an interrupted merge
    leaves no store and can be repeated.

    Raises:
        StoreError: no store, an unfinished or faulty one, different sites, models or precision, a pair contained in two
            of them, or an ``out`` that is not empty.
        CannotWrite: the disk is full, or ``out`` cannot be written.

    >>> merge(["runs/part-0", "runs/part-1"], "runs/acts")            # doctest: +SKIP
    """
    places = [Path(s).expanduser().resolve() for s in stores]
    target = Path(out).expanduser().resolve()  # a link to a folder is that folder
    if not places:
        raise StoreError("expected at least one store to merge, got none")
    manifests = _checked(places)
    whole = _joined(manifests)
    files = dataset_files(whole) | {MANIFEST: manifest_bytes(whole)}
    make_folder(target)
    with Lock(target), explain_os_errors(target):
        if not _is_done(target, files):
            _clear(target)
            aside = make_folder(target / _ASIDE)
            sources = (
                p / entry["file"] for p, m in zip(places, manifests, strict=True) for entry in m["shards"]
            )
            for source, entry in zip(sources, whole["shards"], strict=True):
                _link(source, aside / entry["file"])
            sync_folder(aside)
            for entry in whole["shards"]:
                (aside / entry["file"]).replace(target / entry["file"])
            for name, content in files.items():  # the manifest is the last
                write_bytes(target / name, content)
        shutil.rmtree(target / _ASIDE, ignore_errors=True)
    return Store(target)


def _checked(places: Sequence[Path]) -> list[Mapping[str, Any]]:
    """The manifests, after checking that the stores are compatible, without faults, and share no pair."""
    opened = [Store(place) for place in places]
    manifests = [store.manifest for store in opened]
    for place, manifest in zip(places[1:], manifests[1:], strict=True):
        faults = [d for key in _EQUAL for d in differences(manifest.get(key), manifests[0].get(key), key)]
        ours, theirs = (
            {k: m["settings"].get(k) for k in ("tokens", "grid")} for m in (manifest, manifests[0])
        )
        faults += differences(ours, theirs, "settings")
        if faults:
            raise StoreError(f"{place} cannot be merged with {places[0]}: {'; '.join(faults[:4])}")
    for place in places:
        faults = verify(place)
        if faults:
            raise StoreError(
                f"{place} has {len(faults)} faults, the first: {faults[0]}; repair it before merging"
            )
    shared = repeated_id(chain.from_iterable(store.pairs.ids.chunks for store in opened))
    if shared is not None:
        raise StoreError(f"the stores share pairs: {shared}; every pair needs its own id")
    return manifests


def _is_done(target: Path, files: Mapping[str, bytes]) -> bool:
    """Whether an earlier call has completed the same merge, except for cleaning up."""
    if not (target / MANIFEST).is_file() or (target / MANIFEST).read_bytes() != files[MANIFEST]:
        return False
    return not [fault for fault in verify(target) if fault.file not in (_ASIDE, LOCK_FILE)]


def _clear(target: Path) -> None:
    """Removes what an interrupted merge left; raises if ``target`` contains anything else."""
    left = [p for p in target.iterdir() if p.name != LOCK_FILE]
    broken_off = (target / _ASIDE).is_dir() and not (target / MANIFEST).exists()
    ours = [
        p for p in left if SHARD_NAME.fullmatch(p.name) or p.name in (INFO, STATE, _ASIDE) or p.match(PARTS)
    ]
    if left and not (broken_off and len(ours) == len(left)):
        raise StoreError(f"{target} is not empty; merge into a new folder")
    for path in left:
        if path.name == _ASIDE:
            continue
        path.unlink()
    shutil.rmtree(target / _ASIDE, ignore_errors=True)


def _link(source: Path, target: Path) -> None:
    source = source.resolve()  # a hard link to a relative symlink would dangle
    try:
        os.link(source, target)
    except OSError:
        with source.open("rb") as file:
            write_atomic(target, lambda copy: shutil.copyfileobj(file, copy))


def _joined(manifests: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    data = [manifest["data"] for manifest in manifests]
    marks = json.dumps([d["fingerprint"] for d in data])
    entries = [entry for manifest in manifests for entry in manifest["shards"]]
    shards = [{**entry, "file": shard_name(number)} for number, entry in enumerate(entries)]
    rows = sum(map(pairs_in, shards))
    skipped = {key: why for manifest in manifests for key, why in manifest["skipped"].items()}
    return {
        **manifests[0],
        "format": BY_TOKEN if is_by_token(manifests[0]) else BY_PAIR,
        "data": {
            **data[0],
            "name": " + ".join(dict.fromkeys(d["name"] for d in data)),
            "fingerprint": sha256(marks.encode()).hexdigest()[:20],
            "pairs": rows + len(skipped),
        },
        "pairs": rows,
        "skipped": skipped,
        "shards": shards,
        "merged": data,
    }
