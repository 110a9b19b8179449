"""A folder of pictures with ``metadata.csv``."""

from __future__ import annotations

import csv
import io
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path

from PIL import Image

from mmhooks.data.pair_set import Pairs, Row, check_rows
from mmhooks.data.progress import track
from mmhooks.errors import DataError

REQUIRED = ("file_name", "text")
_FEW = 500  # pictures that are checked without a bar


def folder(
    place: Path, *, split: str | None, limit: int | None, on_error: str, seed: int, progress: bool
) -> Pairs:
    """Pairs of ``place/metadata.csv``. Every picture is read once here: what cannot be decoded is named now,
    not an hour into an extraction, and the fingerprint covers the files' bytes."""
    from mmhooks.data.sources import choose

    rows = _read_table(place / "metadata.csv")
    skipped: dict[str, str] = {}
    if on_error == "skip":
        rows = list(_without_repeats(rows, skipped))
        for row in [row for row in rows if not row.text.strip()]:
            skipped[str(row.picture)] = "its text is empty"
        rows = [row for row in rows if row.text.strip()]
    check_rows(rows, str(place))
    if split is not None:
        rows = _of_split(rows, split, place)
    if limit is not None and limit < len(rows):
        rows = [rows[i] for i in choose(len(rows), limit, seed)]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:  # decoding leaves the interpreter free
        checks = pool.map(lambda row: _check(place / str(row.picture)), rows)
        show = progress and len(rows) > _FEW
        results = list(track(checks, len(rows), f"checking pictures of {place.name}", show=show))
    kept, digest = [], blake2b(digest_size=10)
    for row, (content, fault) in zip(rows, results, strict=True):
        if fault is None:
            kept.append(row)
            digest.update(content)
        elif on_error == "skip":
            skipped[str(row.picture)] = fault
        else:
            bad = [str(r.picture) for r, (_, f) in zip(rows, results, strict=True) if f is not None]
            raise DataError(
                f"{place}: {len(bad)} of {len(rows)} pictures cannot be used, the first is {row.picture}: {fault}; "
                'mend or remove them, or leave them out with on_error="skip"'
            )
    notice = place / "LICENSE"
    licence = (
        notice.read_text(encoding="utf-8", errors="replace").strip().splitlines()[:1]
        if notice.is_file()
        else []
    )
    return Pairs(
        kept, _Files(place), name=str(place), content=digest.hexdigest(), skipped=skipped,
        licence=licence[0] if licence else "not stated (add a LICENSE file)",
    )  # fmt: skip


def _read_table(path: Path) -> list[Row]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or []
            missing = [c for c in REQUIRED if c not in columns]
            if missing:
                raise DataError(
                    f"{path} has columns {', '.join(columns) or '(none)'}; expected {' and '.join(REQUIRED)}, "
                    f"{' and '.join(missing)} missing"
                )
            table = list(reader)
    except UnicodeDecodeError as fault:
        raise DataError(f"{path} is not UTF-8 ({fault}); save it as UTF-8") from fault
    rows = []
    for number, entry in enumerate(table, start=2):
        file_name = (entry["file_name"] or "").strip()
        if not file_name:
            raise DataError(f"{path}, line {number}: file_name is empty")
        known = {*REQUIRED, "id", "split"}
        meta = {k: v for k, v in entry.items() if k is not None and k not in known}
        rows.append(
            Row(entry.get("id") or file_name, entry["text"] or "", file_name, entry.get("split") or "", meta)
        )
    return rows


def _without_repeats(rows: list[Row], skipped: dict[str, str]) -> Iterator[Row]:
    seen: Counter[str] = Counter()
    for row in rows:
        seen[row.id] += 1
        if seen[row.id] == 1:
            yield row
        else:
            skipped[f"{row.picture} (id {row.id}, no. {seen[row.id]})"] = "its id occurs before"


def _of_split(rows: list[Row], split: str, place: Path) -> list[Row]:
    named = Pairs(rows, _Files(place), name=str(place), content="")
    return [row for row, s in zip(rows, named.splits, strict=True) if s == split] or list(
        named.split(split)._rows
    )


def _check(path: Path) -> tuple[bytes, str | None]:
    """The hash of the file's bytes, or why it is no picture."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return b"", "there is no such file"
    except OSError as fault:
        return b"", str(fault.strerror)
    try:
        image = Image.open(io.BytesIO(data))
        # JPEG decodes at an eighth of its size here; truncated data shows all the same.
        image.draft("RGB", (1, 1))
        image.load()
    except Image.UnidentifiedImageError:
        return b"", f"cannot identify image file ({len(data)} bytes)"
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as fault:
        return b"", str(fault)
    return blake2b(data, digest_size=10).digest(), None


class _Files:
    def __init__(self, place: Path) -> None:
        self._place = place

    def open(self, picture: int | str) -> Image.Image:
        return Image.open(self._place / str(picture))
