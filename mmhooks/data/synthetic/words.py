"""Words in pictures: rendered, placed, on plates or beside the drawing, and their controls.

Nothing here knows a model. Pictures are tensors [3, h, w] from 0 to 1. Every function is a function of its
arguments alone, and what does not fit is an error rather than a word cut in half. `DEJAVU` comes with
matplotlib, so it is on every machine; `mini-reader` was trained on other fonts.
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
class Writing:
    """How a word stands in a picture: font file, size in pixels per em, centre as (x, y) from 0 to 1.

    ``plate`` is the colour of a rectangle behind the word, ``margin`` pixels larger than its ink on each
    side; None writes on the picture itself. ``angle`` turns the word, in degrees against the clock.
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
    """The path of a font of matplotlib's, or of a file that is there.

    Raises:
        MMHooksError: neither.

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
    """The word's coverage from 0 to 1, cut to its ink.

    Raises:
        MMHooksError: the word leaves no ink (empty, blanks, or letters that the font lacks).

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
        raise MMHooksError(f"{text!r} leaves no ink in {font} at {size} px")
    return torch.from_numpy(np.asarray(image.crop(box), dtype=np.float32) / 255)


def letter_middles(text: str, font: str, size: float) -> list[tuple[float, float]]:
    """(x, y) of each letter's middle, at half the height of an x, in pixels from the corner of the ink.

    >>> [round(x) for x, _ in letter_middles("fox", "DejaVuSans", 16.0)]
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


def box_of(text: str, writing: Writing, height: int, width: int) -> tuple[int, int, int, int]:
    """Top, left, height and width of the word with its margin, in pixels of a picture of that size.

    Raises:
        MMHooksError: the box does not lie inside the picture.
    """
    tall, wide = _ink(text, writing.font, writing.size, writing.angle).shape
    tall, wide = tall + 2 * writing.margin, wide + 2 * writing.margin
    top = round(writing.centre[1] * height - tall / 2)
    left = round(writing.centre[0] * width - wide / 2)
    if top < 0 or left < 0 or top + tall > height or left + wide > width:
        raise MMHooksError(
            f"{text!r} at {writing.size} px takes {tall} x {wide} px around {writing.centre} and does not fit "
            f"into {height} x {width}; take a smaller size (largest_size) or another centre"
        )
    return top, left, tall, wide


def write(picture: Float[Tensor, "3 h w"], text: str, writing: Writing) -> Float[Tensor, "3 h w"]:
    """The picture with the word on it; a copy.

    Raises:
        MMHooksError: the word does not fit (see :func:`box_of`).

    >>> written = write(torch.ones(3, 64, 64), "fox", Writing("DejaVuSans"))
    >>> bool(written.min() < 0.1)
    True
    """
    top, left, tall, wide = box_of(text, writing, *picture.shape[1:])
    out = picture.clone()
    region = out[:, top : top + tall, left : left + wide]
    if writing.plate is not None:
        region.lerp_(_solid(writing.plate), writing.opacity)
    margin = writing.margin
    inner = region[:, margin : tall - margin, margin : wide - margin]
    ink = _ink(text, writing.font, writing.size, writing.angle) * writing.opacity
    inner.lerp_(_solid(writing.ink).expand_as(inner), ink.expand_as(inner))
    return out


def blank_plate(picture: Float[Tensor, "3 h w"], text: str, writing: Writing) -> Float[Tensor, "3 h w"]:
    """The control without a word: the plate that ``text`` would stand on, empty (white if it has none)."""
    top, left, tall, wide = box_of(text, writing, *picture.shape[1:])
    out = picture.clone()
    out[:, top : top + tall, left : left + wide].lerp_(_solid(writing.plate or WHITE), writing.opacity)
    return out


def noise_patch(
    picture: Float[Tensor, "3 h w"], text: str, writing: Writing, *, seed: int = 0
) -> Float[Tensor, "3 h w"]:
    """The control of pure occlusion: uniform noise in the box that ``text`` would take."""
    top, left, tall, wide = box_of(text, writing, *picture.shape[1:])
    noise = torch.rand(3, tall, wide, generator=torch.Generator().manual_seed(seed))
    out = picture.clone()
    out[:, top : top + tall, left : left + wide].lerp_(noise, writing.opacity)
    return out


def make_room(
    picture: Float[Tensor, "3 h w"], share: float = 0.3, *, below: bool = True, ground: Colour = WHITE
) -> Float[Tensor, "3 h w"]:
    """The picture, smaller, with an empty strip of ``share`` of the height below (or above) it.

    >>> make_room(torch.zeros(3, 64, 64), 0.25).sum(0).eq(0).sum().item() == 48 * 48
    True
    """
    if not 0 < share < 1:
        raise MMHooksError(f"share of the strip must lie between 0 and 1, came {share}")
    _, h, w = picture.shape
    tall, wide = round(h * (1 - share)), round(w * (1 - share))
    small = torch.nn.functional.interpolate(picture[None], (tall, wide), mode="bicubic", antialias=True)[0]
    out = _solid(ground).expand(3, h, w).clone()
    left = (w - wide) // 2
    top = 0 if below else h - tall
    out[:, top : top + tall, left : left + wide] = small.clamp(0, 1)
    return out


def nonsense(word: str, dice: random.Random, *, known: Collection[str] = ()) -> str:
    """Letters that are no word: vowels for vowels, consonants for consonants, none of ``known``.

    >>> nonsense("tiger", random.Random(0), known={"tiger"})
    'qociv'
    """
    vowels, consonants = "aeiou", "bcdfghjklmnpqrstvwxz"
    for _ in range(100):
        made = "".join(dice.choice(vowels if c in vowels else consonants) for c in word)
        if made not in known and made != word:
            return made
    raise MMHooksError(f"no nonsense like {word!r} found outside {len(known)} known words")


def _solid(colour: Colour) -> Float[Tensor, "3 1 1"]:
    return torch.tensor(colour).view(3, 1, 1)
