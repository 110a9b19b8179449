"""Stages that several studies have, and how many pairs a study reads."""

from __future__ import annotations

import torch

from mmhooks.errors import MMHooksError
from mmhooks.studies.estimate import calls
from mmhooks.studies.estimate.stages import Stage

PAIRS = {"mini": 3_953, "coco": 5_000, "cc3m": 13_443}  # of the data sets that studies know by name
FLOAT = 4  # bytes of a stored number


def encoding(model: str, n: int, batch: int, dtype: str) -> list[Stage]:
    """Returns both towers over ``n`` pairs, and what the store of their embeddings takes."""
    kind, disk = as_dtype(dtype), FLOAT * n * calls.embed_dim(model)
    return [
        Stage("encoding, images", "images", n, calls.image_cost(model, batch, kind), batch, 1, dtype, disk),
        Stage("encoding, texts", "texts", n, calls.text_cost(model, batch, kind), batch, 1, dtype, disk),
    ]


def head_stages(
    width: int, features: int, n: int, epochs: int, heads: int, *, kinds: tuple[str, ...] = ("sae", "ncl"), k: int = 0
) -> list[Stage]:  # fmt: skip
    """Returns the training of ``heads`` heads of each kind on ``n`` pairs, in fp32 as all heads are."""
    found = []
    for kind in kinds:
        cost, batch = calls.head_cost(kind, width, features, k or min(32, features // 4))  # type: ignore[arg-type]
        found.append(Stage(f"training, {kind.upper()}", "pairs", heads * epochs * n, cost, batch))
    return found


def number_of_pairs(data: str, limit: int | None, given: int | None) -> int:
    """Returns how many pairs a study reads.

    Raises:
        MMHooksError: data whose size is not known without opening it.
    """
    known = given if given is not None else PAIRS.get(data, limit)
    if known is None:
        raise MMHooksError(
            f"--data {data}: expected a known number of pairs; give --pairs before the study's name, or --limit"
        )
    return known if limit is None else min(known, limit)


def as_dtype(name: str) -> torch.dtype:
    found = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise MMHooksError(f"--dtype: expected float32, bfloat16 or float16, got {name!r}")
    return found
