"""Flipped bits anywhere in a store: `verify` finds every one, and reading gives the rows or an error of ours."""

from __future__ import annotations

import random
import shutil
import sys
from pathlib import Path

import torch

from mmhooks.data.sparse_rows import SparseRows
from mmhooks.data.store.check import verify
from mmhooks.data.store.store import Store
from mmhooks.errors import MMHooksError, StoreError

sys.path.insert(0, str(Path(__file__).parent))
from store_writing import write


def _read(folder: Path) -> dict[str, torch.Tensor]:
    store = Store(folder)
    rows = {site: store[site].tensor() for site in store.sites}
    _ = list(store.ids)
    return {site: x.dense() if isinstance(x, SparseRows) else x for site, x in rows.items()}


def test_flipped_bits(tmp_path, rounds):
    write(tmp_path / "whole")
    files = sorted(p.name for p in (tmp_path / "whole").iterdir())
    rng, refused, values = random.Random(0), 0, 0
    expected, n = _read(tmp_path / "whole"), rounds(40)
    for number in range(n):
        place = tmp_path / "flipped"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(tmp_path / "whole", place)
        name = rng.choice(files) if number % 4 else "data-00000.arrow"
        data = bytearray((place / name).read_bytes())
        at = (
            rng.randrange(len(data)) if number % 2 else rng.randrange(min(len(data), 1600))
        )  # heads and ids too
        data[at] ^= 1 << rng.randrange(8)
        (place / name).write_bytes(data)
        assert verify(place), (name, at)  # every flip is found
        try:
            Store(place, verify=True)
        except StoreError:
            pass
        else:
            raise AssertionError((name, at))
        try:
            found = _read(place)
        except MMHooksError:
            refused += 1
        else:  # values are not checked when they are read, shapes, ids and indices are
            values += any(not torch.equal(found[s], expected[s]) for s in expected)
            assert {s: x.shape for s, x in found.items()} == {s: x.shape for s, x in expected.items()}
    print(
        {"flips": n, "found by verify": n, "refused by reading": refused, "values read as they are": values}
    )
