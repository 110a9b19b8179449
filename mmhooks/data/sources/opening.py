"""Opens image-text data sets through ``datasets`` for reading row by row, without decoding images."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from glob import glob
from pathlib import Path
from typing import Any

from PIL import Image

from mmhooks.data.sources.braces import expand_braces
from mmhooks.data.sources.captions import base_column
from mmhooks.data.sources.local_files import DataRoot
from mmhooks.data.sources.tars import KEY, fields_of, labels_of, tar_rows
from mmhooks.errors import DataError, MissingWeights, MMHooksError
from mmhooks.utils.faults import first_line

TEXT_COLUMNS = ("caption", "captions", "text", "txt", "sentences", "answer", "title", "label_text", "prompt")
ID_COLUMNS = ("id", "image_id", KEY, "key", "file_name", "filename")
_SPLIT_FOLDERS = ("train", "val", "valid", "validation", "dev", "test")
IMAGE_COLUMNS = ("image", "jpg", "png", "webp", "jpeg")


@dataclass(frozen=True)
class Source:
    """A known data set of the Hub, with its columns for image, texts and id."""

    path: str
    split: str
    image: str
    text: str
    id: str
    licence: str
    attribution: str


KNOWN: dict[str, Source] = {
    # 5,000 images of COCO 2017 validation; question_id holds file names, the other id columns are constant.
    "coco": Source(
        "lmms-lab/COCO-Caption2017", "val", "image", "answer", "question_id",
        "captions CC BY 4.0; pictures under their Flickr licences", "COCO 2017, cocodataset.org",
    ),
    # The validation images of Conceptual Captions that were still online: 13,443.
    "cc3m": Source(
        "pixparse/cc3m-wds", "validation", "jpg", "txt", KEY,
        "Conceptual Captions licence (any use); pictures belong to their owners", "Conceptual Captions, Google",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class OpenDataset:
    """An opened data set whose rows are not read yet: a ``datasets.IterableDataset`` without decoding.

    Attributes:
        columns: types by name, None if unknown.
        root: the location of the data set.
        text: the column (or part of one) of the texts, where the layout says so.
    """

    rows: Any
    columns: Mapping[str, Any]
    root: DataRoot
    text: str | None = None


@dataclass(frozen=True)
class Columns:
    """The columns of image, texts (None: not read) and id (None: rows are numbered)."""

    image: str
    text: str | None
    id: str | None


def open_rows(path: str, split: str | None, name: str, *, allow_outside: bool = False) -> OpenDataset:
    """Opens a local folder, file or glob, or a data set of the Hub; chooses a split if none is given.

    Raises:
        DataError: no such split; a local source that cannot be read, or that refers to files elsewhere.
        MissingWeights: neither local nor downloadable.
    """
    place = Path(path).expanduser()
    root = replace(_root_of_source(path, place), allow_outside=allow_outside)
    try:
        return _without_decoding(_open_source(path, place, split, name, root), root)
    except MMHooksError:
        raise
    except Exception as fault:  # datasets, huggingface_hub, fsspec, pyarrow and httpx each raise their own
        if root.folder is not None:
            raise DataError(f"{place} cannot be read by datasets: {first_line(fault)}") from fault
        raise MissingWeights(
            f"data set {name!r} ({path}) is not a local folder and cannot be downloaded from the Hugging Face Hub "
            f'({type(fault).__name__}: {first_line(fault)}); without network, pairs("mini") and pairs("folder/") work'
        ) from fault


def _root_of_source(path: str, place: Path) -> DataRoot:
    if place.is_dir():
        return DataRoot(place)
    files = list(files_of(place))
    if not files and _is_pattern(path):
        raise DataError(f"{path}: expected files of this pattern, there are none")
    if files or os.path.lexists(place):  # a dangling link
        files = files or [place]
        return DataRoot(Path(os.path.commonpath([file.absolute().parent for file in files])))
    return DataRoot(address=f"hf://datasets/{path}")


def files_of(place: Path) -> Iterable[Path]:
    """The files of a local source: all files of a folder, a single file, or those of a pattern with ``*``, ``?`` or braces.

    Raises:
        DataError: a file that braces name is not there.
    """
    if place.is_dir():
        return place.rglob("*")
    if place.exists():
        return [place]
    return [Path(file) for pattern in expand_braces(str(place)) for file in _matching(pattern, str(place))]


def _matching(pattern: str, source: str) -> list[str]:
    if _is_pattern(pattern):
        return sorted(glob(pattern, recursive=True))
    if pattern == source:
        return []
    if not os.path.exists(pattern):
        raise DataError(f"{source}: expected a file {pattern}, there is none")
    return [pattern]


def _is_pattern(path: str) -> bool:
    return "://" not in path and any(wild in path for wild in "*?")


def _open_source(path: str, place: Path, split: str | None, name: str, root: DataRoot) -> Any:
    import datasets
    from datasets.packaged_modules.webdataset.webdataset import WebDataset

    if place.is_dir() and ((place / "state.json").exists() or (place / "dataset_dict.json").exists()):
        return _from_disk(place, split, name, root)
    if root.folder is not None and not place.is_dir():
        files = list(map(str, files_of(place)))
        root.check_all(files)
        if place.suffix == ".tar":
            choose_split(["train"], split, name)
            return _from_tars(files)
        format = {".parquet": "parquet", ".arrow": "arrow"}.get(place.suffix)
        if format is None:
            raise DataError(
                f"{place}: expected a folder, or a .parquet, .arrow or .tar file, got {place.suffix!r}"
            )
        builder = datasets.load_dataset_builder(format, data_files=files)
    elif place.is_dir() and (tars := _tars_among_others(place)):
        chosen = tars[choose_split(list(tars), split, name)]
        root.check_all(chosen)
        return _from_tars(chosen)
    else:
        if place.is_dir():
            root.check_all(_named_by_card(root))
        builder = datasets.load_dataset_builder(str(place) if place.is_dir() else path)
        named = builder.config.data_files or {}
        # Images are checked row by row, so that single ones can be skipped.
        root.check_all(
            f for files in named.values() for f in files if Path(f).suffix.lower() not in image_endings()
        )
    named = builder.config.data_files or {}
    if isinstance(builder, WebDataset):
        return _from_tars(list(named[choose_split(list(map(str, named)), split, name)]))
    _validate(
        f for files in named.values() for f in files if root.folder is not None and f.endswith(".arrow")
    )
    found: Any = builder.as_streaming_dataset()
    return found[choose_split([str(s) for s in found], split, name)]


def _tars_among_others(place: Path) -> dict[str, list[str]]:
    """The tars by split of a folder with tables or texts beside them, of which ``datasets`` would read one kind.

    So do img2dataset (a Parquet table a tar) and CLIP-benchmark (``test/0.tar``, ``test/nshards.txt``) write them. A split
    is a folder in which all tars lie.
    """
    tars = sorted(place.rglob("*.tar"))
    others = (path for end in (".parquet", ".txt", ".json") for path in place.rglob(f"*{end}"))
    if not tars or (place / "README.md").exists() or next(others, None) is None:
        return {}
    inside = [tar.relative_to(place).parts for tar in tars]
    in_splits = all(len(parts) == 2 and parts[0] in _SPLIT_FOLDERS for parts in inside)
    found: dict[str, list[str]] = {}
    for tar, parts in zip(tars, inside, strict=True):
        found.setdefault(parts[0] if in_splits else "train", []).append(str(tar))
    return found


def _named_by_card(root: DataRoot) -> Iterator[str]:
    """The files and patterns in the dataset card (README.md) of a folder, which datasets opens while resolving files."""
    from huggingface_hub.repocard import metadata_load

    assert root.folder is not None
    card = root.folder / "README.md"
    if not card.exists():
        return
    left: list[Any] = [(metadata_load(root.inside(card.name)) or {}).get("configs")]
    seen: set[int] = set()  # YAML aliases can expand a few lines to millions of entries
    while left:
        value = left.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, (Mapping, list)) and id(value) not in seen:
            seen.add(id(value))
            left += value.values() if isinstance(value, Mapping) else value


@lru_cache(maxsize=1)
def image_endings() -> frozenset[str]:
    """Extensions of image files that Pillow knows, lower case with the dot."""
    return frozenset(Image.registered_extensions())


def _from_disk(place: Path, split: str | None, name: str, root: DataRoot) -> Any:
    """Opens the output of ``Dataset.save_to_disk``, after checking the files that it lists."""
    import datasets

    listing = place / "dataset_dict.json"
    parts = json.loads(root.read(listing.name))["splits"] if listing.exists() else ["."]
    for part in parts:
        state = json.loads(root.read(f"{part}/state.json"))
        root.check_all(str(Path(part) / file["filename"]) for file in state["_data_files"])
    found: Any = datasets.load_from_disk(str(place))
    if isinstance(found, datasets.DatasetDict):
        found = found[choose_split([str(s) for s in found], split, name)]
    found.data.table.validate(full=True)  # invalid offsets would crash the process
    return found.to_iterable_dataset()


def _validate(files: Iterable[str]) -> None:
    """Validates Arrow files: invalid offsets would crash the process."""
    import pyarrow as pa

    for file in files:
        with pa.memory_map(file) as source:
            try:
                table = pa.ipc.open_stream(source).read_all()
            except pa.ArrowInvalid:
                table = pa.ipc.open_file(source).read_all()
            table.validate(full=True)


def _from_tars(tars: Sequence[str]) -> Any:
    import datasets

    parts = {"tars": list(tars), "labels": labels_of(tars)}
    fields = fields_of(tars)
    # CLIP-benchmark's tars: a text file has one caption a line.
    lines = "txt" in fields and (Path(tars[0]).parent / "nshards.txt").exists()
    rows = datasets.IterableDataset.from_generator(tar_rows, gen_kwargs=parts)
    return rows, fields, "txt.lines" if lines else None


def _without_decoding(found: Any, root: DataRoot) -> OpenDataset:
    if isinstance(found, tuple):
        rows, fields, text = found
        return OpenDataset(rows, dict.fromkeys([KEY, *fields]), root, text)
    features = found.features or found._resolve_features().features
    # datasets would open images in any column with any decoder of Pillow, including Ghostscript.
    return OpenDataset(found.decode(False) if found.features else found, features, root)


def choose_split(splits: Sequence[str], split: str | None, name: str) -> str:
    """The requested split, or by default a validation or test split if there is one.

    Raises:
        DataError: no such split.
    """
    if split is None:
        return next((s for s in ("validation", "val", "test") if s in splits), splits[0])
    if split not in splits:
        raise DataError(f"{name}: expected a split among {', '.join(splits)}, got {split!r}")
    return split


def columns_of(
    opened: OpenDataset,
    known: Source | None,
    image: str | None,
    text: str | None,
    name: str,
    *,
    texts: bool = True,
) -> Columns:
    """The columns of image, texts and id: as given, as known for this data set, or inferred by type and name.

    Args:
        texts: False where images are read alone.

    Raises:
        DataError: no such column.
    """
    import datasets

    columns = opened.columns
    image = image or (known.image if known else None)
    image = image or next((c for c, f in columns.items() if isinstance(f, datasets.Image)), None)
    image = image or next((c for c in IMAGE_COLUMNS if c in columns), None)
    text = text or (known.text if known else opened.text)
    text = text or next((c for c in TEXT_COLUMNS if c in columns), None)
    key = known.id if known else next((c for c in ID_COLUMNS if c in columns), None)
    text = text if texts else None
    named = text is not None and base_column(text, columns) is not None
    fitting = {"image": image in columns, "text": named or not texts}
    missing = [what for what, fits in fitting.items() if not fits]
    if missing or image is None:
        shown = ", ".join(c for c in columns if not c.startswith("__"))
        raise DataError(
            f"{name} has columns {shown}; no {' and no '.join(missing)} column among them: name it "
            "with image_column= or text_column= (or a part of one as column.key)"
            + ('; captions="none" reads the images alone' if missing == ["text"] else "")
        )
    return Columns(image, text, key if key in columns else None)


def id_of(row: Mapping[str, Any], column: str) -> str:
    """A row's id.

    Raises:
        DataError: it has none.
    """
    key = row.get(column)
    if key is None or key != key or str(key) == "":
        raise DataError(f"its id is empty (column {column!r} holds {key!r})")
    return str(key)


def encoded(value: Any, root: DataRoot) -> bytes:
    """The bytes of a row's image file, stored in the row or in a file that it refers to; they are not checked.

    Raises:
        DataError: no image there, or a file that cannot be read.
        MissingWeights: one that cannot be downloaded.
    """
    if isinstance(value, str):
        value = {"path": value}
    if isinstance(value, Mapping):
        data, path = value.get("bytes"), value.get("path")
        if not data and path:
            try:
                data = root.read(str(path))
            except DataError as fault:
                raise DataError(f"its image {str(path)[:200]!r} cannot be read: {fault}") from fault
        value = data
    if not isinstance(value, (bytes, bytearray)):
        raise DataError(f"expected an image in it, got {type(value).__name__}")
    return bytes(value)


def iterate_rows(
    opened: OpenDataset, rows: Iterable[Mapping[str, Any]], name: str
) -> Iterator[Mapping[str, Any]]:
    """Iterates over the rows, turning errors of other libraries into our own.

    Raises:
        DataError: a local file is damaged; the message says after how many rows.
        MissingWeights: the connection failed.
    """
    number = 0
    try:
        for row in rows:
            number += 1
            yield row
    except MMHooksError:
        raise
    except Exception as fault:  # of datasets, pyarrow, fsspec, zipfile, httpx
        said = f"{type(fault).__name__}: {first_line(fault)}"
        if opened.root.folder is not None:
            raise DataError(
                f"{name}: reading failed after {number} rows ({said}); one of its files is damaged"
            ) from fault
        raise MissingWeights(
            f"{name}: the download failed after {number} rows ({said}); call again"
        ) from fault
