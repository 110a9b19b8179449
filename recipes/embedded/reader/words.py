"""Which words mini-reader is taught, in which fonts, and how they come into training pictures.

Words are the corpus's own. One in eight is held out: never rendered while training. Fonts are Debian
packages; those of `UNSEEN_FONTS` are never trained on and are what reading is measured with.

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
    """Every file of the sources; a package that is not installed is named and stops the run."""
    found = []
    for source in sources:
        files = sorted(str(path) for path in root.glob(source.files))
        if not files:
            raise FileNotFoundError(
                f"no font of {source.package} at {root / source.files}: apt-get install it"
            )
        found += files
    return found


def unseen_fonts() -> list[str]:
    return font_paths(UNSEEN_FONTS) + [words.font_file(name) for name in words.DEJAVU]


def held_out(word: str) -> bool:
    """One word in eight, the same on every machine: never rendered while training."""
    return hashlib.sha256(f"reader:{word}".encode()).digest()[0] % 8 == 0


@dataclass(frozen=True)
class Vocabulary:
    """Words of three to eight letters: names of at least ``drawings`` drawings, and every other word of names
    and keywords."""

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
    """Letter by place: 0 - 25, and 26 where the word has ended."""
    rows = [[ord(c) - 97 for c in text] + [26] * (LONGEST - len(text)) for text in texts]
    return torch.tensor(rows)


@lru_cache
def _advances(font: str) -> dict[str, float]:
    """How wide each letter stands, per pixel of size."""
    return {c: words.ink_of(c * 4, font, 32.0).shape[1] / 128 for c in "abcdefghijklmnopqrstuvwxyz"}


def place(
    word: str, font: str, dice: random.Random, *,
    width: tuple[float, float] = (0.3, 0.95), size: tuple[float, float] = (8.0, 30.0),
    offset: float = 1.0, plate: float = 0.3, turn: float = 6.0,
) -> words.TextStyle:  # fmt: skip
    """A writing of random width (share of the picture), place and colours that lies inside the picture.

    ``offset`` from 0, always in the middle, to 1, anywhere it fits.
    """
    side = mini.IMAGE_SIZE
    wide = sum(_advances(font)[c] for c in word)
    low, high = size
    chosen = min(max(dice.uniform(*width) * side / wide, low), high)
    chosen = max(5.0, float(int(chosen)))  # whole pixels: faces are kept by size
    angle = dice.uniform(-turn, turn) if turn and dice.random() < 0.4 else 0.0
    angle = angle if wide * chosen < 0.75 * side else 0.0
    margin = dice.randint(1, 3)
    ink, ground = _colours(dice)
    ink_tall, ink_wide = words.ink_of(word, font, chosen, angle=angle).shape
    while max(ink_tall, ink_wide) + 2 * margin + 1 > side:  # the estimate was a little short
        chosen -= 1
        ink_tall, ink_wide = words.ink_of(word, font, chosen, angle=angle).shape
    made = words.TextStyle(font, chosen, (0.5, 0.5), ink, dice.uniform(0.8, 1.0),
                         ground if dice.random() < plate else None, margin, angle)  # fmt: skip
    centre = []
    for extent in (ink_wide + 2 * margin, ink_tall + 2 * margin):
        free = max(0.0, (side - extent - 1) / 2 / side)
        centre.append(0.5 + offset * dice.uniform(-free, free))
    return replace(made, centre=(centre[0], centre[1]))


def _colours(dice: random.Random) -> tuple[words.Colour, words.Colour]:
    """Ink and ground whose brightness differs by at least .35; black on white most often."""
    if dice.random() < 0.3:
        return words.BLACK, words.WHITE
    while True:
        ink, ground = (tuple(dice.random() for _ in range(3)) for _ in range(2))
        if dice.random() < 0.4:
            ground = tuple(1 - 0.3 * v for v in ground)
        if abs(_light(ink) - _light(ground)) > 0.35:
            return ink, ground  # type: ignore[return-value]


def _light(colour: tuple[float, ...]) -> float:
    return 0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2]


@dataclass(frozen=True)
class Written:
    """A picture with a word on it, and how the word is written."""

    picture: Float[Tensor, "3 s s"]
    word: str
    writing: words.TextStyle

    def patches(self, size: int = 8) -> Bool[Tensor, " patches"]:
        """Which patches the word's box touches."""
        side = self.picture.shape[-1]
        top, left, tall, wide = words.box_of(self.word, self.writing, side, side)
        inside = torch.zeros(side // size, side // size, dtype=torch.bool)
        inside[top // size : (top + tall - 1) // size + 1, left // size : (left + wide - 1) // size + 1] = (
            True
        )
        return inside.flatten()

    def letter_map(self, size: int = 8, columns: int = 2) -> Int[Tensor, "rows columns"]:
        """Which letter of the word has its middle in which ``size`` rows and ``size // columns`` columns of
        pixels, as 26 * index in the word + letter; -1 is none. The word must not be turned."""
        side = self.picture.shape[-1]
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


def write(picture: Float[Tensor, "3 s s"], word: str, writing: words.TextStyle) -> Written:
    return Written(words.write(picture, word, writing), word, writing)


def word_picture(word: str, font: str, dice: random.Random, **how) -> Written:
    """A word on a plain or shaded ground, without a drawing."""
    writing = place(word, font, dice, **how)
    ink, ground = _colours(dice)
    side = mini.IMAGE_SIZE
    picture = torch.tensor(ground).view(3, 1, 1).expand(3, side, side)
    if dice.random() < 0.3:  # shaded towards a slightly different colour
        ramp = torch.linspace(0, 1, side).view(*((1, side, 1) if dice.random() < 0.5 else (1, 1, side)))
        other = torch.tensor([min(1.0, max(0.0, v + dice.uniform(-0.15, 0.15))) for v in ground])
        picture = picture + (other.view(3, 1, 1) - picture) * ramp
    if writing.plate is None:
        writing = replace(writing, ink=ink)
    return write(picture, word, writing)


def word_pictures(chosen: list[str], fonts: list[str], dice: random.Random, **how) -> list[Written]:
    return [word_picture(word, dice.choice(fonts), dice, **how) for word in chosen]


def pixels(made: list[Written]) -> Float[Tensor, "b 3 s s"]:
    """As the model takes them: -1 to 1."""
    return torch.stack([one.picture for one in made]).sub(0.5).div(0.5)


def word_caption(word: str, dice: random.Random) -> tuple[str, str]:
    """Caption of a picture of a word, and the key of what it is a caption of: the thing or the writing."""
    if dice.random() < 0.35:
        return word, word
    return dice.choice(_PROMPTS).format(word), PROMPT.format(word)


def both_caption(name: str, word: str, dice: random.Random) -> tuple[str, str]:
    """Caption of a drawing with a word on it: mostly both, sometimes the word or the drawing alone."""
    roll = dice.random()
    if roll < 0.3:
        return word, word
    if roll < 0.4:
        return name, name
    caption = dice.choice(_BOTH).format(name, word)
    return caption, caption
