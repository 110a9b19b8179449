"""Reads CSV and TSV tables row by row: a malformed row is reported with its line number and does not affect others."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmhooks.data.sources.local_files import read_regular
from mmhooks.errors import DataError

MAX_TABLE = 2**30  # 1 GiB: twice CC3M's table


@dataclass(frozen=True)
class Line:
    """A row of a table by column, or why it is malformed. ``number``: of its first line."""

    number: int
    entry: dict[str, str]
    fault: str | None = None


def read_table(
    path: Path,
    required: Sequence[str],
    *,
    delimiter: str = ",",
    quoted: bool = True,
    columns: Sequence[str] = (),
) -> list[Line]:
    """Reads a UTF-8 table; blank lines are skipped.

    A row is malformed if its number of fields differs from the header's, a quote is never closed (the next row then
    begins on the next line), a field is longer than ``csv.field_size_limit()``, or it contains bytes that are not UTF-8.

    Args:
        required: columns that it must have; names and fields of a table with another delimiter than a comma are stripped.
        quoted: False where a quote is a character like others.
        columns: of a table without a header.

    Raises:
        DataError: a file that cannot be read, or a header that is damaged, repeats a column or lacks a required one.
    """
    # Bytes that are not UTF-8 become lone surrogates, which are detected in the row they belong to.
    text = _read(path).decode("utf-8-sig", errors="surrogateescape")
    lines = list(io.StringIO(text, newline=""))
    records = _records(lines, delimiter, quoted)
    header, fault = list(columns), None
    if not header:
        _, header, fault = next((r for r in records if r[1] or r[2]), (1, [], None))
        header = header if delimiter == "," else [name.strip() for name in header]
    if fault is not None or not all(map(_is_utf8, header)):
        raise DataError(
            f"{path}: expected a table in UTF-8, got a header with {fault or 'bytes that are not UTF-8'}; save it as UTF-8"
        )
    missing = [c for c in required if c not in header]
    if missing:
        raise DataError(
            f"{path}: expected columns {' and '.join(required)}, got {', '.join(header) or '(none)'}; "
            f"missing {' and '.join(missing)}"
        )
    twice = sorted({c for c in header if header.count(c) > 1})
    if twice:
        raise DataError(f"{path}: expected unique column names, got {twice[0]!r} twice")
    return [
        _line(number, fields, fault, header, delimiter)
        for number, fields, fault in records
        if fault is not None or fields
    ]


def _line(number: int, fields: list[str], fault: str | None, header: list[str], delimiter: str) -> Line:
    if fault is None and len(fields) != len(header):
        fault = f"expected {len(header)} fields ({', '.join(header)}), got {len(fields)}"
        if delimiter == ",":
            fault += '; put a text with commas or line ends in quotes: "a man, a dog"'
    if fault is None and not all(map(_is_utf8, fields)):
        fault = "it is not UTF-8"
    if delimiter != ",":
        fields = [field.strip() for field in fields]
    return Line(number, {} if fault else dict(zip(header, fields, strict=True)), fault)


def _read(path: Path) -> bytes:
    try:
        return read_regular(path, MAX_TABLE)
    except DataError as fault:
        raise DataError(f"{path}: {fault}") from fault


def _records(
    lines: Sequence[str], delimiter: str, quoted: bool
) -> Iterator[tuple[int, list[str], str | None]]:
    """Line number and fields of every record, or why it is malformed."""
    at = 0
    while at < len(lines):
        begun = at
        rest = (lines[i] for i in range(begun, len(lines)))
        quoting = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
        reader = csv.reader(rest, strict=True, delimiter=delimiter, quoting=quoting)
        try:
            for fields in reader:
                yield at + 1, fields, None
                at = begun + reader.line_num
        except csv.Error as fault:
            # An unclosed quote swallows the rest of the file, so parsing restarts on the next line.
            yield at + 1, [], _explain(str(fault))
            at += 1


def _explain(said: str) -> str:
    if "unexpected end of data" in said or "expected after" in said:
        return f'an unclosed quote, or a quote inside a quoted text that is not doubled ("") ({said})'
    return said


def _is_utf8(text: str) -> bool:
    return text.isascii() or not any("\udc80" <= c <= "\udcff" for c in text)
