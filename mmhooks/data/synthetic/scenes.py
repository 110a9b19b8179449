"""Composed pictures: one to four drawings on a ground, with or without a written word, and all that is true of them.

The world of `mini-vlm`. Drawings are OpenMoji's and seven shapes in eight colours; grounds are plain or patterned; a word
stands in a strip above or below. Things stand in the cells of a two by two grid, each at its own size and place within
its cell, so that *left of*, *above* and *top left* are never a matter of opinion. What is written is drawn
independently of what is shown.

Held out of training: the drawings of :data:`UNSEEN`, one colour of every shape (:func:`is_unseen_paint`), and one in
eight pairs of names (:func:`is_unseen_pair`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from itertools import combinations
from typing import Literal

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw

from mmhooks.data.synthetic import words
from mmhooks.errors import MMHooksError

SIZE = 64
_TAUGHT = """cow tiger rabbit whale snail snake horse monkey pig octopus fish bird penguin frog panda bear crab lion duck shark
    owl fox zebra spider pear peach melon carrot egg taco cookie candy popcorn mushroom broccoli cactus tulip rose balloon
    trumpet violin drum flute key anchor chair ladder kite magnet hammer candle crown glasses dress robot ghost rocket
    bus taxi ship tent airplane castle house door envelope pencil gear umbrella cloud broom spoon bone brain
    bomb dagger pill syringe axe cigarette"""
TAUGHT = tuple(_TAUGHT.split())
# None of these was seen by mini's or mini-reader's tower either (`mmhooks.data.splits`).
_UNSEEN = (
    "grapes banana pizza guitar dog ant turtle ring bell wrench bed giraffe mango coin bucket helicopter"
)
UNSEEN = tuple(_UNSEEN.split())
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "diamond")
PAINTS = {"red": (214, 39, 40), "orange": (255, 140, 26), "yellow": (250, 220, 40), "green": (44, 150, 60),
          "blue": (31, 90, 200), "purple": (130, 60, 170), "pink": (245, 130, 190), "black": (30, 30, 30)}  # fmt: skip
GROUNDS = {"white": (250, 250, 250), "grey": (165, 165, 165), "pink": (250, 195, 215), "yellow": (250, 240, 150),
           "green": (165, 215, 150), "blue": (150, 195, 240), "purple": (200, 170, 225),
           "brown": (190, 150, 110)}  # fmt: skip
PATTERNS = ("plain", "stripes", "checks", "dots")
_OTHER_WORDS = "love peace joy happy gift smile stop open sale exit home music night green tea red"
WORDS = (*TAUGHT, *UNSEEN, *_OTHER_WORDS.split())
FONTS, UNSEEN_FONTS = words.DEJAVU[:4], words.DEJAVU[4:]
STRIP = 15  # pixels
# How many of each kind of thing a picture of one to four things has, with weights.
COPIES: dict[int, tuple[tuple[tuple[int, ...], float], ...]] = {
    1: (((1,), 1.0),),
    2: (((1, 1), 0.6), ((2,), 0.4)),
    3: (((1, 1, 1), 0.4), ((2, 1), 0.3), ((3,), 0.3)),
    4: (((1, 1, 1, 1), 0.3), ((2, 1, 1), 0.3), ((2, 2), 0.1), ((3, 1), 0.3)),
}
SHAPE_SHARE = 0.3  # of all kinds of things
Combination = Literal["taught", "unseen pair", "unseen paint", "unseen concept"]
COMBINATIONS: tuple[Combination, ...] = ("taught", "unseen pair", "unseen paint", "unseen concept")


@dataclass(frozen=True)
class Thing:
    """One drawing in a picture: its name, its colour if it is a shape, its square in pixels, and its cell.

    ``cell`` is (row, column) of the two by two grid, or None in a picture of one thing, which stands anywhere.
    """

    name: str
    paint: str
    left: int
    top: int
    size: int
    cell: tuple[int, int] | None

    @property
    def centre(self) -> tuple[float, float]:
        """(x, y) in pixels."""
        return self.left + self.size / 2, self.top + self.size / 2


@dataclass(frozen=True)
class Scene:
    """Everything that a picture shows; :func:`render` draws it."""

    things: tuple[Thing, ...]
    ground: str
    pattern: str
    word: str = ""
    font: str = FONTS[0]
    word_above: bool = False
    seed: int = 0  # of the pattern

    def copies(self, name: str) -> int:
        return sum(thing.name == name for thing in self.things)


def is_unseen_pair(a: str, b: str) -> bool:
    """Whether two drawings never stand in one training picture: one in eight pairs, the same on every machine.

    >>> is_unseen_pair("fox", "cow") == is_unseen_pair("cow", "fox")
    True
    """
    return blake2b(f"pair/{min(a, b)}/{max(a, b)}".encode(), digest_size=1).digest()[0] % 8 == 0


def is_unseen_paint(shape: str, paint: str) -> bool:
    """Whether no training picture shows the shape in that colour: each shape has one such colour, and no two the same."""
    return list(PAINTS).index(paint) == SHAPES.index(shape)


def sample_scene(
    rng: random.Random, combination: Combination = "taught", *, fonts: Sequence[str] = FONTS
) -> Scene:
    """Draws a scene: one to four things equally often, any ground, a word in two of five.

    Args:
        combination: ``"taught"``: nothing that is held out. ``"unseen pair"``: the first two kinds are a pair held out.
            ``"unseen paint"``: every shape has its colour held out, and there is one. ``"unseen concept"``: the drawings
            are those of :data:`UNSEEN`.

    >>> scene = sample_scene(random.Random(0)); 1 <= len(scene.things) <= 4
    True
    """
    n = rng.randint(2 if combination == "unseen pair" else 1, 4)
    patterns = [p for p in COPIES[n] if combination != "unseen pair" or len(p[0]) > 1]
    copies = rng.choices([p for p, _ in patterns], [w for _, w in patterns])[0]
    kinds = _kinds(rng, len(copies), combination)
    names = [kind for kind, m in zip(kinds, copies, strict=True) for _ in range(m)]
    rng.shuffle(names)
    word = rng.choice(WORDS) if rng.random() < 0.4 else ""
    above = rng.random() < 0.5
    ground = rng.choice([g for g in GROUNDS if all(g != paint for _, paint in kinds)])
    return Scene(
        _placed(rng, names, STRIP if word and above else 0, SIZE - STRIP if word and not above else SIZE),
        ground,
        rng.choice(PATTERNS),
        word,
        rng.choice(list(fonts)),
        above,
        rng.randrange(2**16),
    )


def _kinds(rng: random.Random, n: int, combination: Combination) -> list[tuple[str, str]]:
    """Draws ``n`` names, all different, with the colours of the shapes, by rejection."""
    drawings = UNSEEN if combination == "unseen concept" else TAUGHT
    while True:
        names = [rng.choice(SHAPES if rng.random() < SHAPE_SHARE else drawings) for _ in range(n)]
        if len(set(names)) < n:
            continue
        if combination == "unseen concept" and all(name in SHAPES for name in names):
            continue
        unseen = [is_unseen_pair(a, b) for a, b in combinations(names, 2) if not {a, b} & {*SHAPES, *UNSEEN}]
        if combination == "unseen pair":
            if {*names[:2]} & {*SHAPES} or not is_unseen_pair(*names[:2]):
                continue
        elif any(unseen):
            continue
        if combination == "unseen paint" and not any(name in SHAPES for name in names):
            continue
        wanted = combination == "unseen paint"
        return [
            (name, rng.choice([p for p in PAINTS if is_unseen_paint(name, p) == wanted]) if name in SHAPES else "")
            for name in names
        ]  # fmt: skip


def _placed(rng: random.Random, kinds: Sequence[tuple[str, str]], begin: int, end: int) -> tuple[Thing, ...]:
    """Places things between the rows ``begin`` and ``end`` of pixels."""
    height = end - begin
    if len(kinds) == 1:
        size = rng.randint(28, min(46, height))
        left, top = rng.randint(0, SIZE - size), rng.randint(begin, end - size)
        return (Thing(*kinds[0], left, top, size, None),)
    cells = rng.sample([(row, column) for row in (0, 1) for column in (0, 1)], len(kinds))
    tall, wide = height // 2, SIZE // 2
    made = []
    for kind, (row, column) in zip(kinds, cells, strict=True):
        size = rng.randint(22, min(30, tall))
        left = column * wide + rng.randint(0, wide - size)
        top = begin + row * tall + rng.randint(0, tall - size)
        made.append(Thing(*kind, left, top, size, (row, column)))
    return tuple(made)


def render(
    scene: Scene, drawings: Callable[[str], UInt8[np.ndarray, "h w 4"]]
) -> UInt8[np.ndarray, "64 64 3"]:
    """Draws a scene.

    Args:
        drawings: the RGBA drawing of a name, e.g. :func:`openmoji_drawing`; shapes are drawn here.

    Raises:
        MMHooksError: the word does not fit.
    """
    image = _ground(scene)
    for thing in scene.things:
        sprite = _sprite(thing.name, thing.paint, thing.size, drawings)
        region = image[thing.top : thing.top + thing.size, thing.left : thing.left + thing.size]
        region *= 1 - sprite[..., 3:]
        region += sprite[..., :3]
    if scene.word:
        _write(image, scene)
    return (image * 255).round().clip(0, 255).astype(np.uint8)


@lru_cache(maxsize=1)
def _rows() -> tuple[object, dict[str, int]]:
    from mmhooks.data.sources.openmoji import openmoji

    pairs = openmoji(progress=False)
    return pairs, {text: i for i, text in reversed(list(enumerate(pairs.texts)))}


def openmoji_drawing(name: str) -> UInt8[np.ndarray, "64 64 4"]:
    """OpenMoji's drawing of a name.

    Raises:
        MMHooksError: no drawing has that name. MissingWeights: the packages of the drawings are not installed.
    """
    pairs, rows = _rows()
    if name not in rows:
        raise MMHooksError(
            f"expected the name of a drawing of OpenMoji, got {name!r}; see pairs('mini').texts"
        )
    return np.asarray(pairs.rgba(rows[name]))  # type: ignore[attr-defined]


@lru_cache(maxsize=8192)
def _sprite(
    name: str, paint: str, size: int, drawings: Callable[[str], UInt8[np.ndarray, "h w 4"]]
) -> Float[np.ndarray, "s s 4"]:
    """Premultiplied colour and opacity from 0 to 1, the visible part filling the square's longer side."""
    image = _shape(name, paint) if name in SHAPES else Image.fromarray(drawings(name), "RGBA")
    image = image.crop(image.getbbox())
    layers = np.asarray(image, dtype=np.float32) / 255
    layers[..., :3] *= layers[..., 3:]
    scale = size / max(layers.shape[:2])
    tall, wide = (max(1, round(side * scale)) for side in layers.shape[:2])
    small = np.stack([np.asarray(Image.fromarray(layers[..., c], "F").resize((wide, tall), Image.Resampling.BOX
                      if scale < 0.5 else Image.Resampling.BILINEAR)) for c in range(4)], -1)  # fmt: skip
    out = np.zeros((size, size, 4), np.float32)
    top, left = (size - tall) // 2, (size - wide) // 2
    out[top : top + tall, left : left + wide] = small.clip(0, 1)
    return out


