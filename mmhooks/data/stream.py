"""Image-text data sets through ``datasets``: streamed once into one Arrow file of the user's cache."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from glob import glob
from hashlib import blake2b
from pathlib import Path
from typing import Any

from PIL import Image

from mmhooks.data.cache import cache_dir
from mmhooks.data.pair_set import Pairs, Row
from mmhooks.data.progress import track
from mmhooks.errors import DataError, MissingWeights
from mmhooks.utils.files import written_aside

TEXT_COLUMNS = ("caption", "captions", "text", "txt", "sentences", "answer", "title", "label_text", "prompt")
ID_COLUMNS = ("id", "image_id", "__key__", "key", "file_name", "filename")
BATCH = 64


@dataclass(frozen=True)
class Source:
    """A data set of the Hub, and which of its columns are the picture, the texts and the id."""

    path: str
    split: str
    image: str
    text: str
    id: str
    licence: str
    attribution: str


KNOWN: dict[str, Source] = {
    # 5,000 pictures of COCO 2017 validation; file names stand in question_id, the other id columns are constant.
    "coco": Source(
        "lmms-lab/COCO-Caption2017", "val", "image", "answer", "question_id",
        "captions CC BY 4.0; pictures under their Flickr licences", "COCO 2017, cocodataset.org",
    ),
    # The validation pictures of Conceptual Captions that were still online: 13,443.
    "cc3m": Source(
        "pixparse/cc3m-wds", "validation", "jpg", "txt", "__key__",
        "Conceptual Captions licence (any use); pictures belong to their owners", "Conceptual Captions, Google",
    ),
}  # fmt: skip


def stream(
    name: str,
    *,
    split: str | None,
    limit: int | None,
    on_error: str,
    image_column: str | None = None,
    text_column: str | None = None,
    meta_columns: Sequence[str] = (),
    progress: bool = True,
) -> Pairs:
    """Pairs of a data set: fetched picture by picture (encoded, not decoded), kept, and read back memory-mapped."""
    known = KNOWN.get(name)
    path, wanted = (known.path, split or known.split) if known else (name, split)
    request = [path, wanted, limit, on_error, image_column, text_column, _state_of(Path(path).expanduser())]
    request += [list(meta_columns)] if meta_columns else []
    key = blake2b(json.dumps(request).encode(), digest_size=10).hexdigest()
    stored = cache_dir("pairs") / f"{''.join(c if c.isalnum() else '_' for c in name)[-40:]}-{key}.arrow"
    if not stored.exists():
        rows = _open(path, wanted, name)
        columns = _columns(rows, known, image_column, text_column, name)
        _keep(stored, rows, columns, _describer(rows, meta_columns, name), name, limit, on_error, progress)
    return _read(stored, name, known)


def _state_of(place: Path) -> list[Any]:
    """Of a local copy: sizes and times of its files, so that a changed one is read again."""
    files = sorted(p for p in _files(place) if p.is_file())
    return [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in files]


def _files(place: Path) -> Iterable[Path]:
    if place.is_dir():
        return place.rglob("*")
    if place.exists():
        return [place]
    return map(Path, glob(str(place))) if "*" in place.name else []


def _open(path: str, split: str | None, name: str) -> Any:
    """The rows of a data set, not yet fetched; its splits are asked for where none is named."""
    import datasets

    place = Path(path).expanduser()
    try:
        if place.is_dir() and ((place / "state.json").exists() or (place / "dataset_dict.json").exists()):
            found = datasets.load_from_disk(str(place))
            found = (
                found[_choose([str(s) for s in found], split, name)]
                if isinstance(found, datasets.DatasetDict)
                else found
            )
            return found.to_iterable_dataset()
        files = sorted(map(str, _files(place))) if not place.is_dir() else []
        if files:
            builder = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}.get(place.suffix)
            if builder is None:
                raise DataError(f"{place}: a folder, or a .parquet, .arrow or .tar file was expected")
            found = datasets.load_dataset(builder, data_files=files, streaming=True)
        else:
            found = datasets.load_dataset(str(place) if place.is_dir() else path, streaming=True)
        return found[_choose([str(s) for s in found], split, name)]
    except DataError:
        raise
    except Exception as fault:  # datasets, huggingface_hub, fsspec and httpx each raise their own
        if place.exists():
            raise DataError(f"{place} cannot be read by datasets: {_first_line(fault)}") from fault
        raise MissingWeights(
            f"data set {name!r} ({path}) is neither a folder here nor to be fetched from the Hugging Face Hub "
            f'({type(fault).__name__}: {_first_line(fault)}); without network, pairs("mini") and pairs("folder/") work'
        ) from fault


def _choose(splits: Sequence[str], split: str | None, name: str) -> str:
    if split is None:
        return next((s for s in ("validation", "val", "test") if s in splits), splits[0])
    if split not in splits:
        raise DataError(f"{name} has no split {split!r}; it has {', '.join(splits)}")
    return split


def _columns(
    rows: Any, known: Source | None, image: str | None, text: str | None, name: str
) -> dict[str, str | None]:
    """Which columns hold the picture, the texts and the id: as told, as known, or by type and name."""
    import datasets

    features = rows.features or rows._resolve_features().features
    if image is None and known is not None:
        image = known.image
    if image is None:
        image = next((c for c, f in features.items() if isinstance(f, datasets.Image)), None)
        image = image or next((c for c in ("image", "jpg", "png", "webp") if c in features), None)
    text = text or (known.text if known else None) or next((c for c in TEXT_COLUMNS if c in features), None)
    key = known.id if known else next((c for c in ID_COLUMNS if c in features), None)
    missing = [what for what, c in (("image", image), ("text", text)) if c is None or c not in features]
    if missing:
        raise DataError(
            f"{name} has columns {', '.join(features)}; no {' and no '.join(missing)} column among them: name it "
            "with image_column= or text_column="
        )
    return {"image": image, "text": text, "id": key if key in features else None}


def _describer(rows: Any, wanted: Sequence[str], name: str) -> Callable[[Mapping[str, Any]], str]:
    """A row's wanted columns as one JSON text; classes by their names."""
    features = (rows.features or rows._resolve_features().features) if wanted else {}
    missing = [c for c in wanted if c not in features]
    if missing:
        raise DataError(f"{name} has columns {', '.join(features)}; no column {', '.join(missing)} to keep")

    def word(column: str, value: Any) -> str:
        name_of = getattr(features[column], "int2str", None)
        return str(name_of(value)) if name_of and isinstance(value, int) and value >= 0 else str(value)

    return lambda row: json.dumps({c: word(c, row[c]) for c in wanted})


