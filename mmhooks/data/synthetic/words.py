"""Renders words into images: on the image, on plates or in a strip beside it, and the matching controls.

Independent of models. Images are tensors [3, h, w] from 0 to 1. All functions are pure, and a word that does not fit
raises an error instead of being cut off. The `DEJAVU` fonts ship with matplotlib, so they are always available;
`mini-reader` was trained on other fonts.
"""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mmhooks.errors import MMHooksError

DEJAVU = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSansMono",
          "DejaVuSansMono-Bold")  # fmt: skip
Colour = tuple[float, float, float]
BLACK: Colour = (0.0, 0.0, 0.0)
WHITE: Colour = (1.0, 1.0, 1.0)


@dataclass(frozen=True)
class TextStyle:
    """How a word is rendered: font file, size in pixels per em, centre as (x, y) from 0 to 1.

    ``plate`` is the colour of a rectangle behind the word, ``margin`` pixels larger than its ink on each side; None
    writes on the image itself. ``angle`` rotates the word, in degrees counter-clockwise.
    """

    font: str
    size: float = 16.0
    centre: tuple[float, float] = (0.5, 0.5)
    ink: Colour = BLACK
    opacity: float = 1.0
    plate: Colour | None = None
    margin: int = 2
    angle: float = 0.0


def font_file(name: str) -> str:
    """The path of an existing font file, or of one that ships with matplotlib.

    Raises:
        MMHooksError: there is neither.

    >>> font_file("DejaVuSans").endswith("DejaVuSans.ttf")
    True
    """
    if Path(name).is_file():
        return str(name)
    import matplotlib

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"
    if not path.is_file():
        raise MMHooksError(f"no font {name!r}: give the path of a font file, or one of {', '.join(DEJAVU)}")
    return str(path)


@lru_cache(maxsize=4096)
def _font(name: str, size: float):
    from PIL import ImageFont

    return ImageFont.truetype(font_file(name), size, layout_engine=ImageFont.Layout.BASIC)


def ink_of(text: str, font: str, size: float, *, angle: float = 0.0) -> Float[Tensor, "h w"]:
    """The word's coverage from 0 to 1, cropped to its ink.

    Raises:
        MMHooksError: the word has no ink (empty, blanks, or letters missing in the font).

    >>> ink_of("fox", "DejaVuSans", 16.0).shape
    torch.Size([12, 25])
    """
    return _ink(text, font, size, angle).clone()


@lru_cache(maxsize=256)
def _ink(text: str, font: str, size: float, angle: float) -> Float[Tensor, "h w"]:
    from PIL import Image, ImageDraw

    face = _font(font, size)
    left, top, right, bottom = (int(v) for v in face.getbbox(text))
    image = Image.new("L", (max(1, right - left + 2), max(1, bottom - top + 2)))
    ImageDraw.Draw(image).text((1 - left, 1 - top), text, fill=255, font=face)
    if angle:
        image = image.rotate(angle, Image.Resampling.BICUBIC, expand=True)
    box = image.getbbox()
    if box is None:
        raise MMHooksError(f"{text!r} has no ink in {font} at {size} px")
    return torch.from_numpy(np.asarray(image.crop(box), dtype=np.float32) / 255)


def letter_centres(text: str, font: str, size: float) -> list[tuple[float, float]]:
    """(x, y) of each letter's centre, at half the x-height, in pixels from the corner of the ink.

    >>> [round(x) for x, _ in letter_centres("fox", "DejaVuSans", 16.0)]
    [2, 10, 20]
    """
    face = _font(font, size)
    left, top, _, _ = face.getbbox(text)
    _, x_top, _, x_bottom = face.getbbox("x")
    y = (x_top + x_bottom) / 2 - top
    before = [face.getlength(text[:i]) for i in range(len(text) + 1)]
    return [((a + b) / 2 - left, y) for a, b in pairwise(before)]


def largest_size(text: str, font: str, width: int, height: int, *, most: float = 64.0) -> float:
    """The largest size, in half pixels and up to ``most``, whose ink fits into width x height.

    Raises:
        MMHooksError: not even 4 px fit.

    >>> largest_size("fox", "DejaVuSans", 40, 40)
    26.0
    """
    sizes = [half / 2 for half in range(8, int(2 * most) + 1)]
    low, high = 0, len(sizes)
    while low < high:  # ink grows with the size
        middle = (low + high) // 2
        tall, wide = ink_of(text, font, sizes[middle]).shape
        low, high = (middle + 1, high) if wide <= width and tall <= height else (low, middle)
    if low == 0:
        raise MMHooksError(f"{text!r} does not fit into {width} x {height} px at 4 px")
    return sizes[low - 1]


