"""Words that mini-reader is taught, their fonts, and how they are rendered into training images.

Words come from the corpus. One in eight is held out: never rendered in training. Fonts are Debian packages; those of
`UNSEEN_FONTS` are not used in training, only for evaluation.

    apt-get install fonts-liberation fonts-lato fonts-roboto-unhinted fonts-cabin fonts-crosextra-carlito \\
        fonts-crosextra-caladea fonts-freefont-ttf fonts-comfortaa fonts-quicksand fonts-linuxlibertine \\
        fonts-open-sans fonts-sil-gentium-basic
"""

from __future__ import annotations

import hashlib
import random
import re
from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmhooks.data.sources.drawings import Corpus
from mmhooks.data.synthetic import words
from mmhooks.models.embedded import mini

LONGEST = 8  # letters; more do not fit into 64 px
PROMPT = "the word {}"
_PROMPTS = (PROMPT, PROMPT, "{} written", "text that says {}", "a sign that says {}")
_BOTH = ("{} with the word {}", "{} and the word {}", "{} and text that says {}")


@dataclass(frozen=True)
class FontSource:
    package: str
    licence: str
    files: str  # glob below /usr/share/fonts


FONTS: tuple[FontSource, ...] = (
    FontSource("fonts-liberation", "OFL-1.1", "truetype/liberation/*.ttf"),
    FontSource("fonts-lato", "OFL-1.1", "truetype/lato/Lato-[BMR]*.ttf"),
    FontSource("fonts-roboto-unhinted", "Apache-2.0", "truetype/roboto/unhinted/RobotoTTF/Roboto-[BMR]*.ttf"),
    FontSource("fonts-roboto-unhinted", "Apache-2.0", "truetype/roboto/unhinted/RobotoCondensed-[BR]*.ttf"),
    FontSource("fonts-cabin", "OFL-1.1", "opentype/cabin/*.otf"),
    FontSource("fonts-crosextra-carlito", "OFL-1.1", "truetype/crosextra/Carlito*.ttf"),
    FontSource("fonts-crosextra-caladea", "Apache-2.0", "truetype/crosextra/Caladea*.ttf"),
    FontSource("fonts-freefont-ttf", "GPL-3+ with font exception", "truetype/freefont/*.ttf"),
    FontSource("fonts-comfortaa", "OFL-1.1", "truetype/comfortaa/Comfortaa-[BR]*.ttf"),
    FontSource("fonts-quicksand", "OFL-1.1", "truetype/quicksand/Quicksand-[BMR]*.ttf"),
    FontSource("fonts-linuxlibertine", "OFL-1.1", "opentype/linux-libertine/Lin*_R*.otf"),
)
UNSEEN_FONTS: tuple[FontSource, ...] = (
    FontSource("fonts-open-sans", "Apache-2.0", "truetype/open-sans/OpenSans-[BRS]*.ttf"),
    FontSource("fonts-sil-gentium-basic", "OFL-1.1", "truetype/gentium-basic/*.ttf"),
)


def font_paths(sources: tuple[FontSource, ...], root: Path = Path("/usr/share/fonts")) -> list[str]:
    """Returns every file of the sources.

    Raises:
        FileNotFoundError: a package is not installed.
    """
    found = []
    for source in sources:
        files = sorted(str(path) for path in root.glob(source.files))
        if not files:
            raise FileNotFoundError(
                f"expected fonts of {source.package} at {root / source.files}, got none; apt-get install {source.package}"
            )
        found += files
    return found


def unseen_fonts() -> list[str]:
    return font_paths(UNSEEN_FONTS) + [words.font_file(name) for name in words.DEJAVU]


def held_out(word: str) -> bool:
    """Returns whether a word is held out: one in eight, the same on every machine, never rendered in training."""
    return hashlib.sha256(f"reader:{word}".encode()).digest()[0] % 8 == 0