def _keep(
    stored: Path,
    rows: Any,
    columns: Mapping[str, str | None],
    describe: Callable[[Mapping[str, Any]], str],
    name: str,
    limit: int | None,
    on_error: str,
    progress: bool,
) -> None:
    """Writes id, texts and encoded pictures of every usable row; only a whole file gets the name."""
    import datasets
    import pyarrow as pa

    image = str(columns["image"])
    if isinstance((rows.features or {}).get(image), datasets.Image):
        rows = rows.cast_column(image, datasets.Image(decode=False))
    skipped: dict[str, str] = {}
    digest, seen = blake2b(digest_size=10), set()
    schema = pa.schema(
        [
            ("id", pa.string()),
            ("captions", pa.list_(pa.string())),
            ("image", pa.large_binary()),
            ("meta", pa.string()),
        ]
    )
    usable = itertools.islice(
        _usable(_fetched(rows, name), columns, describe, name, on_error, skipped, seen), limit
    )
    with written_aside(stored) as aside:
        with pa.OSFile(str(aside), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            batch: list[dict[str, Any]] = []
            for row in track(usable, limit, f"fetching {name} (once)", show=progress):
                digest.update(f"\0{row['id']}\0".encode() + row["image"])
                batch.append(row)
                if len(batch) == BATCH:
                    writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))
                    batch = []
            if batch:
                writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))
        if not seen:
            raise DataError(f"{name}: none of its rows can be used ({len(skipped)} skipped)")
        about = {"content": digest.hexdigest(), "skipped": skipped}
        with written_aside(stored.with_suffix(".json")) as beside:
            beside.write_text(json.dumps(about))


