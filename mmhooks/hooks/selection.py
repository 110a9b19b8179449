"""Reads the features, tokens and values given to an edit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mmhooks.errors import NotFinite, OutOfRange, ShapeMismatch
from mmhooks.hooks.features import FeatureSet
from mmhooks.hooks.kinds import (
    ENCODER_KINDS,
    KINDS,
    HeldKinds,
    Kind,
    check_kind,
    is_kind,
    known_kind,
    tokens_of_kind,
)
from mmhooks.utils.indexing import as_choice, like_a_mask, refuse_mask_of_numbers

# A FeatureSet, whole numbers or a bool mask as a tensor, an array or any iterable, one number, or None for all.
Features = Any
# Likewise without FeatureSets, or a slice, or a kind (hooks/kinds.py); a mask is [L] or [batch, L].
Tokens = Any


class FeatureChoice(NamedTuple):
    """The features selected by an edit, before the width of its sites is known.

    Attributes:
        index: sorted and distinct; None means all features.
        last: the highest index, -1 if there is none; a Python number, for cheap checks.
        width: the total number of features, if the selection implies it (a FeatureSet or a mask).
        numbers: the width if the indices look like a mask of zeros and ones, else 0.
    """

    index: Int[Tensor, " m"] | None
    last: int = -1
    width: int | None = None
    numbers: int = 0

    def check(self, width: int, where: str, shape: str) -> None:
        """Raises ShapeMismatch if the selection does not fit ``width`` features."""
        if self.width not in (None, width):
            raise ShapeMismatch(
                f"{where}: expected a selection among {width} features, got one among {self.width}{shape}"
            )
        if self.last >= width:
            raise OutOfRange(f"{where}: feature {self.last} of {width}{shape}")
        refuse_mask_of_numbers(self.numbers, width, f"{where}: features")


def chosen_features(features: Any) -> FeatureChoice:
    """Reads a FeatureSet, a mask, indices, or None for all features.

    Raises:
        ShapeMismatch: floats, a mask of several dimensions, a negative index.

    >>> chosen_features([3, 1, 3]).index, chosen_features([True, False, True])
    (tensor([1, 3]), FeatureChoice(index=tensor([0, 2]), last=2, width=3, numbers=0))
    """
    if features is None:
        return FeatureChoice(None)
    if isinstance(features, FeatureSet):
        return _choice(features.indices, features.n_features)
    choice = as_choice(features, "features")
    if choice.dtype == torch.bool:
        if choice.dim() != 1:
            raise ShapeMismatch(
                f"features: expected a mask of one dimension, got shape {tuple(choice.shape)}"
            )
        return _choice(choice.nonzero().flatten(), len(choice))
    index = choice.flatten().unique()
    if len(index) and int(index[0]) < 0:
        raise OutOfRange(f"features: expected indices >= 0, got {int(index[0])}")
    chosen = _choice(index, None)
    # Indices are sorted and distinct, so the last one nearly always rules out a mask written as numbers.
    return chosen if chosen.last > 1 else chosen._replace(numbers=like_a_mask(choice))


def _choice(index: Tensor, width: int | None) -> FeatureChoice:
    return FeatureChoice(index, int(index[-1]) if len(index) else -1, width)


def feature_index(features: Any) -> Int[Tensor, " m"] | None:
    """Sorted LongTensor of the features; None means all.

    >>> feature_index([3, 1, 3]), feature_index(torch.tensor([True, False, True]))
    (tensor([1, 3]), tensor([0, 2]))
    """
    return chosen_features(features).index


ChosenTokens = slice | Tensor | tuple[int, ...] | Kind


def chosen_tokens(tokens: Tokens) -> ChosenTokens | None:
    """``tokens=`` in the form that :func:`token_mask` uses at every forward: a slice, a bool mask, positions, or a kind.

    Raises:
        ShapeMismatch: floats, a table of numbers (a mask per row must be bool), or no kind of tokens.

    >>> chosen_tokens(-1), chosen_tokens([True, False])
    ((-1,), tensor([ True, False]))
    """
    if tokens is None or isinstance(tokens, slice):
        return tokens
    if is_kind(tokens):
        if not known_kind(tokens):
            raise ShapeMismatch(
                f"tokens: expected positions, a slice, a mask or one of the kinds {', '.join(KINDS + ENCODER_KINDS)} or "
                f"('image', i) with i from 0, got {tokens!r}"
            )
        return tokens
    choice = as_choice(tokens, "token positions")
    if choice.dtype != torch.bool and choice.dim() > 1:
        raise ShapeMismatch(
            f"tokens: expected positions [m] or a bool mask [L] or [batch L], got {choice.dtype} of shape "
            f"{tuple(choice.shape)}; make a mask bool (attention_mask.bool())"
        )
    return choice if choice.dtype == torch.bool else tuple(choice.reshape(-1).tolist())


def token_mask(
    tokens: ChosenTokens, value: Tensor, axis: int | None, where: str, held: HeldKinds | None = None
) -> Bool[Tensor, "..."]:
    """True at the selected tokens, broadcastable to ``value``.

    ``tokens``, from :func:`chosen_tokens`, is a slice, positions, a bool mask ``[L]``, or one ``[batch, L]`` for tokens
    that differ between rows, such as the end of the text; or a kind of tokens, of which there may be none here.
    ``held`` tells the kinds at a site of an encoder.

    Raises:
        ShapeMismatch: the value has no token dimension, a position lies outside it, or none is selected.
    """
    if axis is None and held is not None and is_kind(tokens):  # a feature map: every place is a patch
        check_kind(held, tokens, where)
        return torch.ones([1] * value.dim(), dtype=torch.bool, device=value.device)
    # Pooled vectors [b, d] and their features have no tokens; the feature axis is never the token axis.
    if axis is None or value.dim() < axis + 2:
        raise ShapeMismatch(
            f"tokens= at {where!r}: expected a site with a token dimension, got shape {tuple(value.shape)}; leave it out"
        )
    length = value.shape[axis]
    if is_kind(tokens):
        tokens = tokens_of_kind(tokens, length, value.device, where, held).mask
    if isinstance(tokens, Tensor):
        if tokens.dim() not in (1, 2) or tokens.shape[-1] != length:
            raise ShapeMismatch(
                f"token mask of shape {tuple(tokens.shape)} at {where!r}, which has {length} tokens; expected [L] or "
                "[batch L]"
            )
        if tokens.dim() == 2 and tokens.shape[0] not in (1, value.shape[0]):
            raise ShapeMismatch(
                f"token mask of shape {tuple(tokens.shape)} at {where!r}, where the batch is {value.shape[0]} "
                f"(shape {tuple(value.shape)})"
            )
        mask = tokens.to(value.device)
    else:
        mask = torch.zeros(length, dtype=torch.bool, device=value.device)
        if isinstance(tokens, slice):
            mask[tokens] = True
            if not range(*tokens.indices(length)):
                raise ShapeMismatch(f"{tokens} selects none of the {length} tokens at {where!r}")
        else:
            _mark_positions(mask, tokens, where, f"(shape {tuple(value.shape)})")  # type: ignore[arg-type]
    shape = [1] * value.dim()
    if mask.dim() == 2:
        shape[0] = mask.shape[0]
    shape[axis] = length  # the first dimension itself where the patches of all images are one sequence
    return mask.view(shape)


def none_of_kind(
    tokens: Tokens, value: Tensor, axis: int | None, where: str, held: HeldKinds | None = None
) -> bool:
    """Whether ``tokens`` is a kind, and the tokens of ``value`` are all of other kinds; never in an encoder, which sees all
    of its tokens at once."""
    if not is_kind(tokens) or held is not None or axis is None or value.dim() < axis + 2:
        return False
    return not tokens_of_kind(tokens, value.shape[axis], value.device, where).any


def _mark_positions(mask: Tensor, positions: tuple[int, ...], where: str, shape: str) -> None:
    length = len(mask)
    if not positions:
        raise ShapeMismatch(f"tokens=[] at {where!r} selects none of the {length} tokens")
    if len(positions) == length > 2 and set(positions) <= {0, 1}:
        refuse_mask_of_numbers(length, length, f"tokens= at {where!r}")
    for position in positions:
        if not -length <= position < length:
            raise OutOfRange(f"token {position} at {where!r}, which has {length} tokens {shape}")
        mask[position] = True


def as_values(given: Any, what: str) -> Any:
    """Converts a number or table given to an edit: arrays and lists to tensors, numpy scalars to floats.

    None, tensors and caches (mappings) pass through.

    Raises:
        ShapeMismatch: text, complex numbers, or entries that are not numbers.

    >>> as_values(np.float32(0.5), "strength="), as_values([1, 2], "direction=")
    (0.5, tensor([1, 2]))
    """
    if given is None or isinstance(given, (float, int, Tensor, Mapping)):
        return given
    array = np.asarray(given)
    if array.dtype.kind not in "biuf":
        raise ShapeMismatch(
            f"{what}: expected a number, a tensor or a cache, got {type(given).__name__} {given!r:.60}"
        )
    return float(array) if array.ndim == 0 else torch.from_numpy(array.copy())


def reference(
    given: Any, value: Tensor, index: Tensor | None, last: int, axis: int, where: str
) -> Tensor | float:
    """A user's number or tensor, reduced to the selected features and broadcastable to ``value``.

    ``value`` has the selected features last; ``given`` is in the layout of the site, with one entry for every feature
    of it, or without a feature dimension. ``last`` is the highest entry of ``index``.
    """
    given = as_values(given, where)  # a cache may contain arrays
    if not isinstance(given, Tensor):
        return float(given)
    if given.device != value.device and given.dim() > 0:
        raise ShapeMismatch(
            f"{where}: expected a tensor on {value.device}, got one on {given.device}; move it with .to()"
        )
    if given.dtype == torch.bool or given.is_complex():
        raise ShapeMismatch(f"{where}: expected values of {value.dtype}, got {given.dtype}")
    given = given.to(value.dtype)
    if given.dim() >= -axis:
        given = given.movedim(axis, -1)
        if index is not None and given.shape[-1] > 1:
            if given.shape[-1] <= last:
                raise ShapeMismatch(
                    f"{where}: features up to {last} are selected, but the given tensor has {given.shape[-1]} "
                    "entries along that dimension; pass one for every feature of the site"
                )
            given = given.index_select(-1, index.to(given.device))
    try:
        return given.expand(value.shape)
    except RuntimeError:
        raise ShapeMismatch(
            f"{where}: a tensor of shape {tuple(given.shape)} (features last, selected) does not fit values of "
            f"shape {tuple(value.shape)}"
        ) from None


def check_values(given: Any, what: str, *, bounds: bool) -> None:
    """Checks that numbers and tensors given to an edit are finite; caches are not checked, and bounds may be infinite."""
    if isinstance(given, (int, float)):
        given = None if bounds and math.isinf(given) else torch.tensor(float(given))
    if isinstance(given, Tensor) and given.device.type != "meta" and not bool(torch.isfinite(given).all()):
        bad = int((~torch.isfinite(given)).sum())
        raise NotFinite(f"{what}: expected finite values, got NaN or infinity in {bad} of {given.numel()}")


def outside_inference(chosen: Tensor) -> Tensor:
    """A copy usable outside inference mode, where autograd saves the indices of a selection."""
    return chosen.clone() if chosen.is_inference() else chosen
