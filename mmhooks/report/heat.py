"""Heat maps drawn over images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mmhooks.errors import ShapeMismatch
from mmhooks.report.blocks import EncodedImage, FeatureCard, Gallery
from mmhooks.report.style import LIGHT, Palette
from mmhooks.utils.escape import one_line
from mmhooks.utils.overlay import overlay

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

    from mmhooks.analysis.attribution.feature_heat import Heat


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


def heat_gallery(
    heats: Mapping[Any, Sequence[Heat]],
    caption: str = "",
    *,
    top: int = 8,
    side: int = 128,
    smooth: bool = False,
) -> Gallery:
    """The images in which each feature is most active, each under its heat: one card a feature.

    The colours of a card go from 0 to the feature's highest activation over all the images given, so that weak images look weak.

    Args:
        heats: of :func:`mmhooks.heat`, by the title of their card.
        top: images a card, those with the highest activation at any cell first; images without any are left out.
        side: of the images on the page, in pixels.
        smooth: interpolate between cells.

    Raises:
        ShapeMismatch: no feature, or one without images.

    >>> from PIL import Image
    >>> import mmhooks as mm
    >>> model, images = mm.load("mini"), [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    >>> found = mm.heat(mm.TopKSAE(192, 64, k=4), model, images, 3, "image.blocks.3.resid_post")
    >>> heat_gallery({"feature 3": found}).cards[0].title
    'feature 3'
    """
    if not heats or not all(heats.values()):
        raise ShapeMismatch("heats: expected features with at least one image each, got none")
    return Gallery([_card(str(title), shown, top, side, smooth) for title, shown in heats.items()], caption)


def _card(title: str, heats: Sequence[Heat], top: int, side: int, smooth: bool) -> FeatureCard:
    ranked = sorted(heats, key=lambda heat: -float(heat.values.max()))
    active = [heat for heat in ranked if float(heat.values.max()) > 0]
    span = (0.0, float(ranked[0].values.max()))
    images = [
        EncodedImage.from_pil(
            heat.on_image(smooth=smooth, span=span),
            f"activation up to {float(heat.values.max()):.3g}",
            side=side,
        )
        for heat in active[:top]
    ]
    facts = f"{heats[0].site}; active in {len(active)} of {len(heats)} images, up to {span[1]:.3g}"
    return FeatureCard(title, facts=facts, images=images, empty="active in no image")
