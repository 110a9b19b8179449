"""One check of a verification, and how tensors are compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

# Largest difference allowed, relative to the largest value: of one sum, and of a sum over all layers.
_ONE = {torch.float32: 2e-5, torch.float64: 1e-10, torch.float16: 5e-3, torch.bfloat16: 4e-2}
_ALL = {torch.float32: 2e-4, torch.float64: 1e-9, torch.float16: 3e-2, torch.bfloat16: 2e-1}


@dataclass(frozen=True)
class Check:
    """What was expected at a place, and what was found there.

    Attributes:
        what: the statement that is checked, the same at every place.
        place: a site, a block or an output; "" if it is about the whole model.
        expected, got: numbers or words.
        tolerance: how far a number may be off.
        passed: None: it could not be checked; ``note`` says why.
    """

    what: str
    place: str
    expected: Any
    got: Any
    tolerance: float | None
    passed: bool | None
    note: str = ""


def equal_bits(what: str, place: str, got: Shaped[Tensor, "..."], want: Shaped[Tensor, "..."]) -> Check:
    """Compares two tensors bit by bit; NaN equals NaN."""
    same = got.shape == want.shape and torch.equal(torch.nan_to_num(got), torch.nan_to_num(want))
    said = "equal bits" if same else _difference(got, want)
    return Check(what, place, "equal bits", said, 0.0, same)


def close(
    what: str, place: str, got: Shaped[Tensor, "..."], want: Shaped[Tensor, "..."], *, summed: bool = False
) -> Check:
    """Compares what should be equal up to rounding: the largest difference, relative to the largest value.

    Args:
        summed: over all layers, which adds up rounding.
    """
    kinds = {got.dtype, want.dtype} & _ONE.keys()
    tolerance = max((_ALL if summed else _ONE)[kind] for kind in kinds) if kinds else 0.0
    if got.shape != want.shape:
        return Check(what, place, list(want.shape), list(got.shape), None, False)
    error = relative_error(got, want)
    return Check(what, place, 0.0, error, tolerance, error <= tolerance)


def relative_error(got: Shaped[Tensor, "..."], want: Shaped[Tensor, "..."]) -> float:
    """The largest difference, relative to the largest value that was wanted; infinite where one is not finite."""
    difference = (got.double() - want.double()).abs().max()
    error = float(difference / want.double().abs().max().clamp_min(1e-12))
    return error if error == error else float("inf")


def _difference(got: Tensor, want: Tensor) -> str:
    if got.shape != want.shape:
        return f"shape {list(got.shape)} instead of {list(want.shape)}"
    return f"a relative difference of {relative_error(got, want):.2g}"
