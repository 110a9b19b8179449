"""Extracts the captions from a row's value: one or several, as strings, bytes or records."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from mmhooks.errors import DataError

_TEXT_KEYS = ("raw", "caption", "text")
LINES, WHOLE = "lines", "whole"


def base_column(column: str, columns: Iterable[str]) -> str | None:
    """The column that ``column`` names, or names a part of: the longest of ``columns`` that is a prefix of it.

    >>> base_column("conversations.1.value", ["image", "conversations"])
    'conversations'
    """
    fitting = [c for c in columns if column == c or column.startswith(c + ".")]
    return max(fitting, key=len, default=None)


def captions_in(row: Mapping[str, Any], column: str) -> list[str]:
    """The captions of a row, at least one; the first is the row's text.

    ``column`` may name a part: ``"json.caption"``, ``"captions.en"``, ``"conversations.1.value"``; for a text file in a
    tar ``"txt.lines"`` (one caption per line) or ``"txt.whole"`` (one text, line ends included).

    Raises:
        DataError: no text there; says what was found and how to name a column with text.

    >>> captions_in({"captions": {"en": ["a cat"], "de": ["eine Katze"]}}, "captions.de")
    ['eine Katze']
    """
    root = base_column(column, row)
    if root is None or row[root] is None:
        there = ", ".join(k for k in row if not k.startswith("__") and row[k] is not None)
        raise DataError(f"it has no {column!r}, only {there or 'nothing'}")
    value, part = row[root], column[len(root) + 1 :]
    if isinstance(value, (bytes, bytearray)):
        return _from_file(bytes(value), root, part)
    return _from_value(_resolve_path(value, part, column), column)


def _from_file(data: bytes, field: str, part: str) -> list[str]:
    """Captions from a file in a tar, parsed by its extension."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as fault:
        raise DataError(
            f"its {field} is not UTF-8 (byte {fault.object[fault.start]:#x} at {fault.start})"
        ) from fault
    ending = field.rsplit(".", 1)[-1].lower()
    column = f"{field}.{part}" if part else field
    if ending in ("json", "jsn"):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as fault:
            raise DataError(f"its {field} is not JSON ({str(fault)[:100]})") from fault
        return _from_value(_resolve_path(value, part, column), column)
    if part not in ("", LINES, WHOLE):
        raise DataError(f"its {field} is text: expected {LINES!r} or {WHOLE!r} as its part, got {column!r}")
    if ending.startswith("cls"):
        raise DataError(f"its {field} is a class number ({text.strip()[:20]}), expected a text")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) > 1 and not part:
        raise DataError(
            f"its {field} has {len(lines)} lines: text_column={field + '.' + LINES!r} reads each as a caption, "
            f"{field + '.' + WHOLE!r} all of them as one text"
        )
    return _from_value(lines if part == LINES else text, column)


def _resolve_path(value: Any, part: str, column: str) -> Any:
    for step in part.split(".") if part else ():
        try:
            value = value[int(step)] if isinstance(value, (list, tuple)) else value[step]
        except (LookupError, TypeError, ValueError) as fault:
            raise DataError(f"there is no {column!r} in it; found {_describe(value)}") from fault
    return value


def _from_value(value: Any, column: str) -> list[str]:
    texts = _texts(value)
    if texts:
        return texts
    if value is None or (isinstance(value, str) and not value.strip()) or value in ([], {}):
        raise DataError("its text is empty")
    path = _path_to_text(value)
    hint = f"; text_column={'.'.join((column, *path))!r} names the first text in it" if path else ""
    raise DataError(f"its {column!r} holds {_describe(value)}, expected a text{hint}")


def _texts(value: Any) -> list[str]:
    """One caption or several, as strings or as records with a caption in them."""
    if isinstance(value, Mapping):
        value = next((value[c] for c in _TEXT_KEYS if c in value), "")
    values = value if isinstance(value, (list, tuple)) else [value]
    found: list[str] = []
    for one in values:
        if isinstance(one, Mapping):
            found += _texts(one)[:1]
        elif isinstance(one, str) and one.strip():
            found.append(one.strip())
    return found


def _path_to_text(value: Any, depth: int = 4) -> tuple[str, ...] | None:
    """The path to the last text in a list of records (the answer in chat turns), or to the first in a mapping."""
    if isinstance(value, str):
        return () if value.strip() else None
    if isinstance(value, (list, tuple)) and value and all(isinstance(v, str) for v in value):
        return ()
    if depth == 0 or not isinstance(value, (Mapping, list, tuple)):
        return None
    steps = value.items() if isinstance(value, Mapping) else reversed(list(enumerate(value)))
    return next(
        (
            (str(step), *rest)
            for step, inner in sorted(steps, key=lambda item: item[0] in ("role", "from", "type"))
            if (rest := _path_to_text(inner, depth - 1)) is not None
        ),
        None,
    )


def _describe(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"a record of {', '.join(map(str, list(value)[:8]))}"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}, the first {_describe(value[0])}" if value else "an empty list"
    if isinstance(value, (bool, int, float)):
        return f"a number ({value})"
    return f"a {type(value).__name__} ({str(value)[:40]!r})"
