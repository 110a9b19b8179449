"""Heads that a study uses: shipped, loaded by name, or trained by the study and cached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mmhooks as mm
from mmhooks.studies.common.encode import SIDES, Encoded, unit
from mmhooks.utils.digest import digest


def head_source(given: str | None, kind: str, model: str) -> str:
    """Returns where a head is loaded from: ``given``, else mini's own; empty if the study trains it."""
    if given == "train":
        return ""
    return given or (f"mini/{kind}" if model == "mini" else "")


def head_sources(sae: str | None, ncl: str | None, model: str) -> dict[str, str]:
    """Returns by kind where a study's heads are loaded from, empty to train one; ``ncl="none"`` leaves that out."""
    found = {"sae": head_source(sae, "sae", model), "ncl": head_source(ncl, "ncl", model)}
    return {"sae": found["sae"]} if ncl == "none" else found


def train_heads(
    encoded: Encoded, rows: Sequence[int], *, n: int, k: int, epochs: int, seed: int, cache: Path
) -> dict[str, Any]:
    """Trains an SAE, of which at most a quarter is active, and an NCL head; both are cached for the next run."""
    image, text = (unit(encoded.vectors(side, list(rows))) for side in SIDES)
    d = image.shape[1]
    k = min(k, n // 4)
    heads = {"sae": mm.TopKSAE(d, n, k), "ncl": mm.NCL(d, n)}
    made_by = digest(d, n, k, epochs, seed, image, text)[:20]
    return {
        kind: load_or_train_head(cache / f"{kind}-{made_by}", head, image, text, epochs=epochs, seed=seed)
        for kind, head in heads.items()
    }


def load_or_train_head(
    folder: Path, head: Any, image: Tensor, text: Tensor, *, epochs: int, seed: int
) -> Any:
    """Loads the head in ``folder``; where there is none, trains ``head`` and saves it there first."""
    if not (folder / "config.json").exists():
        torch.manual_seed(seed)
        mm.train_head(head, image, text, epochs=epochs, seed=seed)
        head.save(folder)
    return mm.load_head(str(folder))


def load_heads(
    encoded: Encoded,
    rows: Sequence[int],
    sources: Mapping[str, str],
    *,
    n: int,
    k: int,
    epochs: int,
    seed: int,
    cache: Path,
) -> dict[str, Any]:
    """Loads the heads by kind, "sae" and "ncl"; those without a source are trained.

    Args:
        rows: pairs that a head may be trained on.
        sources: by kind a name, directory or Hub id; empty to train it.
    """
    trained: dict[str, Any] = {}
    if not all(sources.values()):
        trained = train_heads(encoded, rows, n=n, k=k, epochs=epochs, seed=seed, cache=cache)
    return {kind: mm.load_head(source) if source else trained[kind] for kind, source in sources.items()}
