"""Training rows, from tensors in memory or from a store of activations on disk.

Both become :class:`Vectors`, which returns rows normalised as the head expects when they are indexed. So the data is
never copied as a whole, and a store larger than memory can be trained on like a tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmhooks.errors import MMHooksError, NotFinite, ShapeMismatch
from mmhooks.heads.base import Head

SITES = ("image.embed", "text.embed")


class Vectors:
    """The rows of one modality, in single precision and normalised as ``head`` expects.

    Indexed by a slice or by row numbers; ``split`` iterates over all rows in order, like a tensor's.

    >>> from mmhooks.heads import TopKSAE
    >>> x = Vectors(torch.tensor([[3.0, 4.0], [0.0, 2.0]]), TopKSAE(2, 4, 1), torch.device("cpu"))
    >>> x[torch.tensor([1, 0])]
    tensor([[0.0000, 1.0000],
            [0.6000, 0.8000]])
    """

    def __init__(self, rows: Any, head: Head, device: torch.device) -> None:
        self.rows, self.head, self.device = rows, head, device

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, which: slice | Int[Tensor, " b"]) -> Float[Tensor, "b d"]:
        if isinstance(which, Tensor):
            on = self.rows.device if isinstance(self.rows, Tensor) else torch.device("cpu")
            which = which.to(on)
        x = self.rows[which].to(self.device, torch.float32)
        # check_all_rows has verified that every row is finite and not zero.
        return self.head.scaled(x)[0]

    def split(self, size: int) -> Iterator[Float[Tensor, "b d"]]:
        for begin in range(0, len(self), size):
            yield self[begin : begin + size]

    def sample(self, most: int) -> Float[Tensor, "b d"]:
        """Evenly spaced rows, fewer than twice ``most``; all rows if there are not more."""
        return self[torch.arange(0, len(self), max(1, len(self) // most))]


class SelectedRows:
    """Some rows of a tensor or a stored site, fetched on access."""

    def __init__(self, rows: Any, index: Int[Tensor, " m"]) -> None:
        self.rows, self.index = rows, index
        self.shape = (len(index), *rows.shape[1:])

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, which: slice | Int[Tensor, " b"]) -> Tensor:
        return self.rows[self.index[which]]


class PositionRows:
    """Every position of a stored map ``(n, height, width, d)`` as a separate row, in order, fetched on access."""

    def __init__(self, rows: Any) -> None:
        self.rows, self.each = rows, prod(rows.shape[1:-1])
        self.shape = (len(rows) * self.each, rows.shape[-1])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, which: slice | Int[Tensor, " b"]) -> Float[Tensor, "b d"]:
        if isinstance(which, slice):
            begin, end, _ = which.indices(len(self))
            first = begin // self.each
            maps = self.rows[first : -(-end // self.each)]
            return maps.flatten(0, -2)[begin - first * self.each : end - first * self.each]
        pairs, back = (which // self.each).unique(return_inverse=True)
        return self.rows[pairs].flatten(1, -2)[back, which % self.each]


Rows = Float[Tensor, "_ d"] | Vectors
"""A modality's training data as passed to an objective: both types have ``len``, slices and ``split``."""


def evenly_spaced(rows: Rows, most: int) -> Float[Tensor, "_ d"]:
    """Evenly spaced rows, fewer than twice ``most``; all rows if there are not more."""
    return rows.sample(most) if isinstance(rows, Vectors) else rows[:: max(1, len(rows) // most)]


def training_rows(data: Any, text: Any = None, sites: Sequence[str] = SITES) -> tuple[Any, Any]:
    """Image rows and text rows (or None) from a pair of tensors or stored sites, a store, or the directory of one.

    From a store: the first of ``sites``, and the second if present; in feature maps, every position is a row.

    Raises:
        MMHooksError: a store together with a tensor, or more than two sites.
        ShapeMismatch: a site without one dense vector per row.
    """
    if isinstance(data, str | Path):
        from mmhooks.data.store import Store

        data = Store(data)
    if not hasattr(data, "sites"):
        return data, text
    if text is not None:
        raise MMHooksError("a store contains both modalities: pass text= only with a tensor, or name sites=")
    if not 1 <= len(sites) <= 2:
        raise MMHooksError(f"expected one or two sites to train on, got {list(sites)}")
    wanted = [sites[0]] + [s for s in sites[1:] if s in data.sites or tuple(sites) != SITES]
    parts = [data[name] for name in wanted]
    parts = [PositionRows(p) if getattr(getattr(p, "spec", None), "positions", False) else p for p in parts]
    for name, rows in zip(wanted, parts, strict=True):
        if isinstance(rows, PositionRows):
            continue
        if rows.is_sparse or len(rows.shape) != 2:
            kind = "sparse features" if rows.is_sparse else f"rows of shape {tuple(rows.shape[1:])}"
            raise ShapeMismatch(
                f"site {name!r} of the store: expected one dense vector per row, as at {SITES[0]!r}, got {kind}"
            )
    return parts[0], parts[1] if len(parts) == 2 else None


def hold_out_every_tenth(
    image: Any, text: Any
) -> tuple[tuple[SelectedRows, SelectedRows | None], tuple[Tensor, Tensor | None]]:
    """Splits off every tenth pair: training pairs, which are not read, and held-out pairs, which are."""
    each = image.each if isinstance(image, PositionRows) else 1  # positions of one image stay on one side
    held = torch.arange(len(image)) // each % 10 == 9
    inside, outside = (~held).nonzero().squeeze(1), held.nonzero().squeeze(1)
    return (
        (SelectedRows(image, inside), None if text is None else SelectedRows(text, inside)),
        (image[outside].float(), None if text is None else text[outside].float()),
    )


def held_out_pairs(store: Any) -> tuple[Any, Any]:
    """A store without every tenth of its pairs, and these pairs; all tokens of a pair are on one side. Nothing is read."""
    held = torch.arange(len(store.pairs)) % 10 == 9
    return tuple(store.rows(store.pairs.rows_of(side.nonzero().squeeze(1))) for side in (~held, held))  # type: ignore


def as_vectors(head: Head, image: Any, text: Any, device: torch.device) -> tuple[Vectors, Vectors | None]:
    """Both modalities as :class:`Vectors`, after checking every row.

    Raises:
        ShapeMismatch: a width other than the head's, fewer than two rows, modalities of different length.
        NotFinite: NaN, infinity or a row of zeros; says where.
    """
    if text is not None and len(text) != len(image):
        raise ShapeMismatch(
            f"expected one row per pair in image and text, got {len(image)} and {len(text)} rows"
        )
    if len(image) < 2:
        raise ShapeMismatch(f"expected at least 2 training pairs, got {len(image)}")
    parts: list[Vectors | None] = []
    for name, rows in (("image", image), ("text", text)):
        if isinstance(rows, Tensor):
            rows = rows.detach().to(device)
        if rows is not None:
            check_all_rows(head, rows, name)
        parts.append(None if rows is None else Vectors(rows, head, device))
    assert parts[0] is not None
    return parts[0], parts[1]


def check_all_rows(head: Head, rows: Any, name: str, step: int = 16384) -> None:
    """Passes every row through :meth:`Head.prepare`, in chunks."""
    for begin in range(0, len(rows), step):
        try:
            head.prepare(rows[begin : begin + step].to(torch.float32))
        except NotFinite as fault:
            where = f"training data, {name}" + (f", rows counted from {begin} on" if begin else "")
            raise NotFinite(f"{where}: {fault}") from None
