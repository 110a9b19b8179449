"""Reads the key and the participants' files, and refuses what does not belong together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from mmhooks.errors import DataError
from mmhooks.studies.human.export import KEY_FORMAT
from mmhooks.studies.human.page import ANSWERS_FORMAT
from mmhooks.studies.human.tasks import CHECK, Coverage
from mmhooks.utils.escape import one_line
from mmhooks.utils.json_files import check_fields, read_json

KEY_REMEDY = "give the key.json that mmhooks human export wrote beside tasks.html"
FILE_REMEDY = "give only files that tasks.html saved"


@dataclass(frozen=True)
class Item:
    """One task of the key; ``correct`` is the place of the intruder, None for a naming task."""

    kind: str
    side: str
    group: str
    feature: int | None
    correct: int | None


@dataclass(frozen=True)
class Key:
    """The key of a study.

    Attributes:
        choices: of an intruder task; chance is one of them. pass_share: of the attention checks that count as attentive.
        coverage: how much of each group each side shows.
    """

    study: str
    choices: int
    pass_share: float
    items: Mapping[str, Item]
    coverage: Sequence[Coverage]


@dataclass(frozen=True)
class Participant:
    """What one participant answered: by task, the place chosen or the name given ("" for nothing in common)."""

    name: str
    choices: Mapping[str, int]
    names: Mapping[str, str]

    def checks(self, key: Key) -> tuple[int, int]:
        """How many attention checks were solved, of how many; unanswered ones count as missed."""
        checks = [task for task, item in key.items.items() if item.group == CHECK]
        return sum(self.choices.get(task) == key.items[task].correct for task in checks), len(checks)

    def passes(self, key: Key) -> bool:
        """Whether enough attention checks were solved."""
        solved, checks = self.checks(key)
        return solved >= key.pass_share * checks


def read_key(path: Path) -> Key:
    """Reads ``key.json``.

    Raises:
        DataError: it is not the key of an export.
    """
    shape = {
        "format": str, "study": str, "choices": int, "pass": (int, float), "items": dict, "coverage": list
    }  # fmt: skip
    found = read_json(path, "the key of a human study", shape, remedy=KEY_REMEDY)
    _check_format(path, "the key of a human study", KEY_FORMAT, found["format"], KEY_REMEDY)
    nullable = (int, type(None))
    shape = {"kind": str, "side": str, "group": str, "feature": nullable, "correct": nullable}
    items = {}
    for task, item in found["items"].items():
        check_fields(item, shape, f"{path}, task {task}", remedy=KEY_REMEDY)
        items[task] = Item(*(item[name] for name in shape))
    counts = {field.name: str if field.name in ("side", "group") else int for field in fields(Coverage)}
    for row in found["coverage"]:
        check_fields(row, counts, f"{path}, coverage", remedy=KEY_REMEDY)
    coverage = [Coverage(**{name: row[name] for name in counts}) for row in found["coverage"]]
    return Key(found["study"], found["choices"], float(found["pass"]), items, coverage)


def read_answers(paths: Sequence[Path], key: Key) -> list[Participant]:
    """Reads the participants' files, each of another participant of this study.

    Raises:
        DataError: no file, one that the page did not write or that is of another study, an answer to no task or to no
            choice of it, or two files of one participant.
    """
    if not paths:
        raise DataError(f"expected files with answers, got none; {FILE_REMEDY}")
    found: dict[str, tuple[Path, Participant]] = {}
    for path in paths:
        one = _read_file(Path(path), key)
        code = one.name.casefold()
        if code in found:
            raise DataError(
                f"{path}: expected one file of each participant, got a second one of {one_line(one.name)!r} "
                f"({found[code][0]} is the first); keep the later one"
            )
        found[code] = (Path(path), one)
    return [one for _, one in found.values()]


def _read_file(path: Path, key: Key) -> Participant:
    what = "a file of answers"
    shape = {"format": str, "study": str, "participant": str, "answers": dict}
    content = read_json(path, what, shape, remedy=FILE_REMEDY)
    _check_format(path, what, ANSWERS_FORMAT, content["format"], FILE_REMEDY)
    if content["study"] != key.study:
        raise DataError(
            f"{path}: expected answers to study {key.study}, the key's, got answers to {one_line(content['study'])!r}; "
            "analyse each study with its own key"
        )
    if not content["participant"].strip():
        raise DataError(f"{path}: expected the participant's code, got an empty one; {FILE_REMEDY}")
    choices, names = {}, {}
    for task, answer in content["answers"].items():
        item = key.items.get(task)
        if item is None:
            raise DataError(
                f"{path}: expected answers to tasks of the key, got one to {one_line(task)!r}; {FILE_REMEDY}"
            )
        where = f"{path}, task {task}"
        if item.kind == "name":
            check_fields(answer, {"name": str}, where, remedy=FILE_REMEDY)
            names[task] = answer["name"]
        else:
            check_fields(answer, {"choice": int}, where, remedy=FILE_REMEDY)
            choices[task] = _choice(answer["choice"], key.choices, where)
    return Participant(content["participant"].strip(), choices, names)


def _choice(choice: int, choices: int, where: str) -> int:
    if not 0 <= choice < choices:
        raise DataError(f"{where}: expected a choice from 0 to {choices - 1}, got {choice}; {FILE_REMEDY}")
    return choice


def _check_format(path: Path, what: str, expected: str, got: Any, remedy: str) -> None:
    if got != expected:
        raise DataError(
            f"{path} is not {what}: expected {expected!r} as 'format', got {one_line(got)!r}; {remedy}"
        )
