"""Things drawn into pictures: a drawing with transparency, at a size and place. Knows no model (like `words`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from mmhooks.errors import MMHooksError


@dataclass(frozen=True)
class Placing:
    """Where a thing stands: its longer side as a share of the picture's shorter one, its centre as (x, y), 0 to 1."""

    size: float = 0.6
    centre: tuple[float, float] = (0.5, 0.5)
    opacity: float = 1.0


def layers_of(rgba: UInt8[Tensor, "h w 4"]) -> Float[Tensor, "4 h2 w2"]:
    """A drawing cut to its ink, as colour times opacity, and opacity; from 0 to 1.

    Raises:
        MMHooksError: the drawing is transparent everywhere.

    >>> rgba = torch.zeros(8, 8, 4, dtype=torch.uint8); rgba[2:4, 1:7] = 255
    >>> layers_of(rgba).shape
    torch.Size([4, 2, 6])
    """
    some = rgba[..., 3] > 0
    if not bool(some.any()):
        raise MMHooksError(f"a drawing of {tuple(rgba.shape)} without a single pixel that is not transparent")
    rows, columns = (some.any(axis).nonzero().flatten() for axis in (1, 0))
    cut = rgba[int(rows[0]) : int(rows[-1]) + 1, int(columns[0]) : int(columns[-1]) + 1]
    layers = cut.permute(2, 0, 1).float() / 255
    return torch.cat([layers[:3] * layers[3:], layers[3:]])


def draw_into(
    picture: Float[Tensor, "3 h w"], thing: Float[Tensor, "4 th tw"], placing: Placing
) -> Float[Tensor, "3 h w"]:
    """The picture with the thing (as :func:`layers_of` gives it) on it; a copy.

    Raises:
        MMHooksError: it does not lie inside the picture.

    >>> thing = torch.ones(4, 8, 4)
    >>> int(draw_into(torch.zeros(3, 64, 64), thing, Placing(0.5)).sum() / 3)  # 32 x 16 px
    512
    """
    _, h, w = picture.shape
    scale = placing.size * min(h, w) / max(thing.shape[1:])
    tall, wide = (max(1, round(scale * side)) for side in thing.shape[1:])
    top, left = round(placing.centre[1] * h - tall / 2), round(placing.centre[0] * w - wide / 2)
    if top < 0 or left < 0 or top + tall > h or left + wide > w:
        raise MMHooksError(
            f"a thing of {tall} x {wide} px around {placing.centre} does not lie inside {h} x {w}; take a smaller "
            "size or another centre"
        )
    small = torch.nn.functional.interpolate(thing[None], (tall, wide), mode="bilinear", antialias=True)[0]
    small = small.clamp(0, 1) * placing.opacity
    out = picture.clone()
    region = out[:, top : top + tall, left : left + wide]
    region.mul_(1 - small[3:]).add_(small[:3])
    return out
