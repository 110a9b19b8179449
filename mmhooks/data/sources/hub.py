"""Pairs from image-text data sets that ``datasets`` reads: streamed once into an Arrow file in the user's cache."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from PIL import Image

from mmhooks.data.pair_set import Pairs, Row
from mmhooks.data.sources.caption_choice import Captions, chosen_texts
from mmhooks.data.sources.captions import captions_in
from mmhooks.data.sources.images import image_fault, open_image
from mmhooks.data.sources.opening import (
    KNOWN,
    Columns,
    OpenDataset,
    Source,
    columns_of,
    encoded,
    files_of,
    id_of,
    image_endings,
    iterate_rows,
    open_rows,
)
from mmhooks.data.sources.tars import FAULT
from mmhooks.errors import DataError
from mmhooks.utils.files import atomic_path, cache_dir, reading_cache_file, write_text
from mmhooks.utils.progress import track

BATCH = 64
EDGE = 2**20
_LAYOUT = 3  # version of the cached files and the meaning of their rows; other versions are not read


def stream(
    name: str,
    *,
    split: str | None,
    limit: int | None,
    on_error: str,
    image_column: str | None = None,
    text_column: str | None = None,
    meta_columns: Sequence[str] = (),
    captions: Captions = "first",
    seed: int = 0,
    allow_outside: bool = False,
    progress: bool = True,
) -> Pairs:
    """Pairs of a data set: its encoded images are fetched once, cached, and read memory-mapped."""
    known = KNOWN.get(name)
    path, wanted = (known.path, split or known.split) if known else (name, split)
    request = [_LAYOUT, path, wanted, limit, on_error, image_column, text_column, allow_outside]
    request += [file_state(Path(path).expanduser()), list(meta_columns), captions == "none"]
    key = blake2b(json.dumps(request).encode(), digest_size=10).hexdigest()
    stored = cache_dir("pairs") / f"{''.join(c if c.isalnum() else '_' for c in name)[-40:]}-{key}.arrow"
    if not stored.exists():
        opened = open_rows(path, wanted, name, allow_outside=allow_outside)
        columns = columns_of(opened, known, image_column, text_column, name, texts=captions != "none")
        describe = _meta_encoder(opened.columns, meta_columns, name)
        _write_cache_file(stored, _UsableRows(opened, columns, describe, name, on_error), limit, progress)
    return _read_cache_file(stored, name, known, captions, seed)


def file_state(place: Path) -> list[Any]:
    """Identifies the files of a local data set, so that changed files are read again and stores of them not resumed.

    Consists of names, sizes, times, and the first and last megabyte of every file except images: a tar replaced by one
    of equal size and time differs there, since samples are stored one after another. Hashing all of a data set that is
    larger than the disk cache would take as long as extracting it. Images of a folder (possibly hundreds of thousands)
    are identified by name, size and time; files elsewhere that rows refer to are not considered.
    """
    files = sorted(p for p in files_of(place) if p.is_file())
    return [[str(p), (s := p.stat()).st_size, s.st_mtime_ns, _edge_hash(p, s.st_size)] for p in files]


def _edge_hash(file: Path, size: int) -> str:
    if file.suffix.lower() in image_endings():
        return ""
    with file.open("rb") as opened:
        digest = blake2b(opened.read(EDGE), digest_size=10)
        opened.seek(max(EDGE, size - EDGE))  # a smaller file was read completely above
        digest.update(opened.read(EDGE))
    return digest.hexdigest()


def _meta_encoder(
    columns: Mapping[str, Any], wanted: Sequence[str], name: str
) -> Callable[[Mapping[str, Any]], str]:
    """Returns a function that encodes a row's wanted columns as JSON, with classes by name."""
    missing = [c for c in wanted if c not in columns]
    if missing:
        raise DataError(f"{name}: expected columns {', '.join(missing)}, got {', '.join(columns)}")

    def word(column: str, value: Any) -> str:
        name_of = getattr(columns[column], "int2str", None)
        if isinstance(value, bytes):  # a file in a tar
            return value.decode("utf-8", errors="replace")
        return str(name_of(value)) if name_of and isinstance(value, int) and value >= 0 else str(value)

    return lambda row: json.dumps({c: word(c, row.get(c)) for c in wanted})


