"""Which features and which tokens an edit touches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mmhooks.errors import ShapeMismatch
from mmhooks.hooks.features import FeatureSet

Features = FeatureSet | Sequence[int] | range | int | Tensor | None
Tokens = int | slice | Sequence[int] | Tensor | None


def feature_index(features: Any) -> Int[Tensor, " m"] | None:
    """Sorted LongTensor of the features; None means all of them.

    >>> feature_index([3, 1, 3]), feature_index(torch.tensor([True, False, True]))
    (tensor([1, 3]), tensor([0, 2]))
    """
    if features is None:
        return None
    if isinstance(features, FeatureSet):
        return features.indices
    if isinstance(features, (bool, str)):
        raise ShapeMismatch(f"features are a FeatureSet, indices or a bool mask, came {features!r}")
    if isinstance(features, Tensor) and features.dtype == torch.bool:
        if features.dim() != 1:
            raise ShapeMismatch(f"a feature mask has one dimension, came shape {tuple(features.shape)}")
        return features.nonzero().flatten().cpu()
    index = torch.as_tensor([features] if isinstance(features, int) else features)
    if index.numel() == 0:
        return index.long().flatten()
    if index.is_floating_point():
        raise ShapeMismatch(f"features are indices or a bool mask, came {index.dtype}")
    index = index.cpu().long().flatten().unique()
    if index[0] < 0:
        raise ShapeMismatch(f"feature indices are >= 0, came {int(index[0])}")
    return index


def feature_width(features: Any) -> int | None:
    """How many features there are in all, where the selection says so: a FeatureSet or a bool mask does.

    >>> feature_width(torch.tensor([True, False, True])), feature_width([0, 2])
    (3, None)
    """
    if isinstance(features, FeatureSet):
        return features.n_features
    if features is None or isinstance(features, (int, range)) or len(features) == 0:
        return None
    mask = torch.as_tensor(features)
    return len(mask) if mask.dtype == torch.bool else None


def token_mask(tokens: Tokens, value: Tensor, axis: int | None, where: str) -> Bool[Tensor, "..."]:
    """True at the selected tokens, broadcastable to ``value``.

    ``tokens`` is a position, a slice, positions, a bool mask ``[L]`` or one ``[batch, L]`` (for tokens that
    differ from row to row, such as the end of the text).

    Raises:
        ShapeMismatch: the value has no token dimension, a position lies outside it, or none is selected.
    """
    # A pooled vector [b, d] or a feature map of it has no tokens; a feature axis is never the token axis.
    if axis is None or value.dim() < axis + 2:
        raise ShapeMismatch(
            f"tokens= at {where!r}, which has no token dimension (shape {tuple(value.shape)}); leave it out"
        )
    length = value.shape[axis]
    mask = torch.zeros(length, dtype=torch.bool, device=value.device)
    if isinstance(tokens, Tensor) and tokens.dtype == torch.bool:
        if tokens.shape[-1] != length or tokens.dim() > 2:
            raise ShapeMismatch(
                f"token mask of shape {tuple(tokens.shape)} at {where!r}, which has {length} tokens"
            )
        if tokens.dim() == 2 and tokens.shape[0] not in (1, value.shape[0]):
            raise ShapeMismatch(
                f"token mask of shape {tuple(tokens.shape)} at {where!r}, where the batch is {value.shape[0]} "
                f"(shape {tuple(value.shape)})"
            )
        mask = tokens.to(value.device)
    elif isinstance(tokens, slice):
        mask[tokens] = True
        if not range(*tokens.indices(length)):
            raise ShapeMismatch(f"{tokens} selects none of the {length} tokens at {where!r}")
    else:
        if isinstance(tokens, Tensor) and (tokens.is_floating_point() or tokens.dim() > 1):
            raise ShapeMismatch(
                f"tokens at {where!r} are positions [m] or a bool mask, came {tokens.dtype} of shape "
                f"{tuple(tokens.shape)}"
            )
        positions = [tokens] if isinstance(tokens, int) else [int(t) for t in tokens]  # type: ignore[union-attr]
        if not positions:
            raise ShapeMismatch(f"tokens=[] at {where!r} selects none of the {length} tokens")
        for position in positions:
            if not -length <= position < length:
                raise ShapeMismatch(
                    f"token {position} at {where!r}, which has {length} tokens (shape {tuple(value.shape)})"
                )
            mask[position] = True
    shape = [1] * value.dim()
    shape[axis] = length
    if mask.dim() == 2:
        shape[0] = mask.shape[0]
    return mask.view(shape)


def reference(
    given: Any, value: Tensor, index: Tensor | None, last: int, axis: int, where: str
) -> Tensor | float:
    """A user's number or tensor, cut to the selected features and broadcastable to ``value``.

    ``value`` has its features last and already selected; ``given`` is in the layout of the site, with one
    entry for every feature of it or none. ``last`` is the highest of the features ``index``.
    """
    if not isinstance(given, Tensor):
        return float(given)
    if given.device != value.device and given.dim() > 0:
        raise ShapeMismatch(
            f"{where}: a tensor on {given.device} for values on {value.device}; move it with .to()"
        )
    if given.dtype == torch.bool or given.is_complex():
        raise ShapeMismatch(f"{where}: values are {value.dtype}, came {given.dtype}")
    given = given.to(value.dtype)
    if given.dim() >= -axis:
        given = given.movedim(axis, -1)
        if index is not None and given.shape[-1] > 1:
            if given.shape[-1] <= last:
                raise ShapeMismatch(
                    f"{where}: features up to {last}, but the given tensor has {given.shape[-1]} "
                    "entries along them; pass one for every feature of the site"
                )
            given = given.index_select(-1, index.to(given.device))
    try:
        return given.expand(value.shape)
    except RuntimeError:
        raise ShapeMismatch(
            f"{where}: a tensor of shape {tuple(given.shape)} (features last, selected) does not fit values of "
            f"shape {tuple(value.shape)}"
        ) from None
