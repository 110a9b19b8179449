"""Reads rows with the loader of ``saev`` 0.1; run by ``test_store.py`` in an interpreter that has it.

``python saev_loaders.py ROWS.npy BATCH SHARE``: writes the rows as a saev shard, checks the first batch against
them, and prints seconds for ``SHARE`` of all rows, in order and shuffled, as JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from saev.activations import Dataset, Metadata
from saev.config import DataLoad


def main(file: str, batch: int, share: float) -> None:
    torch.set_num_threads(1)
    rows = np.load(file, mmap_mode="r")
    n, d = rows.shape
    with tempfile.TemporaryDirectory(dir=Path(file).parent) as root:
        rows.tofile(Path(root) / "acts000000.bin")
        Metadata("none", "none", (0,), 0, True, d, 0, n, n, "random").dump(f"{root}/metadata.json")
        options = {"shard_root": root, "patches": "cls", "layer": 0, "scale_mean": False, "scale_norm": False}
        data = Dataset(DataLoad(**options))
        seconds = {}
        for name, shuffle in (("in order", False), ("shuffled", True)):
            loader = torch.utils.data.DataLoader(data, batch_size=batch, num_workers=0, shuffle=shuffle)
            batches = iter(loader)
            first = next(batches)
            assert np.array_equal(first["act"].numpy(), rows[first["image_i"].numpy()])
            count = max(1, round(share * n / batch))
            start = time.perf_counter()
            for _ in range(count):
                next(batches)
            seconds[name] = (time.perf_counter() - start) / (count * batch) * n * share
        print(json.dumps(seconds))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
