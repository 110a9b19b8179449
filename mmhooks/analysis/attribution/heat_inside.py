"""How much of a feature's activation over an image lies on an object, and whether its peak does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mmhooks.analysis.attribution.feature_heat import Heat
from mmhooks.analysis.results import Estimate, Records, Result
from mmhooks.analysis.statistics.intervals import bootstrap, wilson
from mmhooks.errors import ShapeMismatch


def inside_mask(heat: Heat, mask: Bool[Tensor, "h w"]) -> float:
    """The share of a feature's activation that lies inside an object's mask.

    The activation of a cell is spread evenly over its rectangle; negative ones count as 0, and what lies on padding is outside.
    Of a heat whose values are all 1 it is the share that chance would give.

    Args:
        heat: of :func:`mmhooks.heat`.
        mask: in the original image's pixels.

    Raises:
        ShapeMismatch: a mask of another size than the image, or a feature that is active nowhere in it.

    >>> from PIL import Image
    >>> edges = torch.tensor([[0.0, 2.0], [2.0, 4.0]])
    >>> heat = Heat(torch.tensor([[3.0, 1.0], [0.0, 0.0]]), edges, edges, Image.new("RGB", (4, 4)), 0, "image.patches", "sae")
    >>> inside_mask(heat, torch.arange(4).expand(4, 4) < 1)     # the left half of the left cells
    0.375
    """
    _check(heat, mask)
    values = heat.values.double().clamp_min(0)
    down = _overlaps(heat.tops_bottoms, mask.shape[0])
    across = _overlaps(heat.lefts_rights, mask.shape[1])
    covered = down @ mask.double() @ across.T  # of each cell's rectangle, from 0 to 1
    return float((values * covered).sum() / values.sum())


def pointing_hit(heat: Heat, mask: Bool[Tensor, "h w"]) -> bool:
    """Whether the middle of the cell with the highest activation lies on the object.

    For rates with intervals and chance over images of one size, give ``heat.at_pixels()`` to
    :func:`~mmhooks.analysis.attribution.pointing_game.pointing_game`.

    Raises:
        ShapeMismatch: as :func:`inside_mask`.
    """
    _check(heat, mask)
    x, y = heat.peak
    row, column = int(y // 1), int(x // 1)
    on_image = 0 <= row < mask.shape[0] and 0 <= column < mask.shape[1]
    return on_image and bool(mask[row, column])


@dataclass(frozen=True)
class HeatOnObjects(Result):
    """How well a feature's heat fits objects, over the images in which it is active.

    Attributes:
        share: mean over images of the share of activation inside the mask, with its bootstrap interval.
        chance: the same for a feature that is equally active everywhere.
        hits: how often the middle of the strongest cell lies on the object, with its Wilson interval.
        images: all that were given, active or not.
    """

    share: Estimate
    chance: float
    hits: Estimate
    images: int

    def table(self) -> Records:
        row = {**self.share.columns("share inside"), "chance": self.chance, **self.hits.columns("hits")}
        return Records([row | {"images": self.images}])


def heat_on_objects(heats: Sequence[Heat], masks: Sequence[Tensor], *, seed: int = 0) -> HeatOnObjects:
    """:func:`inside_mask` and :func:`pointing_hit` over many images of any size, those left out in which the feature is silent.

    Args:
        heats: one feature's, of :func:`mmhooks.heat`.
        masks: one bool mask an image, in its pixels.
        seed: of the bootstrap.

    Raises:
        ShapeMismatch: other numbers of heats and masks, masks of another size than their image, or no image in which the
            feature is active.
    """
    if len(heats) != len(masks):
        raise ShapeMismatch(f"expected one mask for each heat, got {len(heats)} heats and {len(masks)} masks")
    active = [(heat, mask) for heat, mask in zip(heats, masks, strict=True) if float(heat.values.max()) > 0]
    if not active:
        raise ShapeMismatch(
            f"expected a feature that is active in an image, got one that is silent in all {len(heats)}"
        )
    even = [replace(heat, values=torch.ones_like(heat.values)) for heat, _ in active]
    chance = [inside_mask(heat, mask) for heat, (_, mask) in zip(even, active, strict=True)]
    return HeatOnObjects(
        share=bootstrap(torch.tensor([inside_mask(heat, mask) for heat, mask in active]), seed=seed),
        chance=sum(chance) / len(chance),
        hits=wilson(sum(pointing_hit(heat, mask) for heat, mask in active), len(active)),
        images=len(heats),
    )


def _check(heat: Heat, mask: Tensor) -> None:
    width, height = heat.image.size
    if tuple(mask.shape) != (height, width):
        raise ShapeMismatch(
            f"mask: expected one of the image's size, [{height}, {width}], got {list(mask.shape)}"
        )
    if not float(heat.values.max()) > 0:
        raise ShapeMismatch(
            f"expected an active feature, got feature {heat.feature} of {heat.head!r} at {heat.site!r}, which is active nowhere "
            "in this image; leave the image out"
        )


def _overlaps(edges: Float[Tensor, "m 2"], n: int) -> Float[Tensor, "m n"]:
    """The share of each cell's length that lies on each of ``n`` pixels."""
    begin, end = edges.double()[:, :1], edges.double()[:, 1:]
    pixels = torch.arange(n, dtype=torch.float64)
    lengths = (torch.minimum(end, pixels + 1) - torch.maximum(begin, pixels)).clamp_min(0)
    return lengths / (end - begin)
