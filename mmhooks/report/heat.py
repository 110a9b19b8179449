"""Heat maps over pictures."""

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


def overlay(picture: Image, heat: Any, *, strength: float = 0.6, colours: str = "inferno") -> Image:
    """The picture with ``heat`` (``[h w]``, any size) laid over it, from its coldest to its hottest place.

    Raises:
        ShapeMismatch: heat that is no map.
        NotFinite: heat that is NaN or infinite.
    """
    from matplotlib import colormaps
    from PIL import Image as Pictures

    values = np.asarray(heat, dtype=np.float32)
    if values.ndim != 2:
        raise ShapeMismatch(f"heat is a map [h w], came shape {values.shape}")
    if not np.isfinite(values).all():
        raise NotFinite(
            f"heat: NaN or infinity in {int((~np.isfinite(values)).sum())} of {values.size} places"
        )
    spread = float(values.max() - values.min())
    values = (values - values.min()) / spread if spread > 0 else np.zeros_like(values)
    large = Pictures.fromarray(values).resize(picture.size, Pictures.Resampling.BILINEAR)
    shades = colormaps[colours](np.asarray(large))[..., :3]
    ground = np.asarray(picture.convert("RGB"), dtype=np.float32) / 255
    mixed = (1 - strength) * ground + strength * shades
    return Pictures.fromarray((mixed.clip(0, 1) * 255).round().astype(np.uint8))


def heat_grid(
    rows: Sequence[tuple[str, Image, Mapping[str, Any]]], palette: Palette = LIGHT, *, cell: float = 1.3
) -> Figure:
    """One row a picture: the picture under its prompt, then the heat of each word over it."""
    from matplotlib.figure import Figure

    if not rows:
        raise ShapeMismatch("a grid of heat maps needs at least one picture")
    columns = 1 + max(len(heats) for _, _, heats in rows)
    figure = Figure(figsize=(cell * columns, (cell + 0.25) * len(rows)), facecolor=palette.ground)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for line, (prompt, picture, heats) in zip(axes, rows, strict=True):
        cells = [(prompt, picture), *((word, overlay(picture, heat)) for word, heat in heats.items())]
        for axis, (title, shown) in zip(line, cells, strict=False):
            axis.imshow(shown, interpolation="nearest")
            axis.set_title(one_line(title), fontsize=7, color=palette.ink, parse_math=False)
    figure.tight_layout(pad=0.3)
    return figure
