"""Texts through a hooked model's text tower, in batches."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from mmhooks.errors import MMHooksError
from mmhooks.models.clip.inputs import Model, Texts, check_model
from mmhooks.utils.modes import evaluating
from mmhooks.utils.progress import track


@torch.no_grad()
def embed_texts(
    model: Model, texts: Texts, *, batch: int = 256, unit: bool = True, progress: bool = False
) -> Float[Tensor, "t d"]:
    """Embeddings of texts, of unit norm by default, on the CPU in fp32, computed in evaluation mode.

    Raises:
        MMHooksError: not a hooked CLIP, a model without a tokenizer, no text, or something else than texts.

    >>> embed_texts(mm.load("mini"), ["a red circle", "a dog"]).shape     # doctest: +SKIP
    torch.Size([2, 256])
    """
    check_model(model)
    if model.tokenizer is None:
        raise MMHooksError(
            "expected a model with a tokenizer, got one without: HookedCLIP(model, tokenizer=...)"
        )
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        hint = "put it into a list" if isinstance(texts, str) else "every one a str"
        raise MMHooksError(f"expected a list of texts, got a {type(texts).__name__}: {hint}")
    if not len(texts):
        raise MMHooksError("expected at least one text, got none")
    starts = range(0, len(texts), batch)
    with evaluating(model.model):
        rows = [
            model.encode_text(model.to_input(model.tokenizer(list(texts[i : i + batch])))).float().cpu()
            for i in track(starts, len(starts), "texts", show=progress)
        ]
    embedded = torch.cat(rows)
    return normalize(embedded, dim=1) if unit else embedded
