"""Both sides of a text-to-image conditioner: hidden states of texts, and images mapped into the same space."""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import normalize

from mmhooks.data.pair_set import Pairs
from mmhooks.errors import DataError, MMHooksError
from mmhooks.models.diffusion.references import (
    Mode,
    caption_embeds,
    conditioner,
    reference,
    text_end,
    token_norm,
)
from mmhooks.utils.modes import evaluating
from mmhooks.utils.progress import rate_bar

Sides = tuple[Float[Tensor, "n d"], Float[Tensor, "n d"]]


def conditioner_sides(
    sd: Any,
    pairs: Pairs,
    *,
    mode: Mode = "projected",
    clip: Any = None,
    projection: Any = None,
    tokens: Literal["end", "mean"] = "end",
    batch_size: int = 64,
    progress: bool = True,
) -> Sides:
    """Images and captions of pairs in the space that is edited: ``(references [n d], texts [n d])``.

    The image side is what an edit would bring in, :func:`~mmhooks.models.diffusion.references.reference`. The text side is

    - at ``text.cond`` the hidden state at the end of the caption, which CLIP projects, or the mean over its tokens
      (the first left out);
    - at ``image.embed`` (``mode="unclip"``) the CLIP text embedding that the prior starts from,
      :func:`~mmhooks.models.diffusion.references.caption_embeds`, brought to the median norm of the images: CLIP compares
      directions, and lengths alone would make one side dominate.

    A head is trained on both: ``mm.train_head(mm.TopKSAE(d, 4 * d, 16), *sides)``.

    Raises:
        DataError: there are no pairs.
        MissingWeights, ShapeMismatch, MMHooksError: as ``reference`` and ``caption_embeds``.
    """
    if not len(pairs):
        raise DataError("no pairs to score a conditioner's features on")
    images, texts = [], []
    bar = rate_bar("conditioner", len(pairs), unit="pairs", show=progress)
    with evaluating(*_modules(sd, clip)), bar as advance:
        norm = None if mode == "unclip" else token_norm(sd)
        for begin in range(0, len(pairs), batch_size):
            rows = [pairs[i] for i in range(begin, min(begin + batch_size, len(pairs)))]
            shown, captions = [row.image for row in rows], [row.text for row in rows]
            found = reference(sd, shown, mode=mode, clip=clip, projection=projection, norm=norm)
            images.append(found.flatten(1).float().cpu())  # one token, or none
            if mode == "unclip":
                texts.append(caption_embeds(sd, captions, clip=clip).float().cpu())
            else:
                texts.append(_hidden_states(sd, captions, tokens))
            advance(len(rows))
    image, text = torch.cat(images), torch.cat(texts)
    if mode == "unclip":
        text = normalize(text, dim=1) * image.norm(dim=1).median()
    return image, text


def joint_sides(pairs: Pairs, clip: Any, *, batch_size: int = 64, progress: bool = True) -> Sides:
    """Images and captions of pairs in CLIP's joint space, unit vectors ``([n d_joint], [n d_joint])``.

    The paper scores its features there and edits the conditioner at the same indices, which is another basis even
    where the widths agree (Section 3.3; Stable Diffusion 2: 1,024 and 1,024).

    Raises:
        DataError: there are no pairs.
        MMHooksError: a CLIP without preprocess or tokenizer.
    """
    if not len(pairs):
        raise DataError("no pairs to score the joint space's features on")
    if clip.preprocess is None or clip.tokenizer is None:
        raise MMHooksError(
            "expected a clip with preprocess= and tokenizer=, got one without: mm.HookedCLIP(model, preprocess=..., "
            "tokenizer=...)"
        )
    images, texts = [], []
    bar = rate_bar("joint space", len(pairs), unit="pairs", show=progress)
    with torch.no_grad(), evaluating(clip.model), bar as advance:
        for begin in range(0, len(pairs), batch_size):
            rows = [pairs[i] for i in range(begin, min(begin + batch_size, len(pairs)))]
            pixels = torch.stack([clip.preprocess(row.image) for row in rows])
            images.append(clip.encode_image(pixels.to(clip.device, clip.dtype)).float().cpu())
            tokens = clip.tokenizer([row.text for row in rows])
            texts.append(clip.encode_text(tokens.to(clip.device)).float().cpu())
            advance(len(rows))
    return normalize(torch.cat(images), dim=1), normalize(torch.cat(texts), dim=1)


def _modules(sd: Any, clip: Any) -> list[nn.Module]:
    """All that may run: the pipeline's models, and the CLIP that makes references."""
    found = [*sd.pipe.components.values(), getattr(clip, "model", clip)]
    return [module for module in found if isinstance(module, nn.Module)]


def _hidden_states(sd: Any, captions: list[str], tokens: Literal["end", "mean"]) -> Float[Tensor, "n d"]:
    cond, ends = conditioner(sd, captions).float().cpu(), text_end(sd, captions)
    if tokens == "end":
        return cond[torch.arange(len(cond)), ends]
    inside = torch.arange(cond.shape[1]) <= ends[:, None]
    inside[:, 0] = False
    return (cond * inside[..., None]).sum(1) / inside.sum(1, keepdim=True)
