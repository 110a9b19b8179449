"""Heat drawn over an image."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mmhooks.errors import NotFinite, ShapeMismatch

if TYPE_CHECKING:
    from PIL.Image import Image


def overlay(
    image: Image,
    heat: Any,
    *,
    strength: float = 0.6,
    colours: str = "inferno",
    span: tuple[float, float] | None = None,
) -> Image:
    """Draws ``heat`` (``[h w]``, any size) over the image.

    Args:
        strength: how much of each pixel is the heat's colour.
        colours: a colour map of matplotlib.
        span: the values with the first and the last colour; default: the heat's own minimum and maximum.

    Raises:
        ShapeMismatch: ``heat`` does not have two dimensions.
        NotFinite: ``heat`` holds NaN or infinity.
    """
    from PIL import Image as PILImage

    values = np.asarray(heat, dtype=np.float32)
    if values.ndim != 2:
        raise ShapeMismatch(f"heat: expected a map of shape [h w], got shape {values.shape}")
    if not np.isfinite(values).all():
        raise NotFinite(
            f"heat: {int((~np.isfinite(values)).sum())} of {values.size} numbers are NaN or infinite"
        )
    low, high = (float(values.min()), float(values.max())) if span is None else span
    values = ((values - low) / (high - low)).clip(0, 1) if high > low else np.zeros_like(values)
    if values.shape != (image.height, image.width):
        values = np.asarray(PILImage.fromarray(values).resize(image.size, PILImage.Resampling.BILINEAR))
    return PILImage.fromarray(_mixed(image, values, strength, colours))


def _mixed(image: Image, values: np.ndarray, strength: float, colours: str) -> np.ndarray:
    from matplotlib import colormaps

    shades = colormaps[colours](values)[..., :3]
    background = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    mixed = (1 - strength) * background + strength * shades
    return (mixed.clip(0, 1) * 255).round().astype(np.uint8)
