"""Files of results that are damaged or another's: one of our errors with path, expected, found and what to do."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from mmhooks.errors import MMHooksError

DAMAGED = {
    "empty": b"",
    "cut": b'{"kind": "HeadLabels", "form',
    "not UTF-8": b"\xff\xfe{}",
    "too deep": b"[" * 200_000,
    "a number too long": b"9" * 10_000,
    "a list": b"[1, 2]",
    "null": b"null",
    "another file": b'{"kind": "Measures"}',
}


def readers(path: Path) -> dict[str, object]:
    """Every reader of results in the analyses, on ``path``."""
    from mmhooks.analysis.decomposition.head_labels import HeadLabels
    from mmhooks.analysis.measures import sweep

    return {"labels": lambda: HeadLabels.load(path), "sweep": lambda: sweep._finished(path, "mark")}


@pytest.mark.parametrize("reader", ["labels", "sweep"])
@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_results_are_told(reader: str, damage: str, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_bytes(DAMAGED[damage])
    with pytest.raises(MMHooksError, match="expected") as caught:
        readers(path)[reader]()
    said = str(caught.value)
    assert str(path) in said and "got" in said and ("again" in said or "save" in said)


@pytest.mark.parametrize("reader", ["labels", "sweep"])
def test_folders_in_the_place_of_results_are_told(reader: str, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.mkdir()
    with pytest.raises(MMHooksError, match="cannot be read"):
        readers(path)[reader]()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": True}, "a whole number as 'format'"),
        ({"format": 99}, "format 99"),
        ({"texts": {"5.2": "a beach"}}, "a list of texts"),
        ({"texts": {"5.2": [1]}}, "a list of texts"),
        ({"kinds": {}}, "kinds of the same 1 heads"),
        ({"kinds": 3}, "an object or null as 'kinds'"),
        ({"model": None}, "a text as 'model', got None"),
    ],
)
def test_labels_are_read_field_by_field(change: dict, words: str, tmp_path: Path) -> None:
    from mmhooks.analysis.decomposition.head_labels import HeadLabels

    path = HeadLabels("mini", {"5.2": ("a beach",)}, kinds={"5.2": ("place",)}).save(tmp_path / "labels.json")
    assert HeadLabels.load(path).texts == {"5.2": ("a beach",)}
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(MMHooksError, match=words):
        HeadLabels.load(path)


def test_answers_that_are_kept_follow_the_umask(tmp_path: Path) -> None:
    from mmhooks.utils.files import make_folder, write_text

    before = os.umask(0o022)
    try:
        path = write_text(make_folder(tmp_path / "answers") / "a.json", "{}")
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o644
