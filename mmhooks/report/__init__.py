"""Figures, tables and self-contained HTML pages. This package imports results, never models.

>>> from mmhooks.report import Page, Prose, Section
>>> page = Page("A study", [Section("Result", [Prose("Nothing <b>moved</b>.")])])
>>> "&lt;b&gt;moved" in page.html()
True
"""

from __future__ import annotations

from mmhooks.analysis.results import Estimate
from mmhooks.report.blocks import (
    Block,
    Details,
    EncodedImage,
    FeatureCard,
    Gallery,
    Listing,
    Plot,
    Prose,
    Section,
    TableBlock,
    Tile,
    Tiles,
)
from mmhooks.report.numbers import fixed, interval, percent, signed
from mmhooks.report.page import Page
from mmhooks.report.tables import Cell, Table

__all__ = [
    "Block",
    "Cell",
    "Details",
    "EncodedImage",
    "Estimate",
    "FeatureCard",
    "Gallery",
    "Listing",
    "Page",
    "Plot",
    "Prose",
    "Section",
    "Table",
    "TableBlock",
    "Tile",
    "Tiles",
    "fixed",
    "interval",
    "percent",
    "signed",
]
