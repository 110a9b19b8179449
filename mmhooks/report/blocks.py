"""What a page is made of. Plain frozen records; the template alone knows how they look."""

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
class Picture:
    """Encoded picture bytes and the words that stand for them."""

    data: bytes
    alt: str = ""

    @classmethod
    def of(cls, image: Image, alt: str = "", *, side: int = 96) -> Picture:
        """A PIL picture as WebP, shrunk (never enlarged) to ``side`` pixels."""
        shown = image.convert("RGB")
        if max(shown.size) > side:
            shown.thumbnail((side, side))
        buffer = io.BytesIO()
        shown.save(buffer, format="WEBP", quality=88, method=4)
        return cls(buffer.getvalue(), alt)

    @property
    def uri(self) -> str:
        """A ``data:`` address, so that the page needs no other file."""
        kind = next((t for magic, t in _MAGIC.items() if self.data.startswith(magic)), None)
        if kind is None:
            raise ValueError(f"a picture must be PNG, JPEG or WebP; came bytes starting {self.data[:8]!r}")
        return f"data:{kind};base64,{base64.b64encode(self.data).decode()}"

    @property
    def shown_width(self) -> int | None:
        """CSS pixels of a PNG drawn at 160 dots an inch, so that text has one size in all figures."""
        if not self.data.startswith(b"\x89PNG"):
            return None
        return round(int.from_bytes(self.data[16:20], "big") / 1.8)


@dataclass(frozen=True)
class Block:
    kind: ClassVar[str] = ""


@dataclass(frozen=True)
class Prose(Block):
    """A paragraph; ``words in backticks`` become code. ``tone`` sets it apart."""

    kind: ClassVar[str] = "prose"
    text: str
    tone: Literal["plain", "note", "warn", "code"] = "plain"


@dataclass(frozen=True)
class Plot(Block):
    """A figure in two dresses, for light and dark pages."""

    kind: ClassVar[str] = "plot"
    light: Picture
    dark: Picture | None = None
    caption: str = ""
    anchor: str = ""


@dataclass(frozen=True)
class TableBlock(Block):
    kind: ClassVar[str] = "table"
    table: Table
    anchor: str = ""


@dataclass(frozen=True)
class FeatureCard:
    """One feature: its name, what is known of it, its top pictures and its top texts."""

    title: str
    group: Literal["ImgD", "TextD", "CrossD", ""] = ""
    facts: str = ""
    pictures: Sequence[Picture] = ()
    texts: Sequence[tuple[str, str]] = ()  # text, activation
    empty: str = ""  # said where a side has no active sample


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
    """Statements, each with a verdict: ``same``, ``differs`` or ``open``."""

    kind: ClassVar[str] = "listing"
    items: Sequence[tuple[Literal["same", "differs", "open"], str, str]]  # verdict, claim, what was measured


@dataclass(frozen=True)
class Details(Block):
    """Blocks folded away behind a line."""

    kind: ClassVar[str] = "details"
    summary: str
    blocks: Sequence[Block]
    open: bool = False


@dataclass(frozen=True)
class Section:
    title: str
    blocks: Sequence[Block] = field(default_factory=tuple)
    anchor: str = ""