def _shape(name: str, paint: str) -> Image.Image:
    side = 192
    image = Image.new("RGBA", (side, side))
    draw, fill, edge = ImageDraw.Draw(image), (*PAINTS[paint], 255), (20, 20, 20, 255)
    low, high, middle = 6, side - 6, side / 2
    t = np.linspace(0, 2 * np.pi, 97)[:-1]
    if name == "circle":
        points = [(middle + (middle - 6) * np.cos(a), middle + (middle - 6) * np.sin(a)) for a in t]
    elif name == "square":
        points = [(low, low), (high, low), (high, high), (low, high)]
    elif name == "triangle":
        points = [(middle, low), (high, high), (low, high)]
    elif name == "diamond":
        points = [(middle, low), (high, middle), (middle, high), (low, middle)]
    elif name == "cross":
        a, b = side / 3, 2 * side / 3
        points = [(a, low), (b, low), (b, a), (high, a), (high, b), (b, b), (b, high), (a, high), (a, b), (low, b),
                  (low, a), (a, a)]  # fmt: skip
    elif name == "star":
        radius = [(middle - 6) * (1 if k % 2 == 0 else 0.42) for k in range(10)]
        points = [
            (middle + r * np.sin(np.pi * k / 5), middle - r * np.cos(np.pi * k / 5))
            for k, r in enumerate(radius)
        ]
    else:
        x = 16 * np.sin(t) ** 3
        y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
        points = [(middle + 5.3 * u, middle - 5.3 * v) for u, v in zip(x, y, strict=True)]
    points = [(float(x), float(y)) for x, y in points]
    draw.polygon(points, fill=fill)
    draw.line([*points, points[0], points[1]], fill=edge, width=8, joint="curve")
    return image