@dataclass(frozen=True)
class Vocabulary:
    """Words of three to eight letters: names of drawings, and all other words of names and keywords."""

    names: tuple[str, ...]
    others: tuple[str, ...]
    unseen_names: tuple[str, ...]
    unseen_others: tuple[str, ...]

    @property
    def all(self) -> tuple[str, ...]:
        return self.names + self.others + self.unseen_names + self.unseen_others

    @classmethod
    def of(cls, corpus: Corpus, drawings: int = 3) -> Vocabulary:
        rows = [corpus.rows[i] for i in corpus.where("train")]
        counts = Counter(row["name"] for row in rows if re.fullmatch(f"[a-z]{{3,{LONGEST}}}", row["name"]))
        names = {name for name, n in counts.items() if n >= drawings}
        every = {
            word
            for row in rows
            for text in (row["name"], *row["keywords"])
            for word in re.findall("[a-z]+", text.lower())
            if 3 <= len(word) <= LONGEST
        }
        others = every - names
        kept, unseen = (tuple(sorted(w for w in names if held_out(w) == gone)) for gone in (False, True))
        rest, rest_gone = (tuple(sorted(w for w in others if held_out(w) == gone)) for gone in (False, True))
        return cls(kept, rest, unseen, rest_gone)


def letters(texts: list[str]) -> Int[Tensor, "n longest"]:
    """Returns the letter at each position: 0 - 25, and 26 after the end of the word."""
    rows = [[ord(c) - 97 for c in text] + [26] * (LONGEST - len(text)) for text in texts]
    return torch.tensor(rows)


@lru_cache
def _advances(font: str) -> dict[str, float]:
    """Returns the width of each letter, per pixel of font size."""
    return {c: words.ink_of(c * 4, font, 32.0).shape[1] / 128 for c in "abcdefghijklmnopqrstuvwxyz"}


def place(
    word: str, font: str, rng: random.Random, *,
    width: tuple[float, float] = (0.3, 0.95), size: tuple[float, float] = (8.0, 30.0),
    offset: float = 1.0, plate: float = 0.3, turn: float = 6.0,
) -> words.TextStyle:  # fmt: skip
    """Draws a writing of random width (share of the image), position and colours that fits into the image.

    Args:
        offset: from 0, always in the middle, to 1, anywhere it fits.
    """
    side = mini.IMAGE_SIZE
    wide = sum(_advances(font)[c] for c in word)
    low, high = size
    chosen = min(max(rng.uniform(*width) * side / wide, low), high)
    chosen = max(5.0, float(int(chosen)))  # whole pixels, because font faces are cached by size
    angle = rng.uniform(-turn, turn) if turn and rng.random() < 0.4 else 0.0
    angle = angle if wide * chosen < 0.75 * side else 0.0
    margin = rng.randint(1, 3)
    ink, ground = _colours(rng)
    ink_tall, ink_wide = words.ink_of(word, font, chosen, angle=angle).shape
    while max(ink_tall, ink_wide) + 2 * margin + 1 > side:  # the estimate was a little too small
        chosen -= 1
        ink_tall, ink_wide = words.ink_of(word, font, chosen, angle=angle).shape
    made = words.TextStyle(font, chosen, (0.5, 0.5), ink, rng.uniform(0.8, 1.0),
                         ground if rng.random() < plate else None, margin, angle)  # fmt: skip
    centre = []
    for extent in (ink_wide + 2 * margin, ink_tall + 2 * margin):
        free = max(0.0, (side - extent - 1) / 2 / side)
        centre.append(0.5 + offset * rng.uniform(-free, free))
    return replace(made, centre=(centre[0], centre[1]))


def _colours(rng: random.Random) -> tuple[words.Colour, words.Colour]:
    """Draws ink and background colours whose brightness differs by at least .35; often black on white."""
    if rng.random() < 0.3:
        return words.BLACK, words.WHITE
    while True:
        ink, ground = (tuple(rng.random() for _ in range(3)) for _ in range(2))
        if rng.random() < 0.4:
            ground = tuple(1 - 0.3 * v for v in ground)
        if abs(_light(ink) - _light(ground)) > 0.35:
            return ink, ground  # type: ignore[return-value]


