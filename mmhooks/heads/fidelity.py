"""How much of a vector survives a head: FVU, cosine, L0, dead and rare features (methods.md, section 3)."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmhooks.errors import MMHooksError
from mmhooks.heads.base import Head


@dataclass(frozen=True)
class Fidelity:
    """What :func:`fidelity` measured on ``n`` vectors. ``fvu`` and ``cosine`` are NaN without a decoder.

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
        """Share of features that a vector activates: ``l0 / n_features``."""
        return self.l0 / self.n_features

    def table(self) -> list[dict[str, Any]]:
        """One row of the numbers, without the counts."""
        return [{k: v for k, v in asdict(self).items() if k != "counts"} | {"density": self.density}]

    def save(self, path: str | Path) -> Path:
        path = Path(path)
        path.write_text(json.dumps(asdict(self) | {"density": self.density}, indent=1) + "\n")
        return path


@torch.no_grad()
def fidelity(head: Head, *x: Float[Tensor, "_ d"], batch_size: int = 4096, rare_below: int = 5) -> Fidelity:
    """Runs ``head`` over raw vectors (given unit norm first where the head expects it), batch by batch.

    Several sets count as one; FVU is per modality, so pass one modality for FVU and both to learn which
    features fire in neither.

    Raises:
        ShapeMismatch, NotFinite: as :meth:`Head.prepare`. MMHooksError: fewer than two vectors.

    >>> from mmhooks.heads import TopKSAE
    >>> sae = TopKSAE(8, 32, k=4)
    >>> fidelity(sae, torch.randn(100, 8)).l0 <= 4
    True
    """
    n = sum(len(part) for part in x)
    if n < 2:
        raise MMHooksError(f"fidelity needs at least 2 vectors, came {n}")
    device = next(head.parameters()).device
    sums: dict[str, Any] = {"error": 0.0, "cosine": 0.0, "square": 0.0, "active": 0}
    x_sum = torch.zeros(head.d_in, dtype=torch.float64)
    counts = torch.zeros(head.n_features, dtype=torch.long)
    for raw in (b for part in x for b in part.split(batch_size)):
        rows = head.prepare(raw.to(device).float())
        f = head.encode(rows)
        active = f > 0
        counts += active.sum(dim=0).cpu()
        sums["active"] += int(active.sum())
        x_sum += rows.double().sum(dim=0).cpu()
        sums["square"] += float(rows.double().square().sum())
        if head.has_decoder:
            back = head.decode(f)
            sums["error"] += float((rows - back).double().square().sum())
            sums["cosine"] += float(torch.cosine_similarity(rows, back, dim=-1).double().sum())
    spread = sums["square"] - float(x_sum.square().sum()) / n
    nan = float("nan")
    return Fidelity(
        head=head.id,
        n=n,
        n_features=head.n_features,
        fvu=sums["error"] / spread if head.has_decoder and spread > 0 else nan,
        cosine=sums["cosine"] / n if head.has_decoder else nan,
        l0=sums["active"] / n,
        dead=float((counts == 0).double().mean()),
        rare=float(((counts > 0) & (counts < rare_below)).double().mean()),
        rare_below=rare_below,
        counts=tuple(counts.tolist()),
    )


@torch.no_grad()
def effective_rank(f: Float[Tensor, "rows n"]) -> float:
    """exp of the entropy of the normalised singular values of the centred rows (Roy & Vetterli 2007).

    >>> round(effective_rank(torch.eye(5) - 0.2), 3)
    4.0
    """
    s = torch.linalg.svdvals(f.double() - f.double().mean(dim=0))
    if float(s.sum()) == 0:
        return 0.0
    p = s / s.sum()
    return float(torch.exp(-torch.xlogy(p, p).sum()))
