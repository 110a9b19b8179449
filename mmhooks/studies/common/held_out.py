"""Held-out pairs of a study, which no training saw, and the description of the data in ``results.json``."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

HELD_OUT_SPLITS = ("heldout_pictures", "heldout_concepts")


def sample_rows(rows: list[int], most: int, seed: int) -> list[int]:
    """Returns at most ``most`` of these rows, sampled at random and sorted."""
    return sorted(random.Random(seed).sample(rows, min(most, len(rows))))


def held_out_rows(pairs: Any, data: str, seed: int) -> list[int]:
    """Returns the held-out rows: mini's own held-out splits, for other data a seeded fifth.

    Raises:
        DataError: fewer than eight pairs.
    """
    import torch

    from mmhooks.errors import DataError

    rows = [i for i, split in enumerate(pairs.splits) if split in HELD_OUT_SPLITS] if data == "mini" else []
    if len(rows) < 2:
        order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed)).tolist()
        rows = sorted(order[: max(len(pairs) // 5, 2)])
    if len(pairs) < 8:
        raise DataError(
            f"expected at least 8 pairs, better a few thousand; got {len(pairs)} from {data!r}: give other --data"
        )
    return rows


def describe_data(
    pairs: Any, *, data: str, model: str, pretrained: str | None, heldout: int
) -> dict[str, Any]:
    """Describes the data and the model for ``results.json``; ``heldout`` counts pairs that no training saw."""
    name = {"mini": "OpenMoji drawings", "coco": "COCO 2017", "cc3m": "CC3M validation"}.get(
        data, Path(data).name
    )
    return {
        "name": name,
        "n": len(pairs),
        "heldout": heldout,
        "licence": str(pairs.licence),
        "fingerprint": str(pairs.fingerprint),
        "skipped": len(pairs.skipped),
        "attribution": str(pairs.attribution),
        "model": model + (f" ({pretrained})" if pretrained else ""),
    }