def box_of(text: str, style: TextStyle, height: int, width: int) -> tuple[int, int, int, int]:
    """Top, left, height and width in pixels of the word with its margin, in an image of that size.

    Raises:
        MMHooksError: the box does not fit inside the image.
    """
    tall, wide = _ink(text, style.font, style.size, style.angle).shape
    tall, wide = tall + 2 * style.margin, wide + 2 * style.margin
    top = round(style.centre[1] * height - tall / 2)
    left = round(style.centre[0] * width - wide / 2)
    if top < 0 or left < 0 or top + tall > height or left + wide > width:
        raise MMHooksError(
            f"{text!r} at {style.size} px takes {tall} x {wide} px around {style.centre} and does not fit "
            f"into {height} x {width}; choose a smaller size (largest_size) or another centre"
        )
    return top, left, tall, wide


def write(image: Float[Tensor, "3 h w"], text: str, style: TextStyle) -> Float[Tensor, "3 h w"]:
    """A copy of the image with the word on it.

    Raises:
        MMHooksError: the word does not fit (see :func:`box_of`).

    >>> written = write(torch.ones(3, 64, 64), "fox", TextStyle("DejaVuSans"))
    >>> bool(written.min() < 0.1)
    True
    """
    top, left, tall, wide = box_of(text, style, *image.shape[1:])
    out = image.clone()
    region = out[:, top : top + tall, left : left + wide]
    if style.plate is not None:
        region.lerp_(_solid(style.plate), style.opacity)
    margin = style.margin
    inner = region[:, margin : tall - margin, margin : wide - margin]
    ink = _ink(text, style.font, style.size, style.angle) * style.opacity
    inner.lerp_(_solid(style.ink).expand_as(inner), ink.expand_as(inner))
    return out


def blank_plate(image: Float[Tensor, "3 h w"], text: str, style: TextStyle) -> Float[Tensor, "3 h w"]:
    """Control without a word: the plate of ``text``, empty (white if it has none)."""
    top, left, tall, wide = box_of(text, style, *image.shape[1:])
    out = image.clone()
    out[:, top : top + tall, left : left + wide].lerp_(_solid(style.plate or WHITE), style.opacity)
    return out


def noise_patch(
    image: Float[Tensor, "3 h w"], text: str, style: TextStyle, *, seed: int = 0
) -> Float[Tensor, "3 h w"]:
    """Control for occlusion: uniform noise in the box of ``text``."""
    top, left, tall, wide = box_of(text, style, *image.shape[1:])
    noise = torch.rand(3, tall, wide, generator=torch.Generator().manual_seed(seed))
    out = image.clone()
    out[:, top : top + tall, left : left + wide].lerp_(noise, style.opacity)
    return out


def add_strip(
    image: Float[Tensor, "3 h w"], share: float = 0.3, *, below: bool = True, ground: Colour = WHITE
) -> Float[Tensor, "3 h w"]:
    """The image, scaled down, with an empty strip of ``share`` of the height below (or above) it.

    >>> add_strip(torch.zeros(3, 64, 64), 0.25).sum(0).eq(0).sum().item() == 48 * 48
    True
    """
    if not 0 < share < 1:
        raise MMHooksError(f"share of the strip must lie between 0 and 1, got {share}")
    _, h, w = image.shape
    tall, wide = round(h * (1 - share)), round(w * (1 - share))
    small = torch.nn.functional.interpolate(image[None], (tall, wide), mode="bicubic", antialias=True)[0]
    out = _solid(ground).expand(3, h, w).clone()
    left = (w - wide) // 2
    top = 0 if below else h - tall
    out[:, top : top + tall, left : left + wide] = small.clamp(0, 1)
    return out


def nonsense(word: str, rng: random.Random, *, known: Collection[str] = ()) -> str:
    """A pseudo-word: replaces vowels by vowels and consonants by consonants; not in ``known``.

    >>> nonsense("tiger", random.Random(0), known={"tiger"})
    'qociv'
    """
    vowels, consonants = "aeiou", "bcdfghjklmnpqrstvwxz"
    for _ in range(100):
        made = "".join(rng.choice(vowels if c in vowels else consonants) for c in word)
        if made not in known and made != word:
            return made
    raise MMHooksError(f"found no pseudo-word like {word!r} that is not among {len(known)} known words")


def _solid(colour: Colour) -> Float[Tensor, "3 1 1"]:
    return torch.tensor(colour).view(3, 1, 1)
