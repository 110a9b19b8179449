"""The map from the states that a pipeline conditions on into CLIP's joint space, for pipelines that skip the last layer.

CLIP's own text projection reads the last layer. Stable Diffusion 2 conditions on the one before it, so that projection
is applied to states that it was not made for. The map fitted here reads the states that the U-Net reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmhooks.errors import DataError, MMHooksError
from mmhooks.models.diffusion.references import conditioner, text_end, text_projection
from mmhooks.utils.modes import evaluating

BATCH = 64


@dataclass(frozen=True)
class FittedProjection:
    """A text projection for a pipeline's own layer, and how well it and CLIP's read held-out captions.

    Attributes:
        matrix: ``text embed ≈ hidden state @ matrix``.
        fitted, own: share of the variance of held-out captions' text embeddings that the fitted matrix, and CLIP's own,
            read from the conditioner's states. CLIP's is 1 where the pipeline conditions on the last layer.
        n: captions that the matrix was fitted on, twice the held-out ones.
    """

    matrix: Float[Tensor, "d_cond d_joint"]
    fitted: float
    own: float
    n: int


@torch.no_grad()
def fit_text_projection(sd: Any, clip: Any, captions: Sequence[str]) -> FittedProjection:
    """Fits the projection by least squares on captions: hidden state at the end of the text to CLIP's text embedding.

    Args:
        sd: a :class:`~mmhooks.models.diffusion.model.HookedDiffusion`.
        clip: the hooked CLIP whose text tower the pipeline conditions on, with its tokenizer.
        captions: two thirds are fitted on, every third is held out.

    Returns:
        The matrix, for ``reference(projection=)`` and ``conditioner_sides(projection=)``, with both shares.

    Raises:
        DataError: fewer distinct captions to fit on than the conditioner is wide, which leave the matrix undetermined.
        MMHooksError: a CLIP without tokenizer, or with another text tower than the pipeline's.

    >>> found = fit_text_projection(sd, mm.load("ViT-H-14", pretrained="laion2b_s32b_b79k"), texts)   # doctest: +SKIP
    >>> mm.reference(sd, image, clip=clip, projection=found.matrix)                                   # doctest: +SKIP
    """
    own = text_projection(sd, clip).float().cpu()
    if clip.tokenizer is None:
        raise MMHooksError(
            "expected a clip with tokenizer=, got one without: mm.HookedCLIP(model, tokenizer=...)"
        )
    texts = list(dict.fromkeys(captions))
    states, embeds = [], []
    with evaluating(sd.pipe.text_encoder, clip.model):
        for begin in range(0, len(texts), BATCH):
            some = texts[begin : begin + BATCH]
            found, ends = conditioner(sd, some).float().cpu(), text_end(sd, some)
            states.append(found[torch.arange(len(found)), ends])
            embeds.append(clip.encode_text(clip.tokenizer(some).to(clip.device)).float().cpu())
    held = torch.arange(len(texts)) % 3 == 2
    if int((~held).sum()) < len(own):
        raise DataError(
            f"expected at least {len(own)} distinct captions to fit a projection from {len(own)} dimensions, got "
            f"{int((~held).sum())} beside the held-out third; raise --limit, or take CLIP's own projection"
        )
    h, e = torch.cat(states), torch.cat(embeds)
    # In double precision, and of least norm: final LayerNorms leave states of nearly dependent dimensions.
    matrix = torch.linalg.lstsq(h[~held].double(), e[~held].double(), driver="gelsd").solution.float()
    spread = (e[held] - e[held].mean(0)).square().sum()
    fitted, clips = (float(1 - (h[held] @ w - e[held]).square().sum() / spread) for w in (matrix, own))
    return FittedProjection(matrix.to(sd.device), fitted, clips, int((~held).sum()))
