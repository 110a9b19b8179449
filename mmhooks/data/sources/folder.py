"""A folder of images with ``metadata.csv``."""

from __future__ import annotations

from pathlib import Path

from mmhooks.data.sources.image_files import Captioned, Listing, grouped
from mmhooks.data.sources.local_files import DataRoot
from mmhooks.data.sources.tables import Line, read_table

REQUIRED = ("file_name", "text")
_KNOWN = {*REQUIRED, "id", "split"}


def folder(place: Path, *, allow_outside: bool = False) -> Listing:
    """The images of ``place/metadata.csv``; rows of one image without ids of their own are its captions.

    Raises:
        DataError: a table that cannot be read, or without the columns ``file_name`` and ``text``.
    """
    root = DataRoot(place, allow_outside=allow_outside)
    entries = [_entry(line) for line in read_table(root.inside("metadata.csv"), REQUIRED)]
    return Listing(str(place), tuple(grouped(entries)), root)


def _entry(line: Line) -> Captioned:
    at, entry = f"line {line.number}", line.entry
    if line.fault is not None:
        return Captioned("", "", place=at, fault=line.fault)
    file_name = entry["file_name"].strip()
    if not file_name:
        return Captioned("", "", place=at, fault="file_name is empty")
    meta = {k: v for k, v in entry.items() if k not in _KNOWN}
    key = entry.get("id") or file_name
    return Captioned(key, file_name, (entry["text"],), entry.get("split", ""), meta, at)
