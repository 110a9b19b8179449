"""Masks of heat maps, as DAAM's public code makes them, and their overlap with objects."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from mmhooks.analysis.inputs.checks import check_finite
from mmhooks.analysis.results import Estimate, Records, Result
from mmhooks.analysis.statistics.intervals import bootstrap
from mmhooks.errors import ShapeMismatch


def expand_as(
    heat: Float[Tensor, "n h w"], image: Any, *, absolute: bool = False, threshold: float | None = None
) -> Float[Tensor, "n H W"]:
    """Resizes heat maps bicubically to an image's size, and cuts them (``WordHeatMap.expand_as`` of DAAM's public code).

    Args:
        image: a PIL image, or height and width.
        absolute: leave the heat as it is. Otherwise every map is stretched from 0 to 1 first, so a threshold is a share
            of its own range. The public code's absolute heat is summed over steps, ours is a mean over them.
        threshold: 1 where the heat is above it, else 0; default: the heat itself.

    Raises:
        NotFinite: heat is NaN or infinite. ShapeMismatch: not a size.

    >>> expand_as(torch.eye(2)[None], (4, 4), threshold=0.5)[0].diagonal()
    tensor([1., 1., 1., 1.])
    """
    check_finite(heat.flatten(1), "heat")
    large = F.interpolate(heat[:, None].float(), _size_of(image), mode="bicubic", align_corners=False)[:, 0]
    if not absolute:
        low, high = large.amin((1, 2), keepdim=True), large.amax((1, 2), keepdim=True)
        large = (large - low) / (high - low + 1e-8)
    return large if threshold is None else (large > threshold).float()


@dataclass(frozen=True)
class HeatOverlap(Result):
    """Intersection over union of thresholded heat with objects, one per map.

    Attributes:
        iou: mean over maps, with its bootstrap interval.
        area: mean share of the image that is above the threshold. chance: mean IoU of a mask of all of the image.
    """

    threshold: float
    absolute: bool
    ious: Float[Tensor, " n"] = field(repr=False)
    iou: Estimate
    area: float
    chance: float

    def table(self) -> Records:
        row = {"threshold": self.threshold, **self.iou.columns("IoU")}
        return Records([row | {"area": self.area, "IoU of the whole image": self.chance}])


def heat_overlap(
    heat: Float[Tensor, "n h w"],
    masks: Bool[Tensor, "n2 H W"],
    *,
    threshold: float = 0.4,
    absolute: bool = False,
    seed: int = 0,
) -> HeatOverlap:
    """Computes the IoU of every heat map, cut at ``threshold`` by :func:`expand_as`, with the object's mask.

    Source: Tang et al. 2022 ("What the DAAM"), Section 3, with thresholds 0.3, 0.4 and 0.5; ``compute_iou``.

    Raises:
        ShapeMismatch: the numbers of maps and masks differ, there is none, or a mask is empty.
        NotFinite: heat is NaN or infinite.
    """
    if len(heat) != len(masks) or not len(heat):
        raise ShapeMismatch(f"expected one mask per map, got {len(heat)} maps and {len(masks)} masks")
    empty = ~masks.flatten(1).any(1)
    if bool(empty.any()):
        raise ShapeMismatch(f"masks: expected an object in each, got none in mask {int(empty.nonzero()[0])}")
    cut = expand_as(heat, masks.shape[-2:], absolute=absolute, threshold=threshold).flatten(1) > 0
    flat = masks.flatten(1)
    ious = (cut & flat).sum(1) / (cut | flat).sum(1)
    return HeatOverlap(
        threshold=threshold,
        absolute=absolute,
        ious=ious,
        iou=bootstrap(ious, seed=seed),
        area=float(cut.float().mean()),
        chance=float(flat.float().mean()),
    )


def _size_of(image: Any) -> tuple[int, int]:
    if isinstance(image, (tuple, list, torch.Size)):
        if len(image) != 2 or min(image) < 1:
            raise ShapeMismatch(f"image: expected height and width, got {tuple(image)}")
        return int(image[0]), int(image[1])
    if not hasattr(image, "height"):
        raise ShapeMismatch(f"image: expected a PIL image, or height and width, got a {type(image).__name__}")
    return image.height, image.width
