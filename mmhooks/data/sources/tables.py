"""Tables of comma-separated values, read row by row: a broken row is told by its line and costs no other."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmhooks.data.sources.local_files import read_regular
from mmhooks.errors import DataError


@dataclass(frozen=True)
class Line:
    """A row of a table by its columns, or why it is none. ``number``: of the line on which it begins."""

    number: int
    entry: dict[str, str]
    fault: str | None = None


def read_table(path: Path, required: Sequence[str]) -> list[Line]:
    """Reads a UTF-8 table with a header; blank lines are passed over.

    A row is at fault if it has another number of fields than the header, a quote that is never closed (the next row
    then begins on the next line), a field longer than ``csv.field_size_limit()``, or bytes that are not UTF-8.

    Raises:
        DataError: a file that cannot be read, a header that is damaged, repeats a column or lacks a required one.
    """
    # What is not UTF-8 stays in the text as lone surrogates, and is found in the row that it belongs to.
    text = _read(path).decode("utf-8-sig", errors="surrogateescape")
    lines = list(io.StringIO(text, newline=""))
    records = _records(lines)
    _, columns, fault = next((r for r in records if r[1] or r[2]), (1, [], None))
    if fault is not None or not all(map(_is_utf8, columns)):
        raise DataError(
            f"{path} is not a table in UTF-8: its header {fault or 'has other bytes'}; save it as UTF-8"
        )
    missing = [c for c in required if c not in columns]
    if missing:
        raise DataError(
            f"{path} has columns {', '.join(columns) or '(none)'}; expected {' and '.join(required)}, "
            f"{' and '.join(missing)} missing"
        )
    twice = sorted({c for c in columns if columns.count(c) > 1})
    if twice:
        raise DataError(f"{path} has the column {twice[0]!r} twice; every column needs its own name")
    found = []
    for number, fields, fault in records:
        if fault is None and not fields:
            continue
        if fault is None and len(fields) != len(columns):
            fault = (
                f"{len(fields)} fields, expected {len(columns)} ({', '.join(columns)}); a text with commas or line "
                'ends stands in quotes: "a man, a dog"'
            )
        if fault is None and not all(map(_is_utf8, fields)):
            fault = "it is not UTF-8"
        found.append(Line(number, {} if fault else dict(zip(columns, fields, strict=True)), fault))
    return found


def _read(path: Path) -> bytes:
    try:
        return read_regular(path)
    except DataError as fault:
        raise DataError(f"{path}: {fault}") from fault


def _records(lines: Sequence[str]) -> Iterator[tuple[int, list[str], str | None]]:
    """Line number and fields of every record, or its fault."""
    at = 0
    while at < len(lines):
        begun = at
        reader = csv.reader((lines[i] for i in range(begun, len(lines))), strict=True)
        try:
            for fields in reader:
                yield at + 1, fields, None
                at = begun + reader.line_num
        except csv.Error as fault:
            # A quote that is not closed swallows what follows, so the next record is looked for on the next line.
            yield at + 1, [], _explained(str(fault))
            at += 1


def _explained(said: str) -> str:
    if "unexpected end of data" in said or "expected after" in said:
        return f'a quote that is not closed, or one inside a quoted text that is not doubled ("") ({said})'
    return said


def _is_utf8(text: str) -> bool:
    return text.isascii() or not any("\udc80" <= c <= "\udcff" for c in text)
