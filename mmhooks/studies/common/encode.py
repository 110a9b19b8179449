"""Raw embeddings of all pairs of a study by both towers, computed once and cached between runs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

import mmhooks as mm
from mmhooks.models.provenance import weights_hash
from mmhooks.utils.digest import digest

SIDES = ("image", "text")
SITES = ("image.embed", "text.embed")


@dataclass(frozen=True)
class Encoded:
    """A model with its embeddings of all pairs.

    Attributes:
        store: one row per pair, at the sites ``image.embed`` and ``text.embed``.
    """

    model: Any = field(repr=False)
    name: str
    store: mm.Store

    def vectors(self, side: str, rows: Any = slice(None)) -> Float[Tensor, "n d"]:
        """Returns the embeddings of one side, "image" or "text", of all pairs or of those in ``rows``."""
        return self.store[f"{side}.embed"][rows]  # type: ignore[return-value]


def encode(model: Any, name: str, pairs: Any, cache: Path, *, batch: int, progress: bool) -> Encoded:
    """Runs the hooked model once over all pairs, into a store under ``cache``; a second run opens that store.

    The folder's name contains digests of everything that decides its rows, so embeddings of other weights, transforms
    or pairs are never read instead. An interrupted run resumes where it stopped.
    """
    made_by = digest(model.preprocess, model.tokenizer, what=f"transforms of {name}")[:16]
    folder = cache / f"{weights_hash(model.model)}-{made_by}-{pairs.fingerprint}-{batch}"
    store = mm.extract(model, pairs, SITES, folder, batch_size=batch, progress=progress)
    return Encoded(model, name, store)


def batches(n: int, size: int) -> Iterable[range]:
    return (range(start, min(start + size, n)) for start in range(0, n, size))


def unit(x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    return torch.nn.functional.normalize(x, dim=-1)
