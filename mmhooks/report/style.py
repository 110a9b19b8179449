"""Colours and matplotlib settings of the figures, in a light and a dark dress."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmhooks.report.blocks import Picture

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
def dressed(palette: Palette) -> Any:
    """matplotlib's settings for one palette; the caller's own settings are untouched afterwards."""
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


def draw(make: Callable[[Palette], Figure], *, alt: str, dark: bool = True) -> tuple[Picture, Picture | None]:
    """A figure in both dresses as PNG; ``make(palette)`` builds it on a bare ``Figure`` (no pyplot state)."""
    return _one(make, LIGHT, alt), (_one(make, DARK, alt) if dark else None)


def _one(make: Callable[[Palette], Figure], palette: Palette, alt: str) -> Picture:
    import logging
    import warnings

    from matplotlib.backends.backend_agg import FigureCanvasAgg

    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # absent fonts fall through
    buffer = io.BytesIO()
    with dressed(palette), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # captions may hold signs that the font lacks
        figure = make(palette)
        FigureCanvasAgg(figure)
        figure.savefig(buffer, format="png", dpi=160)
    return Picture(buffer.getvalue(), alt)