class _UsableRows:
    """Iterates over the usable rows of a data set in the form in which they are cached.

    Attributes:
        skipped: row and id of each row that was left out, and why.
        digest: of ids and images.
    """

    def __init__(
        self,
        opened: OpenDataset,
        columns: Columns,
        describe: Callable[[Mapping[str, Any]], str],
        name: str,
        on_error: str,
    ) -> None:
        self._opened, self._columns, self._describe = opened, columns, describe
        self.name, self._on_error = name, on_error
        self.skipped: dict[str, str] = {}
        self.digest = blake2b(digest_size=10)
        self._seen: set[str] = set()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number, row in enumerate(iterate_rows(self._opened, self._opened.rows, self.name)):
            key = f"{number:09d}"
            try:
                key = str(row.get(self._columns.id, key)) if self._columns.id else key
                kept = self._kept(key, row)
            except DataError as fault:
                if self._on_error != "skip":
                    raise DataError(
                        f'{self.name}, row {number} ({key}): {fault}; on_error="skip" leaves such rows out'
                    ) from fault
                self.skipped[f"row {number} ({key})"] = str(fault)
            else:
                yield kept

    def _kept(self, key: str, row: Mapping[str, Any]) -> dict[str, Any]:
        if FAULT in row:
            raise DataError(row[FAULT])
        if self._columns.id:
            key = id_of(row, self._columns.id)
        if key in self._seen:
            raise DataError("its id is a duplicate")
        captions = captions_in(row, self._columns.text) if self._columns.text is not None else []
        data = encoded(row.get(self._columns.image), self._opened.root)
        fault = image_fault(data)
        if fault is not None:
            raise DataError(f"its image cannot be read: {fault}")
        self._seen.add(key)
        self.digest.update(f"\0{key}\0".encode() + data)
        return {"id": key, "captions": captions, "image": data, "meta": self._describe(row)}


def _write_cache_file(stored: Path, usable: _UsableRows, limit: int | None, progress: bool) -> None:
    """Writes id, texts and encoded image of every usable row, atomically."""
    import pyarrow as pa

    schema = pa.schema(
        [
            ("id", pa.string()),
            ("captions", pa.list_(pa.string())),
            ("image", pa.large_binary()),
            ("meta", pa.string()),
        ]
    )
    kept = 0
    rows = track(itertools.islice(usable, limit), limit, f"fetching {usable.name} (once)", show=progress)
    with atomic_path(stored) as aside:
        with pa.OSFile(str(aside), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for batch in _batches(rows):
                kept += len(batch)
                writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))
        if not kept:
            raise DataError(f"{usable.name}: none of its rows can be used{describe_skipped(usable.skipped)}")
        about = {"content": usable.digest.hexdigest(), "rows": kept, "skipped": usable.skipped}
        write_text(stored.with_suffix(".json"), json.dumps(about))


def _batches(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    left = iter(rows)
    while batch := list(itertools.islice(left, BATCH)):
        yield batch


def describe_skipped(skipped: Mapping[str, str]) -> str:
    """`` (3 skipped, the first is row 0: why)``, or that the data set has no rows."""
    if not skipped:
        return " (it has none)"
    key, why = next(iter(skipped.items()))
    return f" ({len(skipped)} skipped, the first is {key}: {why})"


def _read_cache_file(stored: Path, name: str, known: Source | None, captions: Captions, seed: int) -> Pairs:
    with reading_cache_file(stored):
        images = _EncodedImages(stored)
        about = json.loads(stored.with_suffix(".json").read_text(encoding="utf-8"))
        images.table.validate(full=True)  # invalid offsets would crash the process
        table = images.table.drop_columns(["image"]).to_pydict()
        if len(table["id"]) != about["rows"]:
            raise ValueError(f"{len(table['id'])} rows, expected {about['rows']}")
        columns = zip(table["id"], table["captions"], table["meta"], strict=True)
        rows = [
            Row(
                key,
                text,
                i,
                meta={**json.loads(meta), "captions": known_texts},
                split_by=next(iter(known_texts), ""),
            )
            for i, (image, known_texts, meta) in enumerate(columns)
            for key, text in chosen_texts(image, known_texts, captions, seed)
        ]
        content, skipped = str(about["content"]), dict(about["skipped"])
    return Pairs(
        rows, images, name=name, content=content, skipped=skipped, has_texts=captions != "none",
        licence=known.licence if known else "see the data set's card",
        attribution=known.attribution if known else name,
    )  # fmt: skip


class _EncodedImages:
    """Encoded images in a memory-mapped Arrow file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._table: Any = None

    @property
    def table(self) -> Any:
        if self._table is None:
            import pyarrow as pa

            self._table = pa.ipc.open_file(pa.memory_map(str(self._path))).read_all()
        return self._table

    def open(self, image_key: int | str) -> Image.Image:
        return open_image(self.table["image"][int(image_key)].as_py())

    def __getstate__(self) -> dict[str, Any]:
        return {"_path": self._path, "_table": None}  # a worker process maps the file itself
