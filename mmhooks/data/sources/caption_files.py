"""Files of captions that name image files: COCO's and Karpathy's JSON, and tables such as those of Flickr8k, Flickr30k,
open_clip, CC3M and CC12M."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmhooks.data.sources.captions import base_column, captions_in
from mmhooks.data.sources.image_files import Captioned, grouped
from mmhooks.data.sources.local_files import read_regular
from mmhooks.data.sources.tables import MAX_TABLE, read_table
from mmhooks.errors import DataError

ENDINGS = (".json", ".jsonl", ".csv", ".tsv", ".txt", ".token")
IMAGES = (
    "file_name",
    "filepath",
    "image",
    "image_name",
    "image_path",
    "filename",
    "path",
    "url",
    "image_url",
)
TEXTS = (
    "text",
    "caption",
    "captions",
    "title",
    "comment",
    "raw",
    "sentence",
    "sentences",
    "description",
    "txt",
)
_NUMBERED = re.compile(r"^(.+\.\w+)#\d+$")  # 1000268201_693b08cb0e.jpg#0, of Flickr8k.token.txt
_URL = re.compile(r"^https?://\S+$")
_KEPT_APART = ("split",)


@dataclass(frozen=True)
class _Table:
    """How a table is written, and which of its columns hold image and text."""

    delimiter: str
    image: str
    text: str | None
    quoted: bool = True
    columns: tuple[str, ...] = ()  # of a table without a header


def read_caption_file(
    path: Path, *, image_column: str | None = None, text_column: str | None = None, texts: bool = True
) -> list[Captioned]:
    """The images that a file of captions names, each with all its captions, in order of first appearance.

    Ids are the names of image files, without the folder ``filepath`` of Karpathy's files.

    Args:
        path: ``captions_val2017.json`` (COCO), ``dataset_coco.json`` (Karpathy), a list of records in JSON or JSON lines, or
            a table: comma, tab or ``|`` between fields, by its header; ``Flickr8k.token.txt`` and CC3M's and CC12M's
            tables have none.
        image_column, text_column: of a table or of records, where they have other names than the usual ones.
        texts: False where images are read alone.

    Raises:
        DataError: a file that cannot be read, or in which no image or text is named; says what was found.
    """
    if path.suffix.lower() == ".json":
        return _from_json(path, image_column, text_column, texts)
    if path.suffix.lower() == ".jsonl":
        lines = _text_of(path).splitlines()
        records = [_parsed(line, f"{path}, line {i}") for i, line in enumerate(lines, 1) if line.strip()]
        return _from_records(path, records, image_column, text_column, texts)
    return _from_table(path, image_column, text_column, texts)


# -- JSON ----------------------------------------------------------------------------------------------------


def _text_of(path: Path) -> str:
    try:
        return read_regular(path, MAX_TABLE).decode("utf-8-sig")
    except (DataError, UnicodeDecodeError) as fault:
        raise DataError(f"{path}: expected a file of captions in UTF-8: {fault}") from fault


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as fault:
        raise DataError(f"{where}: expected JSON ({str(fault)[:100]})") from fault


def _from_json(path: Path, image: str | None, text: str | None, texts: bool) -> list[Captioned]:
    found = _parsed(_text_of(path), str(path))
    if isinstance(found, list):
        return _from_records(path, found, image, text, texts)
    images = found.get("images") if isinstance(found, dict) else None
    if isinstance(images, list) and images and all(isinstance(entry, dict) for entry in images):
        if isinstance(found.get("annotations"), list):
            return list(_of_coco(path, images, found["annotations"]))
        if "sentences" in images[0] and "filename" in images[0]:
            return [_of_karpathy(i, entry) for i, entry in enumerate(images)]
    keys = ", ".join(map(str, found)) if isinstance(found, dict) else type(found).__name__
    raise DataError(
        f"{path}: expected COCO's captions (images, annotations), Karpathy's (images with filename and sentences) or a list "
        f"of records, got {keys or 'an empty record'}{_keys_of(images)}"
    )


def _keys_of(images: Any) -> str:
    first = images[0] if isinstance(images, list) and images else None
    return f"; its images have {', '.join(map(str, first))}" if isinstance(first, dict) else ""


def _of_coco(path: Path, images: Sequence[dict], annotations: Sequence[Any]) -> Iterator[Captioned]:
    first = annotations[0] if annotations and isinstance(annotations[0], dict) else {}
    lacking = [key for key in ("image_id", "caption") if key not in first]
    lacking += [key for key in ("id", "file_name") if key not in images[0]]
    if lacking:
        raise DataError(
            f"{path}: expected COCO's captions, such as captions_val2017.json, got annotations with "
            f"{', '.join(map(str, first)) or 'nothing'} and images with {', '.join(map(str, images[0]))}; missing "
            f"{' and '.join(lacking)}"
        )
    captions: dict[Any, list[str]] = {entry.get("id"): [] for entry in images}
    for i, annotation in enumerate(annotations):
        number, caption = annotation.get("image_id"), str(annotation.get("caption") or "").strip()
        if number not in captions:
            yield Captioned("", "", place=f"annotation {i}", fault=f"there is no image {number!r}")
        elif caption:
            captions[number].append(caption)
    for i, entry in enumerate(images):
        name, texts = str(entry.get("file_name") or ""), captions[entry.get("id")]
        fault = None if name else "it has no file_name"
        yield Captioned(
            name, name, tuple(texts), meta={"image_id": entry.get("id"), "captions": texts}, place=f"image {i}", fault=fault
        )  # fmt: skip


def _of_karpathy(i: int, entry: dict) -> Captioned:
    """One of ``images`` of dataset_coco.json, dataset_flickr8k.json or dataset_flickr30k.json."""
    sentences = entry.get("sentences") or []
    texts = [str(s.get("raw") or "").strip() for s in sentences if isinstance(s, dict)]
    texts, name = [text for text in texts if text], str(entry.get("filename") or "")
    meta = {key: entry[key] for key in ("cocoid", "imgid") if key in entry}
    image = f"{entry['filepath']}/{name}" if entry.get("filepath") else name
    fault = None if name else "it has no filename"
    split = str(entry.get("split") or "")
    return Captioned(name, image, tuple(texts), split, {**meta, "captions": texts}, f"image {i}", fault)


def _from_records(
    path: Path, records: Sequence[Any], image: str | None, text: str | None, texts: bool
) -> list[Captioned]:
    first = next((record for record in records if isinstance(record, dict)), {})
    image = image or next((name for name in IMAGES if name in first), None)
    text = text or next((name for name in TEXTS if name in first), None)
    found = image is not None and image in first
    if not found or (texts and (text is None or base_column(text, first) is None)):
        raise _no_columns(path, first)
    return grouped(
        _of_record(f"record {i}", record, str(image), text if texts else None)
        for i, record in enumerate(records)
    )


def _of_record(place: str, record: Any, image: str, text: str | None) -> Captioned:
    name = str(record.get(image) or "").strip() if isinstance(record, dict) else ""
    if not name:
        return Captioned("", "", place=place, fault=f"it has no {image}")
    try:
        texts = captions_in(record, text) if text is not None else []
    except DataError as fault:
        return Captioned(name, name, place=place, fault=str(fault))
    return _entry(place, name, texts, record, {image, text})


# -- tables --------------------------------------------------------------------------------------------------


def _from_table(path: Path, image: str | None, text: str | None, texts: bool) -> list[Captioned]:
    table = _table_of(path, image, text, texts)
    required = [column for column in (table.image, table.text) if column is not None]
    lines = read_table(path, required, delimiter=table.delimiter, quoted=table.quoted, columns=table.columns)
    found = []
    for line in lines:
        place, fault = f"line {line.number}", line.fault
        name = line.entry.get(table.image, "").strip()
        if fault is None and not name:
            fault = f"{table.image} is empty"
        if fault is not None:
            found.append(Captioned("", "", place=place, fault=fault))
            continue
        numbered = _NUMBERED.match(name)
        captions = _texts_of(line.entry[table.text]) if table.text is not None else []
        name = numbered[1] if numbered else name
        found.append(_entry(place, name, captions, line.entry, {table.image, table.text}))
    return grouped(found)


def _entry(
    place: str, name: str, texts: Sequence[str], record: Mapping[str, Any], read: Iterable[str | None]
) -> Captioned:
    meta = {key: value for key, value in record.items() if key not in {*read, *_KEPT_APART}}
    split = str(record.get("split") or "")
    return Captioned(name, name, tuple(texts), split, {**meta, "captions": list(texts)}, place)


def _texts_of(field: str) -> list[str]:
    """The captions in a field: one, or a list of them in JSON, as in Flickr30k's table on the Hub."""
    if field.startswith('["'):
        try:
            return [text.strip() for text in json.loads(field) if text.strip()]
        except (ValueError, AttributeError):
            pass
    return [field.strip()]


