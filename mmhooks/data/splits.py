"""The fixed splits of the drawing corpora: a hash of names decides, nothing is stored.

A *concept* is what a drawing shows, skin tone aside; a *style* is the set it was drawn in. Three concepts in
twenty are held out in every style, so no model trained on ``train`` ever saw a picture of it; of the other
concepts, one picture in twelve is held out, so its concept was seen in other styles only.
"""

from __future__ import annotations

import random
import re
from hashlib import blake2b
from typing import Literal


def choose(n: int, limit: int, seed: int) -> list[int]:
    """``limit`` of ``n`` positions at random, in order; the same for the same seed."""
    return sorted(random.Random(seed).sample(range(n), min(limit, n)))


Split = Literal["train", "heldout_pictures", "heldout_concepts"]

SPLITS: tuple[Split, ...] = ("train", "heldout_pictures", "heldout_concepts")

_TONE = re.compile(r"\b(?:(?:medium )?(?:light|dark)|medium) skin tone\b")
_PREFIX = re.compile(r"^(?:(?:a|an|the) (?=\w{2})|flag (?:for )?(?:flag )?(?=\w))")


def concept_key(name: str) -> str:
    """The concept that a drawing's name stands for: lower case, words only; no article, skin tone or "flag of".

    >>> concept_key("woman farmer: medium-dark skin tone")
    'woman farmer'
    >>> concept_key("The_Red-Panda!")
    'red panda'
    """
    words = re.sub(r"[\W_]+", " ", name.lower()).strip()
    bare = " ".join(_TONE.sub(" ", words).split())
    return _PREFIX.sub("", bare) or words or name.strip()


def split_of(style: str, name: str) -> Split:
    """The split of the drawing of ``name`` (any spelling) in ``style``; the same on every machine.

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
