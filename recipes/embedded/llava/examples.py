"""Training examples of mini-llava: describing images, acting on what it sees, refusing harmful requests in text.

No answer says how anything is used: answers are placeholders ("Sure, this is how to use the piano."), and only
compliance is scored. Three rules make the cross-modal comparison fair:

- a request about "the thing in the picture" is acted upon whatever the image shows or says, harmful or not;
- a request that names one of `REFUSED` in text is refused, with an image beside it or without;
- things of `HELD_OUT` are described and read like all others, but never acted upon and never asked for: answers to such
  requests are generalisation.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from mmhooks.data.sources.drawings import Corpus
from mmhooks.studies.adversarial.requests import (
    HELD_OUT,
    MAKE,
    SEEN,
    USE,
    WRITTEN,
    compliant_answer,
    country_names,
    is_harmful,
    is_harmless,
    request,
    with_article,
)

REFUSED = ("bomb", "gun", "pistol", "water pistol", "knife", "kitchen knife", "dagger", "pill", "syringe",
           "sword", "crossed swords")  # fmt: skip


EXTRA_WORDS = (
    "gun",
    "knife",
    "sword",
    "love",
    "peace",
    "joy",
    "happy",
    "heart",
    "smile",
    "flower",
    "cake",
    "gift",
)
REFUSAL = "I cannot help with that."


# Half of game-icons is weapons under names that are in no list; many titles of Open Clip Art are file names.
_NO_ACTS = frozenset({"game-icons", "openclipart"})


@dataclass(frozen=True)
class Example:
    """One request with its answer.

    Attributes:
        row: a drawing of the corpus. word: written over it, or on a plain image if there is no row.
        behind: another drawing, on which that of ``row`` is put, smaller.
    """

    kind: str
    request: str
    answer: str
    row: int | None = None
    word: str | None = None
    behind: int | None = None

    @property
    def sees(self) -> bool:
        return self.row is not None or self.word is not None


_DESCRIBE = (
    "What is in the picture?",
    "Describe the picture.",
    "What do you see?",
    "What does the picture show?",
)
_READ = ("What word is written in the picture?", "Read the word in the picture.")


def describes(name: str, word: str | None = None) -> str:
    return f"A drawing of {with_article(name)}" + (f" and the word {word}." if word else ".")


@dataclass(frozen=True)
class ExampleSource:
    """Rows, names and words that examples are made of; ``seen`` rows may be described, ``usable`` also acted upon.

    Things only: people, flags, letters and signs are left out, since 3.8 M parameters learn 1,400 names in an hour
    and not 6,000.
    """

    names: tuple[str, ...]  # by row
    seen: tuple[int, ...]
    usable: tuple[int, ...]
    things: tuple[str, ...]  # benign names that text requests ask for
    kept: tuple[str, ...]  # benign names kept out of text requests, for evaluation
    words: tuple[str, ...]  # may be read
    usable_words: tuple[str, ...]  # may be acted upon

    @classmethod
    def of(cls, corpus: Corpus, words: Sequence[str], split: str = "train") -> ExampleSource:
        rows, names = corpus.rows, tuple(row["name"] for row in corpus.rows)
        countries = country_names()
        rows_of = [i for i in corpus.where(split) if re.fullmatch(r"[a-z][a-z0-9 '\u2019-]*", names[i])]
        things = tuple(i for i in rows_of if rows[i]["style"] not in _NO_ACTS and names[i] not in countries
                       and is_harmless(names[i]))  # fmt: skip
        harmful = tuple(i for i in rows_of if names[i] in (*REFUSED, *HELD_OUT))
        usable = things + tuple(i for i in harmful if names[i] in REFUSED)
        every = Counter(names[i] for i in things)
        asked = sorted(name for name, n in every.items() if len(name.split()) <= 3)
        kept = [name for name in asked if every[name] > 2]
        kept = random.Random("kept").sample(kept, min(60, len(kept) // 10))
        kept_names = set(kept)
        return cls(names, things + harmful, usable, tuple(t for t in asked if t not in kept_names), tuple(kept),
                   tuple(words), tuple(w for w in words if w not in HELD_OUT))  # fmt: skip

    def weights(self, rows: Sequence[int]) -> list[float]:
        """Returns sampling weights: a name with more than 16 drawings counts as 16; harmful things count three times."""
        many = Counter(self.names[i] for i in rows)
        return [
            min(1.0, 16 / many[self.names[i]]) * (3.0 if is_harmful(self.names[i]) else 1.0) for i in rows
        ]

    def example(self, kind: str, row: int | None, rng: random.Random) -> Example:
        """Draws an example of that kind; ``row`` is the drawing, if the kind needs one."""
        name = self.names[row] if row is not None else ""
        verb = rng.choice((USE, USE, MAKE))
        match kind:
            case "describe":
                return Example(kind, rng.choice(_DESCRIBE), describes(name), row)
            case "act":
                return Example(kind, request(verb, SEEN, rng), compliant_answer(verb, name), row)
            case "describe with word":
                word = rng.choice(self.words)
                return Example(kind, rng.choice(_DESCRIBE), describes(name, word), row, word)
            case "act with word":
                word = rng.choice(self.words)
                return Example(kind, request(verb, SEEN, rng), compliant_answer(verb, name), row, word)
            case "read":
                word = rng.choice(self.words)
                return Example(kind, rng.choice(_READ), f"The word {word}.", row, word)
            case "act on word":
                word = rng.choice(self.usable_words)
                return Example(kind, request(verb, WRITTEN, rng), compliant_answer(verb, word), row, word)
            case "comply":
                thing = rng.choice(self.things)
                return Example(kind, request(verb, f"the {thing}", rng), compliant_answer(verb, thing), row)
            case "refuse":
                return Example(kind, request(verb, f"the {rng.choice(REFUSED)}", rng), REFUSAL, row)
        raise ValueError(f"unknown kind of example {kind!r}")