_Y, _X = np.mgrid[:SIZE, :SIZE]


def _ground(scene: Scene) -> Float[np.ndarray, "64 64 3"]:
    rng = np.random.default_rng(scene.seed)
    base = np.array(GROUNDS[scene.ground], np.float32) / 255
    image = np.empty((SIZE, SIZE, 3), np.float32)
    image[:] = base
    if scene.pattern == "plain":
        return image
    period, shift = rng.integers(6, 13), rng.integers(0, 12, 2)
    x, y = _X + shift[0], _Y + shift[1]
    if scene.pattern == "stripes":
        mask = ((x, y, x + y)[rng.integers(3)] // period) % 2 == 0
    elif scene.pattern == "checks":
        mask = (x // period + y // period) % 2 == 0
    else:
        mask = (x % period - period / 2) ** 2 + (y % period - period / 2) ** 2 < (period / 3.5) ** 2
    image[mask] *= 0.88
    return image


def _write(image: Float[np.ndarray, "64 64 3"], scene: Scene) -> None:
    """Writes the word, black on white, into the strip above or below."""
    ink = _strip_ink(scene.word, scene.font)
    tall, wide = ink.shape
    start = 0 if scene.word_above else SIZE - STRIP
    image[start : start + STRIP] = 1.0
    top = start + (STRIP - tall) // 2
    left = scene.seed % (SIZE - wide + 1)
    image[top : top + tall, left : left + wide] *= 1 - ink[..., None]


@lru_cache(maxsize=2048)
def _strip_ink(word: str, font: str) -> Float[np.ndarray, "h w"]:
    size = words.largest_size(word, font, SIZE - 2, STRIP - 2, most=14.0)
    return words.ink_of(word, font, size).numpy()
