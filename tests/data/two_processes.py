"""Run under torchrun: extracts the same pairs map-style and as a stream; ``two_processes.py PAIRS OUT``."""

from __future__ import annotations

import sys

import torch
from tiny import tiny_clip

import mmhooks as mm

if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, table, out = sys.argv[1:]
    options = {"batch_size": 4, "shard_rows": 8, "workers": 0, "progress": False}
    store = mm.extract(tiny_clip(), mm.data.pairs(folder, progress=False), out=f"{out}/pairs", **options)
    assert len(store) == 41
    stream = mm.data.pair_stream(f"{table}/*.parquet")
    store = mm.extract(tiny_clip(), stream, out=f"{out}/stream", **options)
    assert len(store) == 41
    try:
        mm.extract(tiny_clip(seed=1), stream, out=f"{out}/stream", **options)
    except mm.errors.StoreError as fault:  # every rank is told what rank 0 found
        assert "model.weights" in str(fault)
    else:
        raise AssertionError("another model was let in")
