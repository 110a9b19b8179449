"""Choice of the drawings that `mini-sd` learns: one style, with names and looks that can be distinguished.

Names with nearly the same text embedding cannot give different images, and drawings that look alike cannot be
distinguished in the evaluation: of each such pair the shorter name is kept.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from mmhooks.data.sources.drawings import SIZE, Corpus, crc32_of, plain_codepoints
from mmhooks.models import zoo
from mmhooks.models.embedded import mini
from mmhooks.utils.files import write_text

STYLE = "fluent-emoji"
TEXTS_ALIKE = 0.85  # cosine of mini's text embeddings
IMAGE_DISTANCE = 0.13  # root mean square of the difference, pixels from 0 to 1
TEMPLATES = (
    "{}",
    "a drawing of {}",
    "a picture of {}",
    "an icon of {}",
    "{} drawing",
    "a cartoon {}",
    "emoji of {}",
)

# Signs, letters and arrows are not drawings of things; of people one drawing each is kept, not one per gender.
_NO_THING = re.compile(
    r"\b(?:flags?|arrow|letters?|button|clock|o'clock|thirty|input|symbols?|keycap|mark|sign|square|circle|"
    r"diamond|currency|tone\d?|facing|family|couple|kiss|index|tag|banknote|dollar|exchange|plus|minus|divide|"
    r"multiply|equals|infinity|loop|dash|phase|quarter|prohibited|no|non|person|man|woman|men|women|people|boy|"
    r"girl|blue book|green book|orange book|japanese|hundred|curly|wavy|part alternation|restroom|room|bidi|"
    r"aries|taurus|gemini|cancer|leo|virgo|libra|scorpio|sagittarius|capricorn|aquarius|pisces|ophiuchus|om|registered|"
    r"copyright|circled|customs|cinema|information|elevator|zzz|suit|bars|recycling|crossing|baggage|khanda)\b|\d|:"
)
_PEOPLE = {"man", "woman", "boy", "girl", "person"}


def on_white(rgba: UInt8[Tensor, "n s s 4"]) -> Float[Tensor, "n 3 64 64"]:
    """Returns drawings on white at 64 px, from -1 to 1: what the pipeline learns to generate."""
    pixels = rgba.permute(0, 3, 1, 2).float() / 255
    white = pixels[:, :3] * pixels[:, 3:] + 1 - pixels[:, 3:]
    side = mini.IMAGE_SIZE
    return F.interpolate(white, (side, side), mode="bicubic", antialias=True).clamp(0, 1) * 2 - 1


@torch.no_grad()
def choose(corpus: Corpus, count: int, style: str = STYLE) -> list[int]:
    """Returns rows of the corpus, sorted by name: ``count`` drawings of one style that differ in name and in look.

    Raises:
        ValueError: the style has fewer such drawings.
    """
    rows = {}
    for i, row in enumerate(corpus.rows):
        plain = not _NO_THING.search(row["name"]) or row["name"] in _PEOPLE
        if row["style"] == style and not row["toned"] and plain and len(row["name"].split()) <= 4:
            rows.setdefault(row["name"], i)
    order = sorted(rows, key=lambda name: (len(name.split()), crc32_of(name)))
    model: Any = zoo.load("mini")
    text = F.normalize(model.encode_text(model.tokenizer(order)), dim=-1)
    pixels = on_white(corpus.rgba[[rows[name] for name in order]]).flatten(1) / 2
    kept: list[int] = []
    for i in range(len(order)):
        like = (text[kept] @ text[i] > TEXTS_ALIKE).any()
        looks = (pixels[kept] - pixels[i]).square().mean(1).sqrt() < IMAGE_DISTANCE
        if not like and not looks.any():
            kept.append(i)
    if len(kept) < count:
        raise ValueError(
            f"expected {count} drawings that differ, got {len(kept)} of {style}; lower --drawings"
        )
    return [rows[name] for name in sorted(order[i] for i in kept[:count])]


def codepoints(name: str) -> str:
    """Returns the code points of the emoji of this name, joined by hyphens; empty if there is none.

    >>> codepoints("tiger")
    '1f405'
    """
    from emoji import EMOJI_DATA

    for char, data in EMOJI_DATA.items():
        if data["en"].strip(":").replace("_", " ").lower() == name:
            return plain_codepoints("-".join(f"{ord(c):x}" for c in char))
    return ""


def describe_drawings(corpus: Corpus, chosen: list[int]) -> list[dict[str, str]]:
    """Returns names and code points of the drawings, in order."""
    return [
        {"name": corpus.rows[i]["name"], "codepoints": codepoints(corpus.rows[i]["name"])} for i in chosen
    ]


def save_listing(corpus: Corpus, chosen: list[int], path: Path) -> None:
    content = {"style": STYLE, "size": SIZE, "drawings": describe_drawings(corpus, chosen)}
    write_text(path, json.dumps(content, indent=1))
