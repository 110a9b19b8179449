"""The pairs of a study that no training saw: how they are chosen, and what is said of them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

Heldout = ("heldout_pictures", "heldout_concepts")


def choose(rows: list[int], most: int, seed: int) -> list[int]:
    """At most so many of these rows, at random, in order."""
    return sorted(random.Random(seed).sample(rows, min(most, len(rows))))


def settle(pairs: Any, data: str, seed: int) -> list[int]:
    """The rows that no training saw: of mini its own held-out splits, else a seeded fifth.

    Raises:
        DataError: fewer than eight pairs.
    """
    import torch

    from mmhooks.errors import DataError

    rows = [i for i, split in enumerate(pairs.splits) if split in Heldout] if data == "mini" else []
    if len(rows) < 2:
        order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed)).tolist()
        rows = sorted(order[: max(len(pairs) // 5, 2)])
    if len(pairs) < 8:
        raise DataError(
            f"{data!r} has {len(pairs)} pairs; the study needs at least 8, sensibly a few thousand"
        )
    return rows


def about(pairs: Any, *, data: str, model: str, pretrained: str | None, heldout: int) -> dict[str, Any]:
    """What ``results.json`` says of the data and the model; ``heldout`` counts pairs that no training saw."""
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
