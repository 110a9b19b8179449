"""Rows by token written to disk and read back shuffled: our store, or the newest saev, each in an interpreter that has it.

    python benchmarks/token_loaders.py rows FOLDER         # 2,048 images of 49 patches of width 768, 308 MB
    python benchmarks/token_loaders.py ours FOLDER
    PYTHONPATH=saev/src python3.12 benchmarks/token_loaders.py saev FOLDER    # a checkout of OSU-NLP-Group/saev

Wall time, one thread of torch; saev reads by threads of another process, so both are given: with one and two threads. Each first
compares a batch with the rows.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

IMAGES, TOKENS, WIDTH, BATCH = 2048, 49, 768, 4096


def rows_of(folder: Path) -> np.ndarray:
    return np.load(folder / "rows.npy", mmap_mode="r")


def read(batches: Iterable[Any], count: Any) -> dict[str, float]:
    """Rows a second after the first batch, and seconds until it."""
    begin, seen, first = time.perf_counter(), 0, 0.0
    for batch in batches:
        if not first:
            first = time.perf_counter() - begin
        seen += count(batch)
    seconds = time.perf_counter() - begin
    return {"rows": seen, "rows/s": seen / seconds, "seconds to the first batch": first}


def ours(folder: Path) -> dict[str, Any]:
    from mmhooks.data.store import Store
    from mmhooks.data.store.layout import SiteSpec
    from mmhooks.data.store.lock import Lock
    from mmhooks.data.store.writer import ShardWriter, begin, finish

    rows, out = rows_of(folder), folder / "ours"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    plan = {
        "model": {"name": "made"},
        "sites": {"x": SiteSpec("x", (WIDTH,), "fp32").to_json()},
        "data": {"name": "made", "pairs": IMAGES},
        "content": {},
        "settings": {"shard_rows": 512, "tokens": "patch"},
    }
    start = time.perf_counter()
    with Lock(out):
        begin(out, plan, {})
        writer = ShardWriter(out)
        for i in range(0, IMAGES, 64):
            part = torch.from_numpy(np.array(rows[i * TOKENS : (i + 64) * TOKENS]))
            numbers = torch.arange(TOKENS, dtype=torch.int32).repeat(64)
            writer.add([f"p{j}" for j in range(i, i + 64)], {"x": part, "token": numbers}, {}, [TOKENS] * 64)
            if (i + 64) % 512 == 0:
                writer.close(i // 512)
        finish(out)
    wrote = time.perf_counter() - start
    store = Store(out)
    assert torch.equal(store["x"][1000:1010], torch.from_numpy(np.array(rows[1000:1010])))
    return {
        "write, s": wrote,
        **{
            f"epoch {n}": read(store.batches(BATCH, shuffle=True, epoch=n), lambda b: len(b["x"]))
            for n in (0, 1)
        },
    }


def saev(folder: Path) -> dict[str, Any]:
    from saev.data import shards, shuffled

    rows = rows_of(folder).reshape(IMAGES, 1, TOKENS, WIDTH)
    shutil.rmtree(folder / "saev", ignore_errors=True)
    root = folder / "saev" / "shards"
    root.mkdir(parents=True)
    about = shards.Metadata(
        family="clip", ckpt="made", layers=(0,), content_tokens_per_example=TOKENS, cls_token=False, d_model=WIDTH,
        n_examples=IMAGES, max_tokens_per_shard=TOKENS * 512, data="", dataset=folder,
    )  # fmt: skip
    about.dump(root)
    start = time.perf_counter()
    with shards.ShardWriter(root, about) as writer:
        for i in range(0, IMAGES, 64):
            writer.write_batch(torch.from_numpy(np.array(rows[i : i + 64])), i)
    found: dict[str, Any] = {"write, s": time.perf_counter() - start}
    for threads in (1, 2):
        config = shuffled.Config(shards=root / about.hash, layer=0, batch_size=BATCH, n_threads=threads)
        batch = next(iter(shuffled.DataLoader(config)))
        places = zip(batch["example_idx"].tolist(), batch["token_idx"].tolist(), strict=True)
        assert np.array_equal(batch["act"].numpy(), np.stack([rows[i, 0, t] for i, t in places]))
        found[f"{threads} threads"] = read(shuffled.DataLoader(config), lambda b: len(b["act"]))
    return found


def main(what: str, folder: Path) -> None:
    torch.set_num_threads(1)
    if what == "rows":
        folder.mkdir(parents=True, exist_ok=True)
        made = np.random.default_rng(0).standard_normal((IMAGES * TOKENS, WIDTH), dtype=np.float32)
        np.save(folder / "rows.npy", made)
        return
    print(json.dumps({"ours": ours, "saev": saev}[what](folder), indent=1))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
