"""Samples with a binary gender label, from code points, a label column, or an image classifier."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mmhooks.data.families import drawing_family
from mmhooks.errors import DataError, MissingWeights
from mmhooks.studies.common.placement import Placement
from mmhooks.utils.faults import first_line

CLASSES = ("woman", "man")
CLASSIFIER = "touchtech/fashion-images-gender-age-vit-large-patch16-224-in21k-v3"  # the paper's

# The noun pairs of Bolukbasi et al. (2016), "Man is to computer programmer ...". An outside list, but chosen after
# several prompt sets had been compared on the held-out drawings; only "a drawing of a woman" gave 59.7 % [46.8, 72.8].
PROMPTS: tuple[tuple[str, ...], tuple[str, ...]] = (
    ("woman", "girl", "daughter", "mother", "gal", "female"),
    ("man", "boy", "son", "father", "guy", "male"),
)

# Unicode's characters that are one woman or one man by themselves; everything else is a person of unstated gender.
_WOMEN = {0x1F469, 0x1F467, 0x1F475, 0x1F478, 0x1F930, 0x1F483, 0x1F9D5, 0x1F936}
_MEN = {0x1F468, 0x1F466, 0x1F474, 0x1F934, 0x1FAC3, 0x1F57A, 0x1F385}
_PERSON = 0x1F9D1
_FEMALE, _MALE, _JOINER = 0x2640, 0x2642, 0x200D
_TWO_PEOPLE = {0x1F46F, 0x1F93C}  # with bunny ears, wrestling: two people in one character
_TONES = dict(
    zip(range(0x1F3FB, 0x1F400), ("light", "medium-light", "medium", "medium-dark", "dark"), strict=True)
)
TONES = ("none (yellow)", *_TONES.values())
# Of a ZWJ sequence, the object that makes a profession; then the professions that are characters of their own.
_TOOLS = {
    0x2695: "health worker", 0x1F393: "student", 0x1F3EB: "teacher", 0x2696: "judge", 0x1F33E: "farmer",
    0x1F373: "cook", 0x1F527: "mechanic", 0x1F3ED: "factory worker", 0x1F4BC: "office worker",
    0x1F52C: "scientist", 0x1F4BB: "technologist", 0x1F3A4: "singer", 0x1F3A8: "artist", 0x2708: "pilot",
    0x1F680: "astronaut", 0x1F692: "firefighter",
}  # fmt: skip
_ALONE = {0x1F46E: "police officer", 0x1F575: "detective", 0x1F482: "guard", 0x1F477: "construction worker"}

_WORDS = (
    re.compile(
        r"\b(wom[ae]n|females?|girls?|lad(y|ies)|mothers?|princess|queen|grandm\w*|daughters?|f)\b", re.I
    ),
    re.compile(r"\b(m[ae]n|males?|boys?|gentlem[ae]n|fathers?|prince|king|grandp\w*|sons?|m)\b", re.I),
)


@dataclass(frozen=True)
class Sample:
    """One pair whose image shows one person.

    Attributes:
        row: of the pairs. label: 0 woman, 1 man, None where the data state no gender.
        strata: groups of the audit that it belongs to, e.g. ``{"skin tone": "dark", "profession": "farmer"}``.
        family: samples of one family are not independent evidence (six skin tones of one farmer).
        heldout: the model was not trained on it. confidence: of the classifier that labelled it.
    """

    row: int
    label: int | None
    strata: Mapping[str, str] = field(default_factory=dict)
    family: str = ""
    heldout: bool = False
    confidence: float | None = None


def gender_of_codepoints(code: str) -> int | None:
    """Returns 0 for one woman, 1 for one man, None for anything else, by Unicode's characters.

    >>> [gender_of_codepoints(c) for c in ("1f469-200d-1f33e", "1f3c3-1f3fb-200d-2642", "1f9d1-200d-1f33e", "2640")]
    [0, 1, None, None]
    """
    points = _points(code)
    if points[0] in _TWO_PEOPLE:
        return None
    women, men = (sum(p in chosen for p in points) for chosen in (_WOMEN, _MEN))
    female, male = _FEMALE in points and len(points) > 1, _MALE in points and len(points) > 1
    if women + men == 1 and not female and not male and _PERSON not in points:
        return 0 if women else 1
    if not women and not men and female != male:
        return 0 if female else 1
    return None


def strata_of_codepoints(code: str) -> dict[str, str]:
    """Returns skin tone and profession, where the characters state them.

    >>> strata_of_codepoints("1f469-1f3ff-200d-1f33e")
    {'skin tone': 'dark', 'profession': 'farmer'}
    """
    points = _points(code)
    skin_tone_masking = [_TONES[p] for p in points if p in _TONES]
    found = {"skin tone": skin_tone_masking[0] if len(skin_tone_masking) == 1 else TONES[0]}
    if points[0] in _ALONE:
        found["profession"] = _ALONE[points[0]]
    elif points[0] in (_PERSON, 0x1F468, 0x1F469) and _JOINER in points:
        tool = next((_TOOLS[p] for p in points[1:] if p in _TOOLS), None)
        if tool:
            found["profession"] = tool
    return found


def is_single_person(code: str) -> bool:
    """Returns whether it is one person of unstated gender: ``1f9d1``, its sequences, professions without a sign."""
    points = _points(code)
    people = sum(p in _WOMEN | _MEN | {_PERSON} for p in points)
    signs = {_FEMALE, _MALE} & set(points)
    return not signs and ((points[0] == _PERSON and people == 1) or (points[0] in _ALONE and people == 0))


def _points(code: str) -> list[int]:
    return [int(part, 16) for part in code.split("-")]


def label_words(given: str) -> tuple[tuple[str, ...], ...]:
    """Returns the words of women's and of men's label prompts: as given, by default :data:`PROMPTS`.

    Raises:
        DataError: not two sides with a word each.

    >>> label_words("female / male, man")
    (('female',), ('male', 'man'))
    """
    if not given:
        return PROMPTS
    sides = tuple(tuple(w.strip() for w in side.split(",") if w.strip()) for side in given.split("/"))
    if len(sides) != len(CLASSES) or not all(sides):
        raise DataError(f"--words: expected women's words/men's words, as 'female/male', got {given!r}")
    return sides


def gender_of_words(text: str) -> int | None:
    """Returns 0 or 1 where a label or caption names only women or only men, else None.

    >>> [gender_of_words(t) for t in ("Female", "a man and a woman", "young men", "a human")]
    [0, None, 1, None]
    """
    women, men = (bool(words.search(text)) for words in _WORDS)
    return None if women == men else int(men)


def from_drawings(pairs: Any) -> list[Sample]:
    """Returns the drawings of one person, by their code points: a woman, a man, or a person of unstated gender."""
    out, styles = [], {meta.get("style") for meta in pairs.meta if meta.get("codepoints")}
    for row, (meta, name, split) in enumerate(zip(pairs.meta, pairs.texts, pairs.splits, strict=True)):
        code = meta.get("codepoints")
        if code is None:
            continue
        label = gender_of_codepoints(code)
        if label is None and not is_single_person(code):
            continue
        strata = strata_of_codepoints(code)
        if len(styles) > 1:
            strata["style"] = str(meta["style"])
        out.append(Sample(row, label, strata, drawing_family(name), split != "train"))
    return out


def from_column(pairs: Any, column: str, strata: Sequence[str] = (), family: str = "") -> list[Sample]:
    """Returns samples labelled by a column with values such as ``woman``, ``Female``, ``men``, ``boy``; skips others.

    Raises:
        DataError: no such column, or none of its values is a gender.
    """
    known = sorted({key for meta in pairs.meta for key in meta})
    missing = [c for c in (column, *strata, *([family] if family else [])) if c not in known]
    if missing:
        raise DataError(
            f"{pairs.name} has no column {', '.join(missing)}; besides file_name and text it has {', '.join(known) or 'none'}"
        )
    out = [
        Sample(
            row,
            gender_of_words(str(meta.get(column, ""))),
            {s: str(meta.get(s, "")) for s in strata if meta.get(s)},
            str(meta.get(family, row)) if family else str(row),
        )
        for row, meta in enumerate(pairs.meta)
    ]
    if not any(s.label is not None for s in out):
        values = sorted({str(meta.get(column)) for meta in pairs.meta})[:8]
        raise DataError(f"{pairs.name}: no value of column {column} is a gender; it has {', '.join(values)}")
    return [s for s in out if s.label is not None]


def from_classifier(
    pairs: Any,
    name: str = CLASSIFIER,
    *,
    least: float = 0.0,
    strata: Sequence[str] = (),
    place: Placement | None = None,
    batch: int = 32,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Sample]:
    """Returns samples labelled by an image-classification model of ``transformers``, by name or path.

    Scores are summed over women's and over men's classes (``gender_of_words`` of their names); the larger sum gives
    the label and the confidence. Samples below ``least`` are left out.

    Raises:
        MissingWeights: the model is not on this machine and cannot be downloaded.
        DataError: none of its classes names a gender.
    """
    from transformers import pipeline

    try:
        where = {} if place is None else {"device": place.device, "dtype": place.dtype}
        model: Any = pipeline("image-classification", model=name, **where)
    except (OSError, ValueError) as fault:
        raise MissingWeights(
            f"image classifier {name!r} could not be loaded ({first_line(fault)}); give --classifier a local path, or "
            "--labels column"
        ) from fault
    classes = {
        str(c): gender_of_words(re.sub(r"[_\-/]+", " ", str(c))) for c in model.model.config.id2label.values()
    }
    if not {0, 1} <= set(classes.values()):
        raise DataError(
            f"classifier {name}: expected classes of women and of men, got classes {', '.join(classes)}; choose another"
        )
    out = []
    for begin in range(0, len(pairs), batch):
        rows = range(begin, min(begin + batch, len(pairs)))
        answers = model([pairs.image(i) for i in rows], top_k=len(classes))
        for row, answer in zip(rows, answers, strict=True):
            sums = [sum(a["score"] for a in answer if classes[a["label"]] == c) for c in (0, 1)]
            label = int(sums[1] > sums[0])
            if sums[label] >= least:
                own = {s: str(pairs.meta[row][s]) for s in strata if pairs.meta[row].get(s)}
                out.append(Sample(row, label, own, str(row), confidence=float(sums[label])))
        progress(len(rows))
    return out
