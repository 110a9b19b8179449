"""One store of several: shards are linked, not written again."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from mmhooks.data.store.check import verify
from mmhooks.data.store.layout import MANIFEST, dataset_files, differences, sealed, shard_name
from mmhooks.data.store.lock import Lock
from mmhooks.data.store.store import Store
from mmhooks.data.store.writer import guarded
from mmhooks.errors import StoreError
from mmhooks.utils.files import write_bytes, write_whole


def merge(stores: Sequence[str | Path], out: str | Path) -> Store:
    """The pairs of several stores of the same sites and model as one, in the order given.

    Shards are hard links where the file system has them and copies elsewhere; the manifest comes last, so that
    a merge that was broken off leaves no store, and can be repeated.

    Raises:
        StoreError: no store, an unfinished or faulty one, different sites, models or precision, a pair that two
            of them hold, or an ``out`` that is not empty.

    >>> merge(["runs/part-0", "runs/part-1"], "runs/acts")            # doctest: +SKIP
    """
    places, target = [Path(s).expanduser() for s in stores], Path(out).expanduser()
    if not places:
        raise StoreError("nothing to merge: name at least one store")
    manifests = [Store(place).manifest for place in places]
    for place, manifest in zip(places[1:], manifests[1:], strict=True):
        faults = [d for key in ("model", "sites") for d in differences(manifest[key], manifests[0][key], key)]
        if faults:
            raise StoreError(f"{place} does not go with {places[0]}: {'; '.join(faults[:4])}")
    if target.exists() and any(target.iterdir()):
        raise StoreError(f"{target} is not empty; merge into a new folder")
    for place in places:
        faults = verify(place)
        if faults:
            raise StoreError(f"{place} has {len(faults)} faults, the first: {faults[0]}; merge sound stores")
    target.mkdir(parents=True, exist_ok=True)
    with Lock(target), guarded(target, "the merged store"):
        shards: list[dict[str, Any]] = []
        for place, manifest in zip(places, manifests, strict=True):
            for entry in manifest["shards"]:
                name = shard_name(len(shards))
                _link(place / entry["file"], target / name)
                shards.append({**entry, "file": name})
        whole = _joined(manifests, shards)
        for name, content in dataset_files(whole).items():
            write_bytes(target / name, content)
        write_bytes(target / MANIFEST, sealed(whole))
    repeated = [fault for fault in verify(target) if fault.kind == "repeated id"]
    if repeated:
        shutil.rmtree(target)
        raise StoreError(f"the stores share pairs: {repeated[0].detail}; every pair needs its own id")
    return Store(target)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        write_whole(target, lambda file: shutil.copyfileobj(source.open("rb"), file))


def _joined(manifests: Sequence[Any], shards: list[dict[str, Any]]) -> dict[str, Any]:
    data = [manifest["data"] for manifest in manifests]
    marks = json.dumps([d["fingerprint"] for d in data])
    return {
        **manifests[0],
        "data": {
            **data[0],
            "name": " + ".join(dict.fromkeys(d["name"] for d in data)),
            "fingerprint": sha256(marks.encode()).hexdigest()[:20],
            "pairs": sum(entry["rows"] for entry in shards),
        },
        "pairs": sum(entry["rows"] for entry in shards),
        "skipped": {key: why for manifest in manifests for key, why in manifest["skipped"].items()},
        "shards": shards,
        "merged": data,
    }
