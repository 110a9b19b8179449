"""mm.decompose: a tower's embedding as the sum of the direct contributions of all attention heads and MLPs.

"Interpreting CLIP's Image Representation via Text-Based Decomposition" (Gandelsman, Efros, Steinhardt 2024), Section 3:
the residual stream is a sum, so with the final LayerNorm's σ frozen the embedding is one too. Terms that belong to no
component (LayerNorm's mean and bias, biases of projections) are divided evenly among the components, as in the paper.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from mmhooks.analysis.decomposition.contributions import Decomposition, concatenate, decompose_batch
from mmhooks.analysis.decomposition.origin import origin_of
from mmhooks.errors import MMHooksError, ShapeMismatch
from mmhooks.models.clip.inputs import Model, Vectors, check_batch, check_model
from mmhooks.models.clip.model import HookedCLIP

if TYPE_CHECKING:
    from mmhooks.analysis.decomposition.dataset import Inputs, MeanDecomposition


@overload
def decompose(
    model: HookedCLIP,
    images: Tensor,
    texts: None = ...,
    *,
    tokens: bool = ...,
    against: Tensor | None = ...,
    class_token: bool = ...,
    normalize: bool = ...,
    batch_size: int = ...,
    progress: bool = ...,
) -> Decomposition: ...
@overload
def decompose(
    model: HookedCLIP,
    images: None = ...,
    *,
    texts: Tensor,
    tokens: bool = ...,
    against: Tensor | None = ...,
    class_token: bool = ...,
    normalize: bool = ...,
    batch_size: int = ...,
    progress: bool = ...,
) -> Decomposition: ...
@overload
def decompose(
    model: HookedCLIP,
    images: Inputs,
    texts: None = ...,
    *,
    tokens: bool = ...,
    against: Tensor | None = ...,
    class_token: bool = ...,
    normalize: bool = ...,
    batch_size: int = ...,
    progress: bool = ...,
) -> MeanDecomposition: ...
@overload
def decompose(
    model: HookedCLIP,
    images: None = ...,
    *,
    texts: Inputs,
    tokens: bool = ...,
    against: Tensor | None = ...,
    class_token: bool = ...,
    normalize: bool = ...,
    batch_size: int = ...,
    progress: bool = ...,
) -> MeanDecomposition: ...
@torch.no_grad()
def decompose(
    model: Model,
    images: Any = None,
    texts: Any = None,
    *,
    tokens: bool = False,
    against: Vectors | None = None,
    class_token: bool = False,
    normalize: bool = False,
    batch_size: int = 32,
    progress: bool = False,
) -> Decomposition | MeanDecomposition:
    """Computes the direct contributions of all attention heads and MLPs to the embedding of images, or of texts.

    Exact for ViTs of open_clip, timm and transformers that read a class token, an average or an attention pooling (SigLIP,
    CoCa: the pooling's pattern is frozen like σ, and its MLP is a separate component, ``pool``), and for the text towers of
    open_clip and of transformers' CLIP and SigLIP at the position that they read. Edits of open contexts apply, except
    those at ``attn.head_out``.

    Args:
        model: a hooked CLIP.
        images: pixels ``[n 3 h w]``; or a data set, ``mm.data.pairs(...)`` or an iterable of pixel batches, for
            which running means are returned (:class:`MeanDecomposition`) in memory that does not depend on its length.
        texts: tokens ``[n l]`` or a data set, instead of images.
        tokens: also split every head by the token it attends to, ``[b l h t e]``.
        against: directions in the embedding space, usually unit text embeddings: adds the tokens' contributions along
            these, ``[b l h t m]``, without materialising ``[b l h t e]``.
        class_token: also what every head gets from the class token alone (of texts, from the token that is read).
        normalize: decompose the unit-norm embedding.
        batch_size: images per forward pass.
        progress: show a progress bar (data sets).

    Raises:
        NoExactSum: the architecture's embedding is not such a sum (says why), or the sum differs from the embedding.
        ShapeMismatch: neither or both of images and texts are given, they are not pixels or tokens of this model's
            size, or ``against`` has another width.
        MMHooksError: ``model`` is not a hooked CLIP.

    >>> import torch, mmhooks as mm
    >>> parts = mm.decompose(mm.load("mini"), torch.randn(2, 3, 64, 64))
    >>> parts.heads.shape, float(parts.error.max()) < 1e-5
    (torch.Size([2, 6, 6, 256]), True)
    """
    from mmhooks.analysis.decomposition.dataset import mean_decomposition

    check_model(model)
    if (images is None) == (texts is None):
        raise ShapeMismatch("mm.decompose: expected images or texts, one of them, got both or neither")
    tower, given = ("image", images) if texts is None else ("text", texts)
    if not isinstance(given, Tensor):
        if tokens or against is not None:
            raise MMHooksError(
                "tokens= and against=: expected a tensor of images or texts, got a data set; use "
                "mmhooks.analysis.decomposition.dataset.decompositions(...), batch by batch"
            )
        return mean_decomposition(
            model,
            given,
            tower=tower,
            class_token=class_token,
            normalize=normalize,
            batch_size=batch_size,
            progress=progress,
        )
    check_batch(model, given, tower)
    parts = [
        decompose_batch(model, part, tower=tower, tokens=tokens, against=against, class_token=class_token)
        for part in given.split(batch_size)
    ]
    found = parts[0] if len(parts) == 1 else concatenate(parts)
    found = replace(found, origin=origin_of(model, tower, False, given))
    return found.normalized() if normalize else found
