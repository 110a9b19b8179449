"""Modality of the features of a conditioner: the space that is edited is the space that is scored."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmhooks.analysis.measures.mds import MDSResult, mds
from mmhooks.errors import MMHooksError


def conditioner_mds(
    sides: tuple[Float[Tensor, "n d"], Float[Tensor, "n d"]],
    *,
    head: Any = None,
    data: str = "",
    min_fires: int = 20,
) -> MDSResult:
    """Modality Dominance Score of a conditioner's own dimensions (the paper's), or of a head trained on them.

    Own dimensions are signed and compared by size, ``kind="abs"``.

    Args:
        sides: of :func:`conditioner_sides`.
        head: a head over that space; its groups select ``text.cond.<head>.latents``, or ``image.embed.<head>.latents``.

    Raises:
        MMHooksError: a head of another width.
    """
    images, texts = sides
    if head is None:
        return mds(images, texts, kind="abs", data=data, min_fires=min_fires)
    if head.d_in != images.shape[1]:
        raise MMHooksError(f"the head reads {head.d_in} dimensions, the conditioner has {images.shape[1]}")
    with torch.no_grad():
        latents = [head.encode(head.prepare(side)) for side in sides]
        return mds(*latents, head=head, data=data, min_fires=min_fires)