def _light(colour: tuple[float, ...]) -> float:
    return 0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2]


@dataclass(frozen=True)
class Written:
    """An image with a word on it, and how the word is written."""

    image: Float[Tensor, "3 s s"]
    word: str
    writing: words.TextStyle

    def patches(self, size: int = 8) -> Bool[Tensor, " patches"]:
        """Returns which patches the word's box touches."""
        side = self.image.shape[-1]
        top, left, tall, wide = words.box_of(self.word, self.writing, side, side)
        inside = torch.zeros(side // size, side // size, dtype=torch.bool)
        inside[top // size : (top + tall - 1) // size + 1, left // size : (left + wide - 1) // size + 1] = (
            True
        )
        return inside.flatten()

    def letter_map(self, size: int = 8, columns: int = 2) -> Int[Tensor, "rows columns"]:
        """Returns the letter whose centre lies in each cell of ``size`` rows and ``size // columns`` columns of pixels.

        Cells hold 26 * (index in the word) + letter, or -1 for none. The word must not be rotated.
        """
        side = self.image.shape[-1]
        top, left, _, _ = words.box_of(self.word, self.writing, side, side)
        step, margin = size // columns, self.writing.margin
        found = torch.full((side // size, side // step), -1)
        middles = words.letter_centres(self.word, self.writing.font, self.writing.size)
        for index, (x, y) in enumerate(middles):
            row, column = int(top + margin + y) // size, int(left + margin + x) // step
            found[min(row, len(found) - 1), min(column, found.shape[1] - 1)] = (
                26 * index + ord(self.word[index]) - 97
            )
        return found


def write(image: Float[Tensor, "3 s s"], word: str, writing: words.TextStyle) -> Written:
    return Written(words.write(image, word, writing), word, writing)


def word_image(word: str, font: str, rng: random.Random, **how) -> Written:
    """Renders a word on a plain or shaded background, without a drawing."""
    writing = place(word, font, rng, **how)
    ink, ground = _colours(rng)
    side = mini.IMAGE_SIZE
    image = torch.tensor(ground).view(3, 1, 1).expand(3, side, side)
    if rng.random() < 0.3:  # shaded towards a slightly different colour
        ramp = torch.linspace(0, 1, side).view(*((1, side, 1) if rng.random() < 0.5 else (1, 1, side)))
        other = torch.tensor([min(1.0, max(0.0, v + rng.uniform(-0.15, 0.15))) for v in ground])
        image = image + (other.view(3, 1, 1) - image) * ramp
    if writing.plate is None:
        writing = replace(writing, ink=ink)
    return write(image, word, writing)


def word_images(chosen: list[str], fonts: list[str], rng: random.Random, **how) -> list[Written]:
    return [word_image(word, rng.choice(fonts), rng, **how) for word in chosen]


def pixels(made: list[Written]) -> Float[Tensor, "b 3 s s"]:
    """Returns the images as model inputs, from -1 to 1."""
    return torch.stack([one.image for one in made]).sub(0.5).div(0.5)


def word_caption(word: str, rng: random.Random) -> tuple[str, str]:
    """Draws the caption of a word image, and the key of what it describes: the thing or the written word."""
    if rng.random() < 0.35:
        return word, word
    return rng.choice(_PROMPTS).format(word), PROMPT.format(word)


def both_caption(name: str, word: str, rng: random.Random) -> tuple[str, str]:
    """Draws the caption of a drawing with a word on it: mostly both, sometimes only the word or the drawing."""
    roll = rng.random()
    if roll < 0.3:
        return word, word
    if roll < 0.4:
        return name, name
    caption = rng.choice(_BOTH).format(name, word)
    return caption, caption
