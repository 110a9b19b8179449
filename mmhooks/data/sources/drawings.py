"""The corpus of drawings that the embedded models are trained and tested on: sources, licences, stored rows."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

SIZE = 72  # pixels; training crops 64 of them
UNSEEN_STYLE = "twemoji"  # contributes no training images


@dataclass(frozen=True)
class Source:
    style: str
    licence: str
    attribution: str
    weight: float = 1.0  # relative sampling frequency of its images
    ink: tuple[str, ...] = ()  # colours for monochrome drawings


SOURCES: tuple[Source, ...] = (
    Source("openmoji", "CC BY-SA 4.0", "OpenMoji, the open-source emoji project, openmoji.org"),
    Source("noto", "Apache-2.0", "Noto Emoji, Google"),
    Source("noto-v1", "Apache-2.0", "Noto Emoji of 2017 (blobs), Google"),
    Source("twemoji", "CC BY 4.0", "Twemoji, Twitter and contributors"),
    Source("emojione", "CC BY 4.0", "EmojiOne 2, emojione.com"),
    Source("emojione-v1", "CC BY-SA 4.0", "EmojiOne 1, emojione.com"),
    Source("fluent-emoji", "MIT", "Fluent Emoji, Microsoft"),
    Source("fluent-emoji-flat", "MIT", "Fluent Emoji flat, Microsoft"),
    Source("fxemoji", "Apache-2.0", "FxEmojis, Mozilla"),
    Source("streamline-emojis", "CC BY 4.0", "Streamline Emojis, streamlinehq.com"),
    Source("flat-color-icons", "MIT", "Flat Color Icons, Icons8"),
    Source("game-icons", "CC BY 3.0", "game-icons.net, Delapouite, Lorc and contributors", weight=0.4,
           ink=("#222222", "#5b2333", "#1d4e6b", "#2e5e2a", "#6b4a1d", "#47306b")),
    Source("openclipart", "public domain (CC0)", "Open Clip Art Library, openclipart.org"),
)  # fmt: skip


class Corpus:
    """Rasterised drawings: ``rgba`` [n, SIZE, SIZE, 4] uint8 (memory-mapped), and one row of metadata each."""

    def __init__(self, folder: Path) -> None:
        self.rows: list[dict] = json.loads((folder / "rows.json").read_text())
        with safe_open(folder / "rgba.safetensors", "pt") as file:
            self.rgba = file.get_tensor("rgba")
        if len(self.rows) != len(self.rgba):
            raise ValueError(
                f"{folder}: expected one image per row, got {len(self.rows)} rows and {len(self.rgba)} images; rebuild it"
            )

    def where(self, split: str) -> list[int]:
        return [i for i, row in enumerate(self.rows) if row["split"] == split]


def plain_codepoints(code: str) -> str:
    """An emoji's code points in canonical form, without the variation selector for colour."""
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


def crc32_of(text: str) -> int:
    from zlib import crc32

    return crc32(text.encode())
