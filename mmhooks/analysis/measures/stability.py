"""Stability: whether heads trained from different seeds have the same features."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from mmhooks.analysis.inputs.checks import check_finite
from mmhooks.analysis.results import Estimate, Records, Result
from mmhooks.analysis.statistics.intervals import bootstrap
from mmhooks.errors import NoDecoder, ShapeMismatch
from mmhooks.heads.base import Head


@dataclass(frozen=True)
class Stability(Result):
    """Decoder rows of two heads, matched one to one to maximise the sum of cosines.

    Attributes:
        mean: mean cosine of matched rows, with a bootstrap interval over features.
        chance: the same for as many random rows of the same width, uniform on the sphere.
        values: cosine of each row of the narrower head with its partner. partner: that row of the other head.
    """

    mean: Estimate
    chance: float
    values: Float[Tensor, " n"] = field(repr=False)
    partner: Int[Tensor, " n"] = field(repr=False)

    def table(self) -> Records:
        e = self.mean
        row = {
            "matched cosine": e.value,
            "low": e.low,
            "high": e.high,
            "chance": self.chance,
            "features": e.n,
        }
        return Records([row | {f"above {t}": float((self.values > t).float().mean()) for t in (0.7, 0.9)}])


def stability(one: Head, other: Head, *, seed: int = 0) -> Stability:
    """Matches the decoder rows of two heads, usually of two seeds (Hungarian mean max-cosine, Paulo & Belrose 2025).

    The assignment costs ``n^3``: seconds at n = 4,096.

    Raises:
        NoDecoder: a head has no decoder. ShapeMismatch: the heads differ in width.

    >>> from mmhooks.heads import TopKSAE
    >>> sae = TopKSAE(8, 32, 4)
    >>> round(stability(sae, sae).mean.value, 4)
    1.0
    """
    rows = [_directions(head) for head in (one, other)]
    if one.d_in != other.d_in:
        raise ShapeMismatch(
            f"stability: expected heads of the same width, got {one.d_in} and {other.d_in}: compare heads of the same site"
        )
    few, many = sorted(rows, key=len)
    values, partner = _match(few, many)
    generator = torch.Generator().manual_seed(seed)
    drawn = [normalize(torch.randn(r.shape, generator=generator), dim=1) for r in (few, many)]
    return Stability(bootstrap(values, seed=seed), float(_match(*drawn)[0].mean()), values, partner)


def _directions(head: Head) -> Float[Tensor, "n d"]:
    rows = getattr(head, "W_dec", None)
    if not head.has_decoder or rows is None:
        raise NoDecoder(
            f"stability: expected heads with decoder rows, got {head.name!r} ({head.kind}) without any"
        )
    rows = rows.detach().cpu().float()
    check_finite(rows, f"decoder rows of head {head.name!r}")
    return normalize(rows, dim=1)


def _match(few: Float[Tensor, "n d"], many: Float[Tensor, "m d"]) -> tuple[Tensor, Tensor]:
    from scipy.optimize import linear_sum_assignment

    cosine = few @ many.T
    partner = torch.from_numpy(linear_sum_assignment(cosine.numpy(), maximize=True)[1])
    return cosine.gather(1, partner[:, None]).squeeze(1), partner
