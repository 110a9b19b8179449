"""What every measure asks of its input first: numbers, and shapes that belong together."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from mmhooks.errors import NotFinite, ShapeMismatch

CHUNK_BYTES = 64 * 2**20  # temporary memory that a measure may take beside its input


def check_finite(x: Float[Tensor, "n d"], what: str, *, start: int = 0) -> None:
    """Raises NotFinite unless every number is finite: how many are not, and where the first ones stand."""
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
            "find the pair or the head that makes them, or leave these rows out"
        )


def check_pair(
    image: Float[Tensor, "n k"], text: Float[Tensor, "m k2"], what: str = "latents", *, start: int = 0
) -> None:
    """Raises ShapeMismatch unless both sides have the same rows and columns, NotFinite for NaN in either."""
    check_shapes(tuple(image.shape), tuple(text.shape), what)
    check_finite(image, f"image {what}", start=start)
    check_finite(text, f"text {what}", start=start)


def check_shapes(image: tuple[int, ...], text: tuple[int, ...], what: str = "latents") -> None:
    """Raises ShapeMismatch unless both sides have the same rows and columns."""
    if image != text:
        kind = "widths" if image[0] == text[0] else "numbers of pairs"
        raise ShapeMismatch(
            f"image {what} are {image}, text {what} {text}: their {kind} differ; give both sides of the same "
            "pairs, through the same head"
        )


def check_rows(latents: Float[Tensor, "n k"], embeddings: Float[Tensor, "m d"]) -> None:
    """Raises ShapeMismatch unless there is one embedding a sample, NotFinite for NaN in either."""
    if len(latents) != len(embeddings):
        raise ShapeMismatch(
            f"latents of {len(latents)} samples but embeddings of {len(embeddings)}: one row a sample in both"
        )
    check_finite(latents, "latents")
    check_finite(embeddings, "embeddings")


def chunks(x: Float[Tensor, "n d"], per_element: int = 16) -> Iterator[tuple[int, Float[Tensor, "c d"]]]:
    """``x`` in runs of rows whose work needs at most CHUNK_BYTES, each with the number of its first row."""
    size = max(1, CHUNK_BYTES // (max(1, x.shape[1]) * per_element))
    for begin in range(0, len(x), size):
        yield begin, x[begin : begin + size]
