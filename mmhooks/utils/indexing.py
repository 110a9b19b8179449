"""Reads indices and masks of features, tokens, rows, neurons or layers in any form that a caller gives them.

Bools of any kind are a mask, whole numbers of any kind are indices, and everything else is refused: a mask of floats
or of numpy bools read as indices would silently select 0 and 1.

Rows, tokens and layers are ordered, so a negative number counts from the end (:func:`as_places`). Features and
neurons are not, so there it is refused (:func:`as_indices`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from operator import index as whole_number
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mmhooks.errors import OutOfRange, ShapeMismatch


def as_choice(given: Any, what: str) -> Bool[Tensor, "..."] | Int[Tensor, "..."]:
    """``given`` as a tensor on the CPU: bool for a mask, int64 for indices.

    Args:
        given: a number, a tensor, an array, a series, or any iterable of numbers or bools.
        what: its name in error messages, such as ``"features"``.

    Raises:
        ShapeMismatch: floats, strings, mappings, or numbers mixed with bools.

    >>> as_choice([True, False], "features"), as_choice(np.int8(3), "features"), as_choice({2, 1}, "features")
    (tensor([ True, False]), tensor(3), tensor([1, 2]))
    """
    if isinstance(given, Tensor):
        return _of_tensor(given, what)
    if isinstance(given, range):
        return torch.arange(given.start, given.stop, given.step)
    if hasattr(given, "__array__"):
        array = np.asarray(given)
        return _of_items(array.tolist(), what) if array.dtype.kind == "O" else _of_array(array, what)
    if isinstance(given, (str, bytes, Mapping)) or given is None:
        raise _refused(what, repr(given) if isinstance(given, (str, bytes)) else type(given).__name__)
    return _of_items(list(given) if isinstance(given, Iterable) else given, what)


def as_indices(given: Any, n: int, what: str) -> Int[Tensor, " m"]:
    """The indices that ``given`` selects among ``n``, in its order, with repeats; those of a mask ascend.

    Raises:
        ShapeMismatch: what :func:`as_choice` refuses, or a mask of a shape other than ``[n]``.
        OutOfRange: an index outside ``0..n-1``, including negative ones.

    >>> as_indices(np.array([False, True, True]), 3, "features").tolist(), as_indices([2, 0], 3, "features").tolist()
    ([1, 2], [2, 0])
    """
    return _within(as_choice(given, what), n, 0, what)


def as_places(given: Any, n: int, what: str) -> Int[Tensor, " m"]:
    """Like :func:`as_indices`, for ordered things: ``-1`` is the last.

    >>> as_places([-1, 0], 3, "rows").tolist()
    [2, 0]
    """
    index = _within(as_choice(given, what), n, -n, what)
    return torch.where(index < 0, index + n, index)


def as_place(given: Any, n: int, what: str) -> int | None:
    """The position of a single whole number of any kind, negative ones from the end; None for anything else.

    Raises:
        ShapeMismatch: a single bool. OutOfRange: no such position.

    >>> as_place(np.int64(-1), 3, "rows"), as_place([0], 3, "rows")
    (2, None)
    """
    if isinstance(given, (Tensor, np.ndarray)) and given.ndim:
        return None
    if isinstance(given, (bool, np.bool_)) or (isinstance(given, Tensor) and given.dtype == torch.bool):
        raise _refused(what, "a single bool")
    try:
        place = whole_number(given)
    except TypeError:
        return None
    if not -n <= place < n:
        raise OutOfRange(f"{what}: {place} of {n}, expected {-n}..{n - 1}")
    return place + n if place < 0 else place


def one_index(given: Any, n: int, what: str) -> int:
    """The single index among ``n`` that ``given`` selects, read as by :func:`as_indices`.

    Raises:
        ShapeMismatch: none or several, or a single bool. OutOfRange: an index outside the range, or negative.

    >>> one_index(np.int64(2), 3, "features")
    2
    """
    return _only(as_indices(given, n, what), what)


def one_place(given: Any, n: int, what: str) -> int:
    """Like :func:`one_index`, for ordered things: ``-1`` is the last.

    >>> one_place(-1, 3, "layers")
    2
    """
    return _only(as_places(given, n, what), what)


def number_labels(labels: Iterable[Any]) -> Int[Tensor, " n"]:
    """Numbers labels of any kind in order of first appearance; equal labels get equal numbers.

    >>> number_labels(["farmer", "cook", "farmer"])
    tensor([0, 1, 0])
    """
    known: dict[Any, int] = {}
    return torch.tensor([known.setdefault(label, len(known)) for label in labels], dtype=torch.long)


def _only(index: Int[Tensor, " m"], what: str) -> int:
    if len(index) != 1:
        raise ShapeMismatch(f"{what}: expected one number, got {len(index)}")
    return int(index)


def like_a_mask(index: Tensor) -> int:
    """The width of a mask written as numbers: how many entries ``index`` has if all of them are 0 or 1, else 0.

    Distinct indices among more than two never look like that: as many 0s and 1s as there are things to choose from
    are a mask that lost its type, such as a tokenizer's ``attention_mask``.

    >>> like_a_mask(torch.tensor([0, 1, 1])), like_a_mask(torch.tensor([0, 1])), like_a_mask(torch.tensor([0, 3, 1]))
    (3, 0, 0)
    """
    many = index.dtype != torch.bool and index.dim() == 1 and len(index) > 2
    return len(index) if many and bool(((index == 0) | (index == 1)).all()) else 0


def refuse_mask_of_numbers(width: int, n: int, what: str) -> None:
    """Raises :class:`ShapeMismatch` if the width found by :func:`like_a_mask` equals ``n``, the number to choose from."""
    if width and width == n:
        raise ShapeMismatch(
            f"{what}: expected indices or a bool mask, got {n} zeros and ones for {n} of them, which looks like a "
            "mask of numbers; make it bool (mask.bool(), mask.astype(bool)), or remove repeats"
        )


def _within(choice: Tensor, n: int, lowest: int, what: str) -> Int[Tensor, " m"]:
    if choice.dtype == torch.bool:
        if choice.shape != (n,):
            raise ShapeMismatch(
                f"{what}: expected a mask of shape ({n},), got {_shape(choice)} for {n} {what.split()[0]}"
            )
        return choice.nonzero().flatten()
    index = choice.flatten()
    if len(index):
        low, high = (int(bound) for bound in index.aminmax())
        if low < lowest or high >= n:
            raise OutOfRange(f"{what}: {high if high >= n else low} of {n}, expected {lowest}..{n - 1}")
    return index


def _of_tensor(given: Tensor, what: str) -> Tensor:
    if given.dtype == torch.bool:
        return given.detach().cpu()
    if given.is_floating_point() or given.is_complex():
        if given.numel():
            raise _refused(what, f"{given.dtype} of shape {tuple(given.shape)}")
        return torch.zeros(given.shape, dtype=torch.long)  # torch.tensor([]) is float, and selects nothing
    return given.detach().to("cpu", torch.long)


def _of_array(given: np.ndarray, what: str) -> Tensor:
    kind = given.dtype.kind
    if kind not in "biu" and given.size:
        raise _refused(what, f"{given.dtype} of shape {given.shape}")
    if kind == "u" and given.size and given.max() > np.iinfo(np.int64).max:
        raise OutOfRange(f"{what}: {given.max()} is larger than any index")
    # A copy: torch accepts neither read-only arrays nor negative strides.
    return torch.from_numpy(np.array(given, dtype=bool if kind == "b" else np.int64))


def _of_items(given: Any, what: str) -> Tensor:
    """Reads Python objects: a list has no dtype, so every entry is checked."""
    if not isinstance(given, list):
        kinds, plain = {_kind(given, what)}, given
    elif (types := set(map(type, given))) <= {int} or types == {
        bool
    }:  # the common case, without a loop in Python
        kinds, plain = types, given
    else:
        plain = [x.tolist() if isinstance(x, (Tensor, np.ndarray, np.generic)) else x for x in given]
        kinds = {_kind(x, what) for x in _leaves(plain)}
    if len(kinds) > 1:
        raise _refused(what, "numbers mixed with bools")
    try:
        return torch.from_numpy(np.array(plain, dtype=bool if kinds == {bool} else np.int64))
    except (ValueError, RuntimeError, OverflowError, TypeError) as fault:
        raise _refused(what, f"{type(given).__name__} ({fault})") from fault


def _leaves(items: list[Any]) -> Iterable[Any]:
    for item in items:
        if isinstance(item, (list, tuple)):
            yield from _leaves(list(item))
        else:
            yield item


def _kind(item: Any, what: str) -> type:
    if isinstance(item, (bool, np.bool_)):
        return bool
    try:
        whole_number(item)
    except TypeError:
        shown = repr(item) if isinstance(item, (int, float, str)) else type(item).__name__
        raise _refused(what, shown) from None
    return int


def _shape(choice: Tensor) -> str:
    return f"shape {tuple(choice.shape)}" if choice.dim() else "a single bool"


def _refused(what: str, got: str) -> ShapeMismatch:
    return ShapeMismatch(
        f"{what}: expected whole numbers or a bool mask, got {got}; compare for a mask (scores > 0.5), convert for "
        "indices (.long(), .astype(int))"
    )