def _fetched(rows: Iterable[Mapping[str, Any]], name: str) -> Iterator[Mapping[str, Any]]:
    try:
        yield from rows
    except (OSError, ValueError) as fault:
        raise MissingWeights(
            f"{name}: fetching broke off ({type(fault).__name__}: {_first_line(fault)}); nothing was kept, try again"
        ) from fault


def _usable(
    rows: Iterable[Mapping[str, Any]],
    columns: Mapping[str, str | None],
    describe: Callable[[Mapping[str, Any]], str],
    name: str,
    on_error: str,
    skipped: dict[str, str],
    seen: set[str],
) -> Iterator[dict[str, Any]]:
    for number, row in enumerate(rows):
        key = str(row[columns["id"]]) if columns["id"] else f"{number:09d}"
        captions = _texts(row[str(columns["text"])])
        data, fault = _encoded(row[str(columns["image"])])
        if key in seen:
            fault = "its id occurs before"
        elif not captions:
            fault = "its text is empty"
        if fault is None:
            seen.add(key)
            yield {"id": key, "captions": captions, "image": data, "meta": describe(row)}
        elif on_error == "skip":
            skipped[f"row {number} ({key})"] = fault
        else:
            raise DataError(f'{name}, row {number} ({key}): {fault}; on_error="skip" leaves such rows out')


def _texts(value: Any) -> list[str]:
    """One caption or several, as strings or as records with a caption in them."""
    if isinstance(value, Mapping):
        value = next((value[c] for c in ("raw", "caption", "text") if c in value), "")
    values = value if isinstance(value, (list, tuple)) else [value]
    texts = [_texts(v)[0] if isinstance(v, Mapping) and _texts(v) else v for v in values]
    return [t.strip() for t in texts if isinstance(t, str) and t.strip()]


def _encoded(value: Any) -> tuple[bytes, str | None]:
    """The picture's file bytes, and why it is none."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or (Path(value["path"]).read_bytes() if value.get("path") else None)
    if isinstance(value, Image.Image):
        buffer = io.BytesIO()
        value.save(buffer, "PNG")
        return buffer.getvalue(), None
    if not isinstance(value, (bytes, bytearray)):
        return b"", f"no picture in it, came {type(value).__name__}"
    try:
        image = Image.open(io.BytesIO(value))
        image.draft("RGB", (1, 1))
        image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as fault:
        return b"", f"its picture cannot be read: {_first_line(fault)}"
    return bytes(value), None


def _read(stored: Path, name: str, known: Source | None) -> Pairs:
    pictures = _Encoded(stored)
    about = json.loads(stored.with_suffix(".json").read_text())
    table = pictures.table.drop_columns(["image"]).to_pydict()
    kept = table.get("meta") or ["{}"] * len(table["id"])  # files of earlier versions have none
    # The first caption is the text; the others stay in meta.
    rows = [
        Row(key, captions[0], i, meta={**json.loads(meta), "captions": captions})
        for i, (key, captions, meta) in enumerate(zip(table["id"], table["captions"], kept, strict=True))
    ]
    return Pairs(
        rows, pictures, name=name, content=about["content"], skipped=about["skipped"],
        licence=known.licence if known else "see the data set's card",
        attribution=known.attribution if known else name,
    )  # fmt: skip


class _Encoded:
    """Encoded pictures of a memory-mapped Arrow file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._table: Any = None

    @property
    def table(self) -> Any:
        if self._table is None:
            import pyarrow as pa

            self._table = pa.ipc.open_file(pa.memory_map(str(self._path))).read_all()
        return self._table

    def open(self, picture: int | str) -> Image.Image:
        return Image.open(io.BytesIO(self.table["image"][int(picture)].as_py()))

    def __getstate__(self) -> dict[str, Any]:
        return {"_path": self._path, "_table": None}  # a worker process maps it for itself


def _first_line(fault: BaseException) -> str:
    return (str(fault).strip().splitlines() or [type(fault).__name__])[0][:200]
