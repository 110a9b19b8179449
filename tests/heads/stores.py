"""A store on disk with given vectors, as an extraction writes it."""

from __future__ import annotations

from pathlib import Path

import torch

from mmhooks.data.store import Store
from mmhooks.data.store.layout import SiteSpec
from mmhooks.data.store.lock import Lock
from mmhooks.data.store.writer import ShardWriter, begin, finish


def write_store(folder: Path, shard_rows: int = 150, **sites: torch.Tensor) -> Store:
    values = {name.replace("_", "."): x for name, x in sites.items()}
    specs = [SiteSpec(name, tuple(x.shape[1:]), "fp32") for name, x in values.items()]
    plan = {
        "model": {"name": "m", "weights": "w"},
        "sites": {spec.name: spec.to_json() for spec in specs},
        "data": {"name": "made up", "fingerprint": "made up", "pairs": None},
        "settings": {"shard_rows": shard_rows},
    }
    rows = len(next(iter(values.values())))
    folder.mkdir(parents=True)
    with Lock(folder):
        begin(folder, plan, {})
        writer = ShardWriter(folder)
        for number, start in enumerate(range(0, rows, shard_rows)):
            end = min(start + shard_rows, rows)
            writer.add([f"p{i}" for i in range(start, end)], {k: v[start:end] for k, v in values.items()}, {})
            writer.close(number)
        finish(folder)
    return Store(folder)