def _table_of(path: Path, image: str | None, text: str | None, texts: bool) -> _Table:
    """Delimiter and columns of a table, by its first line."""
    head = _first_line(path)
    fields = head.split("\t")
    if image is None and text is None and len(fields) == 2:
        links = [bool(_URL.match(field.strip())) for field in fields]
        if any(links):  # CC3M: caption, URL; CC12M: URL, caption
            columns = ("url", "caption") if links[0] else ("caption", "url")
            return _Table("\t", "url", "caption", quoted=False, columns=columns)
        if _NUMBERED.match(fields[0]):
            return _Table("\t", "image", "caption", quoted=False, columns=("image", "caption"))
    names: list[str] = []
    for delimiter in ("\t", "|", ","):
        header = [name.strip().strip('"') for name in head.split(delimiter)]
        names = header if len(header) > len(names) else names
        named = image or next((name for name in IMAGES if name in header), None)
        texted = text or next((name for name in TEXTS if name in header), None)
        if named in header and (texted in header or not texts):
            return _Table(delimiter, str(named), texted if texts else None, quoted=delimiter != "|")
    raise _no_columns(path, names)


def _first_line(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.readline(2**16).decode("utf-8-sig", errors="replace").rstrip("\r\n")
    except OSError as fault:
        raise DataError(f"{path}: expected a table of captions: {fault.strerror}") from fault


def _no_columns(path: Path, columns: Iterable[Any]) -> DataError:
    return DataError(
        f"{path}: expected a column of images ({', '.join(IMAGES)}) and one of texts ({', '.join(TEXTS)}), got "
        f"{', '.join(map(str, columns)) or 'none'}; name them with image_column= and text_column="
    )
