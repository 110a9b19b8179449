"""The blocks of a page, as frozen dataclasses; only the template decides how they look."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from mmhooks.report.tables import Table

if TYPE_CHECKING:
    from PIL.Image import Image

_MAGIC = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"RIFF": "image/webp"}


@dataclass(frozen=True)
class EncodedImage:
    """An encoded image (PNG, JPEG or WebP bytes) with its alternative text."""

    data: bytes
    alt: str = ""

    @classmethod
    def from_pil(cls, image: Image, alt: str = "", *, side: int = 96) -> EncodedImage:
        """Encodes a PIL image as WebP, shrunk (never enlarged) to at most ``side`` pixels."""
        shown = image.convert("RGB")
        if max(shown.size) > side:
            shown.thumbnail((side, side))
        buffer = io.BytesIO()
        shown.save(buffer, format="WEBP", quality=88, method=4)
        return cls(buffer.getvalue(), alt)

    @property
    def uri(self) -> str:
        """A ``data:`` URI, so that the page needs no other file."""
        kind = next((t for magic, t in _MAGIC.items() if self.data.startswith(magic)), None)
        if kind is None:
            raise ValueError(
                f"expected PNG, JPEG or WebP bytes, got bytes starting with {self.data[:8]!r}; encode it first"
            )
        return f"data:{kind};base64,{base64.b64encode(self.data).decode()}"

    @property
    def shown_width(self) -> int | None:
        """Width in CSS pixels of a PNG drawn at 160 dpi, so that text has the same size in all figures."""
        if not self.data.startswith(b"\x89PNG"):
            return None
        return round(int.from_bytes(self.data[16:20], "big") / 1.8)


@dataclass(frozen=True)
class Block:
    kind: ClassVar[str] = ""


@dataclass(frozen=True)
class Prose(Block):
    """A paragraph; ``words in backticks`` become code, ``tone`` selects its style."""

    kind: ClassVar[str] = "prose"
    text: str
    tone: Literal["plain", "note", "warn", "code"] = "plain"


@dataclass(frozen=True)
class Plot(Block):
    """A figure in two versions, for light and dark pages."""

    kind: ClassVar[str] = "plot"
    light: EncodedImage
    dark: EncodedImage | None = None
    caption: str = ""
    anchor: str = ""


@dataclass(frozen=True)
class TableBlock(Block):
    kind: ClassVar[str] = "table"
    table: Table
    anchor: str = ""


@dataclass(frozen=True)
class FeatureCard:
    """One feature: its title, facts about it, its top images and its top texts."""

    title: str
    group: Literal["ImgD", "TextD", "CrossD", ""] = ""
    facts: str = ""
    images: Sequence[EncodedImage] = ()
    texts: Sequence[tuple[str, str]] = ()  # text, activation
    empty: str = ""  # shown where a side has no active sample


@dataclass(frozen=True)
class Gallery(Block):
    kind: ClassVar[str] = "gallery"
    cards: Sequence[FeatureCard]
    caption: str = ""


@dataclass(frozen=True)
class Tile:
    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Tiles(Block):
    kind: ClassVar[str] = "tiles"
    tiles: Sequence[Tile]


@dataclass(frozen=True)
class Listing(Block):
    """Claims of the paper, each with a verdict: ``same``, ``differs`` or ``open``."""

    kind: ClassVar[str] = "listing"
    items: Sequence[tuple[Literal["same", "differs", "open"], str, str]]  # verdict, claim, what was measured


@dataclass(frozen=True)
class Details(Block):
    """Blocks that unfold on a click on the summary line."""

    kind: ClassVar[str] = "details"
    summary: str
    blocks: Sequence[Block]
    open: bool = False


@dataclass(frozen=True)
class Section:
    title: str
    blocks: Sequence[Block] = field(default_factory=tuple)
    anchor: str = ""
