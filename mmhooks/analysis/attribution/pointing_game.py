"""The pointing game: whether the hottest place of a map lies on the object."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from mmhooks.analysis.inputs.checks import check_finite
from mmhooks.analysis.results import Estimate, Records, Result
from mmhooks.analysis.statistics.intervals import wilson
from mmhooks.errors import ShapeMismatch


@dataclass(frozen=True)
class PointingGame(Result):
    """How often the position with the most heat lies on the object.

    Attributes:
        rate: share of hits of the hottest position, with its Wilson interval.
        chance: mean share of the image that the object covers, the hit rate of a random position.
        centre: share of hits of the image's centre, a better baseline where objects are centred.
        energy: mean share of the heat that lies on the object.
    """

    rate: Estimate
    chance: float
    centre: Estimate
    energy: float

    def table(self) -> Records:
        row = self.rate.columns("hits")
        return Records([row | {"chance": self.chance, "centre": self.centre.value, "energy": self.energy}])


def pointing_game(heat: Float[Tensor, "n h w"], masks: Bool[Tensor, "n2 H W"]) -> PointingGame:
    """Compares each map's hottest position, at the masks' resolution, with the object's mask (Zhang et al. 2016).

    Masks that cover nothing or everything are left out.

    Raises:
        ShapeMismatch: the numbers of maps and masks differ, or no mask is left.
        NotFinite: heat is NaN or infinite.
    """
    if len(heat) != len(masks):
        raise ShapeMismatch(f"expected one mask per map, got {len(heat)} maps and {len(masks)} masks")
    check_finite(heat.flatten(1), "heat")
    flat = masks.flatten(1)
    decides = flat.any(1) & ~flat.all(1)
    if not decides.any():
        raise ShapeMismatch(
            f"masks: expected one with both object and background, got none of the {len(masks)} masks"
        )
    heat, masks, flat = heat[decides].float(), masks[decides], flat[decides]
    size = (masks.shape[-2], masks.shape[-1])
    large = F.interpolate(heat[:, None], size, mode="bilinear", align_corners=False)[:, 0].flatten(1)
    hit = flat.gather(1, large.argmax(1, keepdim=True))
    share = (large * flat).sum(1) / large.sum(1).clamp_min(torch.finfo(large.dtype).tiny)
    return PointingGame(
        rate=wilson(int(hit.sum()), len(hit)),
        chance=float(flat.float().mean()),
        centre=wilson(int(masks[:, size[0] // 2, size[1] // 2].sum()), len(masks)),
        energy=float(share.mean()),
    )
