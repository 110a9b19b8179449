"""Composites objects into images: a drawing with transparency, at a given size and position. Independent of models."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from mmhooks.errors import MMHooksError


@dataclass(frozen=True)
class Placement:
    """Placement of an object: its longer side relative to the image's shorter one, and its centre (x, y) in 0 to 1."""

    size: float = 0.6
    centre: tuple[float, float] = (0.5, 0.5)
    opacity: float = 1.0


def to_layers(rgba: UInt8[Tensor, "h w 4"]) -> Float[Tensor, "4 h2 w2"]:
    """A drawing cropped to its visible part, as premultiplied colour and opacity, from 0 to 1.

    Raises:
        MMHooksError: the drawing is completely transparent.

    >>> rgba = torch.zeros(8, 8, 4, dtype=torch.uint8); rgba[2:4, 1:7] = 255
    >>> to_layers(rgba).shape
    torch.Size([4, 2, 6])
    """
    visible = rgba[..., 3] > 0
    if not bool(visible.any()):
        raise MMHooksError(
            f"expected a drawing with visible pixels, got a transparent one of shape {tuple(rgba.shape)}"
        )
    rows, columns = (visible.any(axis).nonzero().flatten() for axis in (1, 0))
    cut = rgba[int(rows[0]) : int(rows[-1]) + 1, int(columns[0]) : int(columns[-1]) + 1]
    layers = cut.permute(2, 0, 1).float() / 255
    return torch.cat([layers[:3] * layers[3:], layers[3:]])


def draw_into(
    image: Float[Tensor, "3 h w"], drawing: Float[Tensor, "4 th tw"], placement: Placement
) -> Float[Tensor, "3 h w"]:
    """A copy of the image with the object (from :func:`to_layers`) on it.

    Raises:
        MMHooksError: it does not fit inside the image.

    >>> drawing = torch.ones(4, 8, 4)
    >>> int(draw_into(torch.zeros(3, 64, 64), drawing, Placement(0.5)).sum() / 3)  # 32 x 16 px
    512
    """
    _, h, w = image.shape
    scale = placement.size * min(h, w) / max(drawing.shape[1:])
    tall, wide = (max(1, round(scale * side)) for side in drawing.shape[1:])
    top, left = round(placement.centre[1] * h - tall / 2), round(placement.centre[0] * w - wide / 2)
    if top < 0 or left < 0 or top + tall > h or left + wide > w:
        raise MMHooksError(
            f"an object of {tall} x {wide} px around {placement.centre} does not fit into {h} x {w}; choose a smaller "
            "size or another centre"
        )
    small = torch.nn.functional.interpolate(drawing[None], (tall, wide), mode="bilinear", antialias=True)[0]
    small = small.clamp(0, 1) * placement.opacity
    out = image.clone()
    region = out[:, top : top + tall, left : left + wide]
    region.mul_(1 - small[3:]).add_(small[:3])
    return out
