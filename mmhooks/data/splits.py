"""The fixed splits of the drawing corpora, determined by hashes of names, so that nothing is stored.

A *concept* is what a drawing shows, ignoring skin tone; a *style* is the set it belongs to. Three concepts in twenty
are held out in every style, so a model trained on ``train`` has seen no image of them; of the other concepts, one image
in twelve is held out, so its concept was seen only in other styles.
"""

from __future__ import annotations

import random
import re
from hashlib import blake2b
from typing import Literal


def choose(n: int, limit: int, seed: int) -> list[int]:
    """``limit`` random positions out of ``n``, in order; reproducible by seed."""
    return sorted(random.Random(seed).sample(range(n), min(limit, n)))


Split = Literal["train", "heldout_pictures", "heldout_concepts"]

SPLITS: tuple[Split, ...] = ("train", "heldout_pictures", "heldout_concepts")

_TONE = re.compile(r"\b(?:(?:medium )?(?:light|dark)|medium) skin tone\b")
_PREFIX = re.compile(r"^(?:(?:a|an|the) (?=\w{2})|flag (?:for )?(?:flag )?(?=\w))")


def concept_key(name: str) -> str:
    """The concept in a drawing's name: lower case, words only, without article, skin tone or "flag of".

    >>> concept_key("woman farmer: medium-dark skin tone")
    'woman farmer'
    >>> concept_key("The_Red-Panda!")
    'red panda'
    """
    words = re.sub(r"[\W_]+", " ", name.lower()).strip()
    bare = " ".join(_TONE.sub(" ", words).split())
    return _PREFIX.sub("", bare) or words or name.strip()


def split_of(style: str, name: str) -> Split:
    """The split of the drawing of ``name`` (in any spelling) in ``style``; the same on every machine.

    >>> split_of("openmoji", "woman farmer") == split_of("openmoji", "Woman Farmer: dark skin tone")
    True
    """
    key = concept_key(name)
    if _unit_hash(f"concept/{key}") < 0.15:
        return "heldout_concepts"
    if _unit_hash(f"picture/{style}/{key}") < 1 / 12:
        return "heldout_pictures"
    return "train"


def _unit_hash(text: str) -> float:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64
