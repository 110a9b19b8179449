"""Checks of the tensors given to measures: floating-point, finite, and of matching shapes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from mmhooks.errors import NotFinite, ShapeMismatch

CHUNK_BYTES = 64 * 2**20  # temporary memory that a measure may use besides its input


def check_numbers(x: Any, what: str, *, ndim: int = 2) -> None:
    """Raises ShapeMismatch unless ``x`` is a dense tensor of floating-point numbers with ``ndim`` dimensions.

    Integers are refused too: whether they are counts, indices or a mask only the caller knows.
    """
    if not isinstance(x, Tensor):
        raise ShapeMismatch(
            f"{what}: expected a tensor, got a {type(x).__name__}; torch.as_tensor(...) makes one of an array or a list"
        )
    shape = tuple(x.shape)
    if x.ndim != ndim or 0 in shape[1:]:
        raise ShapeMismatch(
            f"{what}: expected {ndim} dimensions, none of width 0, got shape {shape}: give one row per sample"
        )
    if not x.is_floating_point() or x.layout != torch.strided or x.is_meta:
        kind = "one on the meta device, without values" if x.is_meta else f"{x.dtype}, {x.layout}"
        raise ShapeMismatch(
            f"{what}: expected a dense tensor of floating-point numbers, got {kind}; convert it: .float(), .to_dense()"
        )


def unit_rows(x: Float[Tensor, "n d"], what: str = "embeddings", *, start: int = 0) -> Float[Tensor, "n d"]:
    """Normalizes rows to unit norm, in fp32 (float64 if ``x`` is), however large or small they are.

    Raises:
        NotFinite: a row is all zeros and has no direction; the message names the first ones, counted from ``start``.

    >>> unit_rows(torch.tensor([[3e30, 4e30], [3e-30, 4e-30]]))
    tensor([[0.6000, 0.8000],
            [0.6000, 0.8000]])
    """
    unit, zeros = _unit_and_zeros(x)
    if len(zeros):
        raise NotFinite(
            f"{what}: {len(zeros)} of {len(x)} rows are zeros, which have no direction, first rows "
            f"{', '.join(str(int(r) + start) for r in zeros[:5])}; leave them out, or find out what makes them"
        )
    return unit


def unit_or_zero_rows(x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Normalizes rows as :func:`unit_rows` does, but keeps rows of zeros as zeros, which are similar to nothing.

    >>> unit_or_zero_rows(torch.tensor([[0.0, 0.0], [3e-30, 4e-30]]))
    tensor([[0.0000, 0.0000],
            [0.6000, 0.8000]])
    """
    return _unit_and_zeros(x)[0]


def _unit_and_zeros(x: Float[Tensor, "n d"]) -> tuple[Float[Tensor, "n d"], Int[Tensor, " zeros"]]:
    """Normalizes rows, and returns which rows are zeros and stay so."""
    x = x.detach()
    plain = x if x.dtype == torch.float64 else x.float()
    unit, norm = normalize(plain, dim=1), plain.norm(dim=1)
    # Rows that normalize cannot handle: their squares underflow or overflow.
    extreme = (~((norm > 1e-12) & norm.isfinite())).nonzero().flatten()
    if not len(extreme):
        return unit, extreme
    rows = x[extreme].double()
    largest = rows.abs().amax(1, keepdim=True)
    unit[extreme] = normalize(rows / torch.where(largest == 0, 1, largest), dim=1).to(unit)
    return unit, extreme[(largest == 0).flatten()]


def check_finite(x: Float[Tensor, "n d"], what: str, *, start: int = 0) -> None:
    """Raises NotFinite unless every number is finite, saying how many are not and where the first ones are;
    ShapeMismatch for anything but a 2-D tensor of floating-point numbers."""
    check_numbers(x, what)
    for begin, part in chunks(x):
        finite = torch.isfinite(part)
        if bool(finite.all()):
            continue
        bad = sum(int((~torch.isfinite(p)).sum()) for _, p in chunks(x))
        rows = (~finite).any(1).nonzero().flatten()[:5] + begin
        columns = (~finite).any(0).nonzero().flatten()[:5]
        raise NotFinite(
            f"{what}: {bad} of {x.numel()} numbers are NaN or infinite, first in rows "
            f"{', '.join(str(int(r) + start) for r in rows)} and columns {', '.join(str(int(c)) for c in columns)}; "
            "find the pair or the head that produces them, or leave these rows out"
        )


def check_pair(
    image: Float[Tensor, "n k"], text: Float[Tensor, "m k2"], what: str = "latents", *, start: int = 0
) -> None:
    """Raises ShapeMismatch unless both sides have the same rows and columns, NotFinite for NaN in either."""
    check_numbers(image, f"image {what}")
    check_numbers(text, f"text {what}")
    check_shapes(tuple(image.shape), tuple(text.shape), what)
    check_finite(image, f"image {what}", start=start)
    check_finite(text, f"text {what}", start=start)


def check_shapes(image: tuple[int, ...], text: tuple[int, ...], what: str = "latents") -> None:
    """Raises ShapeMismatch unless both sides have the same rows and columns."""
    if image != text:
        kind = "widths" if image[0] == text[0] else "numbers of pairs"
        raise ShapeMismatch(
            f"expected both sides of the same pairs, got image {what} of shape {image} and text {what} of shape "
            f"{text}: their {kind} differ; give the same pairs, through the same head"
        )


def check_rows(latents: Float[Tensor, "n k"], embeddings: Float[Tensor, "m d"]) -> None:
    """Raises ShapeMismatch unless there is one embedding per sample, NotFinite for NaN in either."""
    check_numbers(latents, "latents")
    check_numbers(embeddings, "embeddings")
    if len(latents) != len(embeddings):
        raise ShapeMismatch(
            f"expected one row per sample in both, got latents of {len(latents)} samples, embeddings of {len(embeddings)}"
        )
    check_finite(latents, "latents")
    check_finite(embeddings, "embeddings")


def chunks(x: Float[Tensor, "n d"], per_element: int = 16) -> Iterator[tuple[int, Float[Tensor, "c d"]]]:
    """Splits ``x`` into runs of rows that need at most CHUNK_BYTES to process; yields (first row, rows)."""
    size = max(1, CHUNK_BYTES // (max(1, x.shape[1]) * per_element))
    for begin in range(0, len(x), size):
        yield begin, x[begin : begin + size]
