"""Modality Dominance Score of a conditioner's features, scored in the same space in which they are edited."""

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
    """Scores a conditioner's own dimensions (as in the paper), or the features of a head trained on them.

    A conditioner's own dimensions are signed and compared by absolute value, ``kind="abs"``.

    Args:
        sides: image and text side, from :func:`conditioner_sides`.
        head: a head on that space; its groups select ``text.cond.<head>.latents``, or ``image.embed.<head>.latents``.

    Raises:
        MMHooksError: the head has another width.
    """
    images, texts = sides
    if head is None:
        return mds(images, texts, kind="abs", data=data, min_fires=min_fires)
    if head.d_in != images.shape[1]:
        raise MMHooksError(
            f"expected a head that reads {images.shape[1]} dimensions, as the conditioner has, got {head.d_in}"
        )
    with torch.no_grad():
        latents = [head.encode(head.prepare(side)) for side in sides]
        return mds(*latents, head=head, data=data, min_fires=min_fires)
