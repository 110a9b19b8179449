"""Where the pixels that a model reads come from: the map from an image to what its preprocessing makes of it.

Resizing, cropping and padding move and scale an image along its two axes, so one scale and one offset an axis say it all. They
are computed for torchvision's, timm's and open_clip's transforms and for transformers' image processors, and measured for any
other function: what it makes of an image whose brightness rises along one axis tells where each of its pixels comes from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from mmhooks.errors import MMHooksError
from mmhooks.models.processing import Preprocess, SquarePreprocess


@dataclass(frozen=True)
class Axis:
    """One axis: ``position in the pixels = scale * position in the image + offset``, from edge to edge.

    Attributes:
        before, after: sizes of the image and of what the model reads.
    """

    before: int
    after: int
    scale: float
    offset: float = 0.0

    def back(self, position: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """Where a position in the pixels is in the image; outside it where padding is."""
        return (position - self.offset) / self.scale


@dataclass(frozen=True)
class PixelMap:
    """Both axes of a preprocessing at one size of image.

    >>> PixelMap(Axis(100, 50, 0.5), Axis(200, 50, 0.5, -25.0)).columns.back(torch.tensor([0.0, 50.0]))
    tensor([ 50., 150.])
    """

    rows: Axis
    columns: Axis


def pixel_map(preprocess: Callable[..., Any], size: tuple[int, int]) -> PixelMap:
    """How a model's preprocessing maps an image of ``size`` (width, height), computed where it is known, else measured.

    Raises:
        MMHooksError: as :func:`measured_map`.

    >>> from torchvision.transforms import CenterCrop, Compose, Resize, ToTensor
    >>> pixel_map(Compose([Resize(32), CenterCrop(32), ToTensor()]), (96, 48)).columns
    Axis(before=96, after=32, scale=0.6666666666666666, offset=-16.0)
    """
    known = _of_processor(preprocess, size)
    if known is None:
        known = _of_transforms(preprocess, size)
    return measured_map(preprocess, size) if known is None else known


# -- known -----------------------------------------------------------------------------------------------------

# What torchvision, timm and open_clip call the transforms that leave each pixel where it is.
_STILL = {"ToTensor", "MaybeToTensor", "MaybePILToTensor", "PILToTensor", "ToImage", "ConvertImageDtype", "ToDtype",
          "Normalize", "MaybeConvertMode", "RGB"}  # fmt: skip
_RESIZES, _CROPS = ("Resize", "ResizeKeepRatio"), ("CenterCrop", "CenterCropOrPad")


def _of_transforms(preprocess: Any, size: tuple[int, int]) -> PixelMap | None:
    """Of a list of transforms all of which are known; a resize is asked for the size that it gives a blank image."""
    steps = getattr(preprocess, "transforms", [preprocess])
    names = [type(step).__name__ for step in steps]
    if not {*names} <= {*_STILL, *_RESIZES, *_CROPS} or any(
        getattr(s, "random_scale_prob", 0) for s in steps
    ):
        return None
    blank = Image.new("RGB", size)  # a fill may have three numbers
    axes = [Axis(n, n, 1.0) for n in size]
    for step, name in zip(steps, names, strict=True):
        if name in _RESIZES:
            blank = step(blank)
            axes = [_resized(axis, n) for axis, n in zip(axes, blank.size, strict=True)]
        elif name in _CROPS:
            blank = step(blank)
            axes = [_cropped(axis, n, _rounded) for axis, n in zip(axes, blank.size, strict=True)]
    return PixelMap(axes[1], axes[0])


def _of_processor(preprocess: Any, size: tuple[int, int]) -> PixelMap | None:
    """Of an image processor of transformers that resizes, then crops, as those of CLIP, SigLIP, ViT and DINO do."""
    if isinstance(preprocess, SquarePreprocess):
        across, down = (_resized(Axis(n, n, 1.0), preprocess.side) for n in size)
        return PixelMap(down, across)
    if not isinstance(preprocess, Preprocess):
        return None
    processor: Any = preprocess.processor
    if any(
        getattr(processor, name, None) for name in ("do_pad", "do_thumbnail", "do_crop_margin", "crop_pct")
    ):
        return None
    axes = [Axis(n, n, 1.0) for n in size]
    if getattr(processor, "do_resize", False):
        wanted = _named(processor.size)
        if {*wanted} == {"height", "width"}:
            sizes = [wanted["width"], wanted["height"]]
        elif {*wanted} == {"shortest_edge"}:
            short = min(size)
            sizes = [wanted["shortest_edge"] * n // short for n in size]
        else:
            return None
        axes = [_resized(axis, n) for axis, n in zip(axes, sizes, strict=True)]
    if getattr(processor, "do_center_crop", False):
        wanted = _named(processor.crop_size)
        sizes = [wanted.get("width", 0), wanted.get("height", 0)]
        if any(n > axis.after or not n for axis, n in zip(axes, sizes, strict=True)):
            return None  # its two back ends pad differently
        axes = [_cropped(axis, n, lambda spare: spare // 2) for axis, n in zip(axes, sizes, strict=True)]
    return PixelMap(axes[1], axes[0])


def _named(size: Any) -> dict[str, int]:
    """The entries of a size of transformers that are set."""
    return {name: int(n) for name, n in dict(size).items() if n is not None}


def _resized(axis: Axis, after: int) -> Axis:
    factor = after / axis.after
    return Axis(axis.before, after, axis.scale * factor, axis.offset * factor)


def _cropped(axis: Axis, after: int, half: Callable[[int], int]) -> Axis:
    """A crop around the centre, or padding where there is less."""
    spare = axis.after - after
    moved = -half(spare) if spare >= 0 else -spare // 2
    return Axis(axis.before, after, axis.scale, axis.offset + moved)


def _rounded(spare: int) -> int:
    return round(spare / 2.0)


# -- measured --------------------------------------------------------------------------------------------------

_TOLERANCE = 0.02  # of the image's side: how far a pixel may lie from the fitted map
_WHOLE = (
    0.15  # pixels: an axis whose ends are this close to the image's is taken to be exactly the whole image
)


def measured_map(preprocess: Callable[..., Any], size: tuple[int, int]) -> PixelMap:
    """The map of any preprocessing that moves and scales along the axes, by what it makes of four images of ``size`` (width,
    height): black, white, and brightness that rises from left to right, or from top to bottom.

    Pixels that black and white images share are padding. Brightness has 256 steps, so a place is known to some tenths of
    a pixel.

    Raises:
        MMHooksError: no ``[3 h w]``, or what the preprocessing makes does not follow such a map: it rotates, distorts, or changes
            colours by their surroundings.
    """
    width, height = size
    black, white = (_made(preprocess, np.full((height, width), shade, np.uint8)) for shade in (0, 255))
    spread = white - black
    shown = spread.abs().amax(0) > 0.5 * float(spread.abs().max())
    if not bool(shown.any()) or not float(spread.abs().max()):
        raise MMHooksError(
            f"preprocess: expected bright images to differ from dark ones, got the same pixels for both (size {width} x {height})"
        )
    found = []
    for axis, n in ((0, height), (1, width)):
        ramp = (np.arange(n) + 0.5) / n * 255
        table = np.broadcast_to(ramp[:, None] if axis == 0 else ramp[None], (height, width))
        made = _made(preprocess, table.round().astype(np.uint8))
        # Where in the image each pixel comes from, from 0 to 1.
        share = ((made - black) / torch.where(shown, spread, torch.ones_like(spread))).mean(0)
        found.append(_fitted(share, shown, axis, n))
    return PixelMap(*found)


def _made(preprocess: Callable[..., Any], grey: np.ndarray) -> Float[Tensor, "3 h w"]:
    pixels = preprocess(Image.fromarray(grey).convert("RGB"))
    if not isinstance(pixels, Tensor) or pixels.dim() != 3:
        got = list(pixels.shape) if isinstance(pixels, Tensor) else type(pixels).__name__
        raise MMHooksError(f"preprocess: expected one that makes pixels [3 h w] of an image, got {got}")
    return pixels.double()


def _fitted(share: Float[Tensor, "h w"], shown: Tensor, axis: int, before: int) -> Axis:
    """The line through the shares along one axis, away from the image's edges, where resizing sees only one side."""
    lines, seen = (share.T, shown.T) if axis == 1 else (share, shown)
    kept = seen.any(1)
    values = torch.stack([line[mask].mean() for line, mask in zip(lines[kept], seen[kept], strict=True)])
    positions = kept.nonzero().flatten().double() + 0.5
    edge = 3 * max(1 / before, float((values.max() - values.min()) / len(values)))
    inner = (values > edge) & (values < 1 - edge)
    if int(inner.sum()) < 2:
        raise MMHooksError(
            f"preprocess: expected at least 2 pixels away from the image's edges, got {int(inner.sum())} along an axis of "
            f"{before}; give a larger image"
        )
    x, y = positions[inner], values[inner]
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())
    start = float(y.mean() - slope * x.mean())
    distance = (lines - (slope * (torch.arange(len(lines)).double()[:, None] + 0.5) + start)).abs()
    within = seen & (lines > edge) & (lines < 1 - edge)
    off = float(distance[within].max())
    if slope <= 0 or off > _TOLERANCE:
        raise MMHooksError(
            f"preprocess: expected one that scales, crops and pads, got pixels that lie up to {off:.0%} of the image away from "
            f"the closest such map (slope {slope:.4f}): it turns, mirrors or distorts images, or changes colours by their "
            "surroundings"
        )
    scale, offset, after = 1 / (slope * before), -start / slope, len(lines)
    if max(abs(offset), abs(offset + scale * before - after)) < _WHOLE:
        scale, offset = after / before, 0.0
    return Axis(before, after, scale, offset)
