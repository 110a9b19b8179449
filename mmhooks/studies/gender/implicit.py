"""Texts that imply a gender without naming one: the text arm that has anything to lose.

Captions such as "woman farmer" contain their label, and are classified without a fault whatever is masked. These
texts name roles, clothes and looks instead. The label is a convention of drawings and dictionaries, not a truth about
anybody. The list was fixed before the first run; each keyword is a family of its own, with all of its templates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mmhooks.errors import DataError
from mmhooks.models.clip.embed_texts import embed_texts
from mmhooks.studies.gender.discrimination import Arm
from mmhooks.studies.gender.masking import SIDES, Inputs
from mmhooks.studies.gender.samples import gender_of_words

KEYWORDS: tuple[tuple[str, ...], tuple[str, ...]] = (
    ("ballerina", "bride", "nun", "witch", "mermaid", "fairy", "midwife", "housewife", "cheerleader", "maid",
     "nanny", "geisha", "diva", "lipstick", "red lips", "long hair and a bow", "ponytail", "pigtails", "long eyelashes",
     "earrings and a necklace", "dress", "skirt", "bikini", "high heels", "blouse", "handbag and lipstick", "tiara",
     "veil", "headscarf", "pink ribbon in the hair"),
    ("groom", "monk", "priest", "wizard", "cowboy", "pirate", "lumberjack", "knight in armour", "viking", "samurai",
     "butler", "blacksmith", "plumber", "soldier", "wrestler", "beard", "moustache", "bald head and a beard",
     "sideburns", "short hair and a beard", "necktie", "tuxedo", "suit and tie", "bow tie and a top hat", "boxer shorts",
     "turban", "pipe and a moustache", "bare chest with muscles", "flat cap and a moustache", "kilt"),
)  # fmt: skip
TEMPLATES = ("a drawing of a person: {}", "{}", "someone, {}")


def implicit_texts() -> tuple[list[str], list[int], list[str]]:
    """Returns the texts, the label of each (0 woman, 1 man), and its keyword.

    Raises:
        DataError: a text names a gender.
    """
    rows = [(t.format(k), c, k) for c, words in enumerate(KEYWORDS) for k in words for t in TEMPLATES]
    named = [text for text, _, _ in rows if gender_of_words(text) is not None]
    if named:
        raise DataError(f"implicit texts: expected texts that name no gender, got {named[0]!r}")
    texts, labels, keywords = zip(*rows, strict=True)
    return list(texts), list(labels), list(keywords)


def implicit_arm(model: Any, head: Any) -> Arm:
    """Returns the implicit texts, embedded by the model's text tower, ready to be masked by ``head``."""
    texts, labels, keywords = implicit_texts()
    return Arm.of("implicit texts", "text", head, embed_texts(model, texts), torch.tensor(labels), keywords)


def all_arms(model: Any, head: Any, inputs: Inputs, families: Sequence[str]) -> list[Arm]:
    """Returns what is separated: judged images, their texts, which mostly name the gender, and the implicit texts."""
    judged = [
        Arm.of(
            f"{side}s",
            side,
            head,
            inputs.encoded.vectors(side, inputs.judged.rows),
            inputs.judged.y,
            families,
        )
        for side in SIDES
    ]
    return [*judged, implicit_arm(model, head)]
