"""Colours and matplotlib settings of the figures, as a light and a dark theme."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmhooks.report.blocks import EncodedImage

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Palette:
    ground: str
    ink: str
    soft: str
    line: str
    img: str
    text: str
    cross: str

    def group(self, name: str) -> str:
        return {"ImgD": self.img, "TextD": self.text, "CrossD": self.cross}.get(name, self.soft)


LIGHT = Palette("#ffffff", "#1d1f23", "#5d636e", "#e4e1db", "#c2553a", "#2b6591", "#a3a8b0")
DARK = Palette("#1c1f23", "#e7e6e3", "#a9aeb7", "#3a3f46", "#e58a6f", "#7fb2d9", "#737984")


@contextmanager
def themed(palette: Palette) -> Any:
    """Applies matplotlib settings for one palette and restores the caller's settings afterwards."""
    import matplotlib as mpl

    settings: Any = {
        "font.family": ["Helvetica Neue", "Arial", "Liberation Sans", "DejaVu Sans"],
        "font.size": 10.5,
        "axes.titlesize": 12,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.edgecolor": palette.soft,
        "axes.labelcolor": palette.soft,
        "axes.titlecolor": palette.ink,
        "axes.facecolor": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.8,
        "xtick.color": palette.soft,
        "ytick.color": palette.soft,
        "xtick.labelsize": 9.5,
        "ytick.labelsize": 9.5,
        "text.color": palette.ink,
        "figure.facecolor": palette.ground,
        "savefig.facecolor": palette.ground,
        "legend.frameon": False,
        "text.parse_math": False,  # a caption may hold dollar signs; no figure here holds formulas
    }
    with mpl.rc_context(settings):
        yield


def draw(
    make: Callable[[Palette], Figure], *, alt: str, dark: bool = True
) -> tuple[EncodedImage, EncodedImage | None]:
    """Draws a figure in both themes as PNG; ``make(palette)`` builds it on a bare ``Figure`` (no pyplot state)."""
    return _png(make, LIGHT, alt), (_png(make, DARK, alt) if dark else None)


def _png(make: Callable[[Palette], Figure], palette: Palette, alt: str) -> EncodedImage:
    import logging
    import warnings

    from matplotlib.backends.backend_agg import FigureCanvasAgg

    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # missing fonts fall back
    buffer = io.BytesIO()
    with themed(palette), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # captions may hold characters that the font lacks
        figure = make(palette)
        FigureCanvasAgg(figure)
        figure.savefig(buffer, format="png", dpi=160)
    return EncodedImage(buffer.getvalue(), alt)
