"""Heat maps drawn over images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mmhooks.errors import NotFinite, ShapeMismatch
from mmhooks.report.style import LIGHT, Palette
from mmhooks.utils.escape import one_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image


def overlay(image: Image, heat: Any, *, strength: float = 0.6, colours: str = "inferno") -> Image:
    """Draws ``heat`` (``[h w]``, any size) over the image; colours span its own minimum to maximum.

    Raises:
        ShapeMismatch: ``heat`` does not have two dimensions.
        NotFinite: ``heat`` holds NaN or infinity.
    """
    from matplotlib import colormaps
    from PIL import Image as PILImage

    values = np.asarray(heat, dtype=np.float32)
    if values.ndim != 2:
        raise ShapeMismatch(f"heat: expected a map of shape [h w], got shape {values.shape}")
    if not np.isfinite(values).all():
        raise NotFinite(
            f"heat: {int((~np.isfinite(values)).sum())} of {values.size} numbers are NaN or infinite"
        )
    spread = float(values.max() - values.min())
    values = (values - values.min()) / spread if spread > 0 else np.zeros_like(values)
    large = PILImage.fromarray(values).resize(image.size, PILImage.Resampling.BILINEAR)
    shades = colormaps[colours](np.asarray(large))[..., :3]
    background = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    mixed = (1 - strength) * background + strength * shades
    return PILImage.fromarray((mixed.clip(0, 1) * 255).round().astype(np.uint8))


def heat_grid(
    rows: Sequence[tuple[str, Image, Mapping[str, Any]]], palette: Palette = LIGHT, *, cell: float = 1.3
) -> Figure:
    """Draws one row per image: the image under its prompt, then the image with the heat of each word."""
    from matplotlib.figure import Figure

    if not rows:
        raise ShapeMismatch("expected at least one row, got none: there is no image to draw")
    columns = 1 + max(len(heats) for _, _, heats in rows)
    figure = Figure(figsize=(cell * columns, (cell + 0.25) * len(rows)), facecolor=palette.ground)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for line, (prompt, image, heats) in zip(axes, rows, strict=True):
        cells = [(prompt, image), *((word, overlay(image, heat)) for word, heat in heats.items())]
        for axis, (title, shown) in zip(line, cells, strict=False):
            axis.imshow(shown, interpolation="nearest")
            axis.set_title(one_line(title), fontsize=7, color=palette.ink, parse_math=False)
    figure.tight_layout(pad=0.3)
    return figure
