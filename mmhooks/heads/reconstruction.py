"""Reconstruction quality of a head: FVU, cosine, L0, dead and rare features (methods.md, section 3)."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmhooks.errors import MMHooksError, ShapeMismatch
from mmhooks.heads.base import Head
from mmhooks.heads.vectors import Rows
from mmhooks.utils.files import write_text


@dataclass(frozen=True)
class Reconstruction:
    """The result of :func:`reconstruction` on ``n`` vectors. ``fvu`` and ``cosine`` are NaN without a decoder.

    Attributes:
        fvu: ``sum |x - x'|^2 / sum |x - mean|^2`` over the whole set.
        cosine: mean cosine of ``x`` and ``x'``.
        l0: mean number of active features.
        dead: share of features that never fired; ``rare``: that fired fewer than ``rare_below`` times.
        counts: how often each feature fired.
    """

    head: str
    n: int
    n_features: int
    fvu: float
    cosine: float
    l0: float
    dead: float
    rare: float
    rare_below: int
    counts: tuple[int, ...]

    @property
    def density(self) -> float:
        """Mean share of features active for a vector: ``l0 / n_features``."""
        return self.l0 / self.n_features

    def table(self) -> list[dict[str, Any]]:
        """One row with all numbers except the counts."""
        return [{k: v for k, v in asdict(self).items() if k != "counts"} | {"density": self.density}]

    def save(self, path: str | Path) -> Path:
        """Writes the numbers as JSON, atomically, and returns the path."""
        return write_text(path, json.dumps(asdict(self) | {"density": self.density}, indent=1) + "\n")


class Sums(NamedTuple):
    """Sums over a set of vectors; the sums of disjoint sets are combined by :func:`add`.

    Attributes:
        n: number of vectors. x_sum: their sum. square: sum of their squares.
        error: sum of ``|x - x'|^2``; cosine: sum of ``cos(x, x')``; both 0 without a decoder.
        counts: how often each feature fired.
    """

    n: Int[Tensor, ""]
    x_sum: Float[Tensor, " d"]
    square: Float[Tensor, ""]
    error: Float[Tensor, ""]
    cosine: Float[Tensor, ""]
    counts: Int[Tensor, " n"]

    @property
    def l0(self) -> float:
        return float(self.counts.sum() / self.n)

    @property
    def mean_cosine(self) -> float:
        return float(self.cosine / self.n)

    @property
    def fvu(self) -> float:
        """``sum |x - x'|^2 / sum |x - mean|^2``; NaN if all vectors are equal."""
        spread = float(self.square) - float(self.x_sum.square().sum()) / float(self.n)
        return float(self.error) / spread if spread > 0 else math.nan


def add(one: Sums, other: Sums) -> Sums:
    return Sums(*(a + b for a, b in zip(one, other, strict=True)))


@torch.no_grad()
def sums(x: Float[Tensor, "b d"], f: Float[Tensor, "b n"], back: Float[Tensor, "b d"] | None) -> Sums:
    """The sums of a batch of prepared vectors, their features and reconstructions; in double, on the CPU."""
    nothing = torch.zeros((), dtype=torch.float64)
    return Sums(
        torch.tensor(len(x)),
        x.sum(dim=0, dtype=torch.float64).cpu(),
        x.double().square().sum().cpu(),
        nothing if back is None else (x - back).double().square().sum().cpu(),
        nothing if back is None else torch.cosine_similarity(x, back, dim=-1).double().sum().cpu(),
        (f > 0).sum(dim=0).cpu(),
    )


@torch.no_grad()
def reconstruction(head: Head, *x: Rows, batch_size: int = 4096, rare_below: int = 5) -> Reconstruction:
    """Runs ``head`` over raw vectors (normalised first if the head expects it), batch by batch.

    Several sets are pooled; FVU is defined per modality, so pass one modality for FVU, and both to find features that
    fire in neither. ``mm.fidelity`` measures more: :mod:`mmhooks.analysis.measures.fidelity`.

    Raises:
        ShapeMismatch, NotFinite: as in :meth:`Head.prepare`. MMHooksError: fewer than two vectors.

    >>> from mmhooks.heads import TopKSAE
    >>> sae = TopKSAE(8, 32, k=4)
    >>> reconstruction(sae, torch.randn(100, 8)).l0 <= 4
    True
    """
    head.check_reconstructs("reconstruction")
    n = sum(len(part) for part in x)
    if n < 2:
        raise MMHooksError(f"expected at least 2 vectors, got {n}")
    device = next(head.parameters()).device
    total: Sums | None = None
    for raw in (b for part in x for b in part.split(batch_size)):
        rows = head.prepare(raw.to(device).float())
        f = head.encode(rows)
        found = sums(rows, f, head.decode(f) if head.has_decoder else None)
        total = found if total is None else add(total, found)
    assert total is not None
    return reconstruction_of(head, total, rare_below)


@torch.no_grad()
def prediction(
    head: Head, x: Rows, y: Rows, *, batch_size: int = 4096, rare_below: int = 5
) -> Reconstruction:
    """How well a transcoder predicts the vectors ``y`` of the second site from those of the first: FVU, cosine, L0, dead.

    Raises:
        MMHooksError: a head that reconstructs its input, or fewer than two rows. ShapeMismatch: unequal numbers of rows.

    >>> from mmhooks.heads import Transcoder
    >>> x = torch.randn(100, 8)
    >>> prediction(Transcoder(8, 32, k=4), x, 2 * x).l0 <= 4
    True
    """
    if head.reconstructs:
        raise MMHooksError(
            f"prediction: expected a transcoder, got {head.name!r} ({head.kind}), which reconstructs its input; use "
            "reconstruction(head, x)"
        )
    if len(x) != len(y):
        raise ShapeMismatch(f"prediction: expected one row of y per row of x, got {len(x)} and {len(y)}")
    if len(x) < 2:
        raise MMHooksError(f"expected at least 2 vectors, got {len(x)}")
    device = next(head.parameters()).device
    total: Sums | None = None
    for begin in range(0, len(x), batch_size):
        rows = head.prepare(x[begin : begin + batch_size].to(device).float())
        target = y[begin : begin + batch_size].to(device).float()
        f = head.encode(rows)
        found = sums(target, f, head.predict(f, rows))  # type: ignore[operator]
        total = found if total is None else add(total, found)
    assert total is not None
    return reconstruction_of(head, total, rare_below)


def reconstruction_of(head: Head, total: Sums, rare_below: int = 5) -> Reconstruction:
    """The result computed from the sums."""
    counts = total.counts
    return Reconstruction(
        head=head.id,
        n=int(total.n),
        n_features=head.n_features,
        fvu=total.fvu if head.has_decoder else math.nan,
        cosine=total.mean_cosine if head.has_decoder else math.nan,
        l0=total.l0,
        dead=float((counts == 0).double().mean()),
        rare=float(((counts > 0) & (counts < rare_below)).double().mean()),
        rare_below=rare_below,
        counts=tuple(counts.tolist()),
    )
