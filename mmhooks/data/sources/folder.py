"""Pairs from a folder of images with ``metadata.csv``."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path

from PIL import Image

from mmhooks.data.pair_set import Pairs, Row, check_rows
from mmhooks.data.sources.images import image_fault, open_image
from mmhooks.data.sources.local_files import DataRoot
from mmhooks.data.sources.tables import Line, read_table
from mmhooks.errors import DataError
from mmhooks.utils.progress import track

REQUIRED = ("file_name", "text")
_KNOWN = {*REQUIRED, "id", "split"}
_FEW = 500  # up to this many images are checked without a progress bar


def folder(
    place: Path,
    *,
    split: str | None,
    limit: int | None,
    on_error: str,
    seed: int,
    allow_outside: bool,
    progress: bool,
) -> Pairs:
    """Pairs of ``place/metadata.csv``. Every image is read once here, so that undecodable ones are reported now
    and not an hour into an extraction, and the fingerprint covers the files' bytes."""
    from mmhooks.data.splits import choose

    root = DataRoot(place, allow_outside=allow_outside)
    skipped: dict[str, str] = {}
    rows = _rows(root, place / "metadata.csv", on_error, skipped)
    if on_error == "skip":
        rows = list(_without_repeats(rows, skipped))
        for row in [row for row in rows if not row.text.strip()]:
            skipped[str(row.image_key)] = "its text is empty"
        rows = [row for row in rows if row.text.strip()]
    check_rows(rows, str(place))
    if split is not None:
        rows = _rows_of_split(rows, split, root, str(place))
    if limit is not None and limit < len(rows):
        rows = [rows[i] for i in choose(len(rows), limit, seed)]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:  # decoding releases the interpreter lock
        checks = pool.map(lambda row: _check(root, str(row.image_key)), rows)
        show = progress and len(rows) > _FEW
        results = list(track(checks, len(rows), f"checking images of {place.name}", show=show))
    kept, digest = [], blake2b(digest_size=10)
    for row, (content, fault) in zip(rows, results, strict=True):
        if fault is None:
            kept.append(row)
            digest.update(content)
        elif on_error == "skip":
            skipped[str(row.image_key)] = fault
        else:
            bad = [str(r.image_key) for r, (_, f) in zip(rows, results, strict=True) if f is not None]
            raise DataError(
                f"{place}: {len(bad)} of {len(rows)} images cannot be used, the first is {row.image_key}: {fault}; "
                'fix or remove them, or leave them out with on_error="skip"'
            )
    return Pairs(
        kept, _Files(root), name=str(place), content=digest.hexdigest(), skipped=skipped,
        licence=_licence(root) or "not stated (add a LICENSE file)",
    )  # fmt: skip


def _licence(root: DataRoot) -> str:
    """The first line of the folder's LICENSE, if it has one."""
    try:
        notice = root.read("LICENSE").decode("utf-8", errors="replace")
    except DataError:
        return ""
    return (notice.strip().splitlines() or [""])[0]


def _rows(root: DataRoot, path: Path, on_error: str, skipped: dict[str, str]) -> list[Row]:
    rows = []
    for line in read_table(root.inside(path.name), REQUIRED):
        fault = line.fault or ("file_name is empty" if not line.entry["file_name"].strip() else None)
        if fault is None:
            rows.append(_row(line))
        elif on_error == "skip":
            skipped[f"line {line.number}"] = fault
        else:
            raise DataError(
                f'{path}, line {line.number}: {fault}; fix it, or leave it out with on_error="skip"'
            )
    return rows


def _row(line: Line) -> Row:
    entry = line.entry
    file_name = entry["file_name"].strip()
    meta = {k: v for k, v in entry.items() if k not in _KNOWN}
    return Row(entry.get("id") or file_name, entry["text"], file_name, entry.get("split", ""), meta)


def _without_repeats(rows: list[Row], skipped: dict[str, str]) -> Iterator[Row]:
    seen: Counter[str] = Counter()
    for row in rows:
        seen[row.id] += 1
        if seen[row.id] == 1:
            yield row
        else:
            skipped[f"{row.image_key} (id {row.id}, no. {seen[row.id]})"] = "its id is a duplicate"


def _rows_of_split(rows: list[Row], split: str, root: DataRoot, name: str) -> list[Row]:
    named = Pairs(rows, _Files(root), name=name, content="")
    return [row for row, s in zip(rows, named.splits, strict=True) if s == split] or list(
        named.split(split)._rows
    )


def _check(root: DataRoot, name: str) -> tuple[bytes, str | None]:
    """The hash of the file's bytes, or why it is not a usable image."""
    try:
        data = root.read(name)
    except DataError as fault:
        return b"", str(fault)
    fault = image_fault(data)
    return (blake2b(data, digest_size=10).digest(), None) if fault is None else (b"", fault)


class _Files:
    def __init__(self, root: DataRoot) -> None:
        self._root = root

    def open(self, image_key: int | str) -> Image.Image:
        return open_image(self._root.read(str(image_key)))
