"""Texts through a hooked model's text tower, in batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from mmhooks.data.progress import track
from mmhooks.errors import MMHooksError
from mmhooks.models.clip import HookedCLIP


@torch.no_grad()
def embed_texts(
    model: HookedCLIP, texts: Sequence[str], *, batch: int = 256, unit: bool = True, progress: bool = False
) -> Float[Tensor, "t d"]:
    """Embeddings of texts, of unit norm unless told otherwise, on the CPU in fp32.

    Raises:
        MMHooksError: a model without a tokenizer, or no text.

    >>> embed_texts(mm.load("mini"), ["a red circle", "a dog"]).shape     # doctest: +SKIP
    torch.Size([2, 256])
    """
    if model.tokenizer is None:
        raise MMHooksError("the model has no tokenizer: HookedCLIP(model, tokenizer=...)")
    if not texts:
        raise MMHooksError("no texts to embed")
    device = next(model.model.parameters()).device
    starts = range(0, len(texts), batch)
    rows = [
        model.encode_text(model.tokenizer(list(texts[i : i + batch])).to(device)).float().cpu()
        for i in track(starts, len(starts), "texts", show=progress)
    ]
    embedded = torch.cat(rows)
    return normalize(embedded, dim=1) if unit else embedded
