"""How the two modalities lie in the shared space, and how often features fire."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from mmhooks.analysis.checks import check_finite, check_pair, chunks
from mmhooks.analysis.intervals import Estimate, bootstrap, from_draws
from mmhooks.analysis.results import Result, Table


@dataclass(frozen=True)
class ModalityGap(Result):
    """Distance between the mean image and the mean text embedding, and the mean cosine of pairs."""

    gap: Estimate
    pair_cosine: Estimate

    def table(self) -> Table:
        rows = {"modality gap": self.gap, "cosine of pairs": self.pair_cosine}
        return Table(
            {"measure": k, "value": e.value, "low": e.low, "high": e.high, "n": e.n} for k, e in rows.items()
        )


@dataclass(frozen=True)
class Density(Result):
    """Share of samples that activate each feature, and how many features a sample activates (L0)."""

    values: Float[Tensor, " n"]
    l0: Estimate
    dead: float
    n_samples: int = field(default=0)

    def table(self) -> Table:
        e = self.l0
        return Table(
            [{"L0": e.value, "low": e.low, "high": e.high, "dead": self.dead, "samples": self.n_samples}]
        )


@torch.no_grad()
def modality_gap(
    image_emb: Float[Tensor, "n d"], text_emb: Float[Tensor, "n2 d2"], *, draws: int = 200, seed: int = 0
) -> ModalityGap:
    """``|mean image - mean text|`` of unit embeddings of pairs, bootstrapped over pairs.

    Raises:
        ShapeMismatch: sides of different shape. NotFinite: NaN in either.

    >>> round(modality_gap(torch.tensor([[1.0, 0.0]] * 3), torch.tensor([[0.0, 1.0]] * 3)).gap.value, 4)
    1.4142
    """
    check_pair(image_emb, text_emb, "embeddings")
    image, text = (normalize(x.detach().cpu().float(), dim=1) for x in (image_emb, text_emb))
    apart, n = image - text, len(image)
    value = float(apart.mean(0).norm())
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for _ in range(draws if n > 1 else 0):
        # How often each pair is drawn, so that a resample is one product and no copy.
        weights = torch.bincount(torch.randint(n, (n,), generator=generator), minlength=n).float()
        drawn.append(float((weights @ apart / n).norm()))
    gap = (
        from_draws(value, torch.tensor(drawn), n) if drawn else Estimate(value, float("nan"), float("nan"), n)
    )
    return ModalityGap(gap, bootstrap((image * text).sum(1), draws=500, seed=seed))


@torch.no_grad()
def density(latents: Float[Tensor, "samples n"], *, seed: int = 0) -> Density:
    """How often each feature is not 0, and L0 of samples with its interval.

    Raises:
        NotFinite: NaN or infinity in the latents.

    >>> density(torch.tensor([[1.0, 0.0], [2.0, 0.0]])).values
    tensor([1., 0.], dtype=torch.float64)
    """
    check_finite(latents, "latents")
    counts = torch.zeros(latents.shape[1], dtype=torch.float64)
    l0 = []
    for _, part in chunks(latents):
        fires = part != 0
        counts += fires.sum(0).cpu()
        l0.append(fires.sum(1).float().cpu())
    values = counts / max(len(latents), 1)
    return Density(
        values,
        bootstrap(torch.cat(l0), draws=500, seed=seed),
        float((counts == 0).float().mean()),
        len(latents),
    )
