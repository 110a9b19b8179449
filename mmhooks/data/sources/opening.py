"""Opens image-text data sets through ``datasets``, to be read row by row; nothing is decoded by it."""

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

from mmhooks.data.sources.captions import root_of
from mmhooks.data.sources.local_files import Home
from mmhooks.data.sources.tars import KEY, fields_of, labels_of, tar_rows
from mmhooks.errors import DataError, MissingWeights, MMHooksError
from mmhooks.utils.faults import first_line

TEXT_COLUMNS = ("caption", "captions", "text", "txt", "sentences", "answer", "title", "label_text", "prompt")
ID_COLUMNS = ("id", "image_id", KEY, "key", "file_name", "filename")
IMAGE_COLUMNS = ("image", "jpg", "png", "webp", "jpeg")


@dataclass(frozen=True)
class Source:
    """A data set of the Hub, and which of its columns are the image, the texts and the id."""

    path: str
    split: str
    image: str
    text: str
    id: str
    licence: str
    attribution: str


KNOWN: dict[str, Source] = {
    # 5,000 images of COCO 2017 validation; file names stand in question_id, the other id columns are constant.
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
class Opened:
    """Rows of a data set, not yet read: a ``datasets.IterableDataset`` that decodes nothing.

    Attributes:
        columns: by name, their types where they are known.
        home: where the data set lies.
    """

    rows: Any
    columns: Mapping[str, Any]
    home: Home


@dataclass(frozen=True)
class Columns:
    """Which columns hold the image, the texts and the id (None: rows are numbered)."""

    image: str
    text: str
    id: str | None


def open_rows(path: str, split: str | None, name: str, *, allow_outside: bool = False) -> Opened:
    """Opens a local folder, file or glob, or a data set of the Hub; a split is chosen where none is named.

    Raises:
        DataError: no such split; a local source that cannot be read, or that names files elsewhere.
        MissingWeights: not here and not to be fetched.
    """
    place = Path(path).expanduser()
    home = replace(_home_of(path, place), allow_outside=allow_outside)
    try:
        return _without_decoding(_opened(path, place, split, name, home), home)
    except MMHooksError:
        raise
    except Exception as fault:  # datasets, huggingface_hub, fsspec, pyarrow and httpx each raise their own
        if home.folder is not None:
            raise DataError(f"{place} cannot be read by datasets: {first_line(fault)}") from fault
        raise MissingWeights(
            f"data set {name!r} ({path}) is neither a folder here nor to be fetched from the Hugging Face Hub "
            f'({type(fault).__name__}: {first_line(fault)}); without network, pairs("mini") and pairs("folder/") work'
        ) from fault


def _home_of(path: str, place: Path) -> Home:
    if place.is_dir():
        return Home(place)
    files = list(files_of(place))
    if files or os.path.lexists(place):  # a link that leads nowhere
        files = files or [place]
        return Home(Path(os.path.commonpath([file.absolute().parent for file in files])))
    return Home(address=f"hf://datasets/{path}")


def files_of(place: Path) -> Iterable[Path]:
    """The files of a local source: of a folder all, one, or those that a glob finds."""
    if place.is_dir():
        return place.rglob("*")
    if place.exists():
        return [place]
    return map(Path, sorted(glob(str(place)))) if "*" in place.name else []


def _opened(path: str, place: Path, split: str | None, name: str, home: Home) -> Any:
    import datasets
    from datasets.packaged_modules.webdataset.webdataset import WebDataset

    if place.is_dir() and ((place / "state.json").exists() or (place / "dataset_dict.json").exists()):
        return _saved(place, split, name, home)
    if home.folder is not None and not place.is_dir():
        files = list(map(str, files_of(place)))
        home.check_all(files)
        if place.suffix == ".tar":
            choose_split(["train"], split, name)
            return _of_tars(files)
        format = {".parquet": "parquet", ".arrow": "arrow"}.get(place.suffix)
        if format is None:
            raise DataError(f"{place}: a folder, or a .parquet, .arrow or .tar file was expected")
        builder = datasets.load_dataset_builder(format, data_files=files)
    else:
        if place.is_dir():
            home.check_all(_named_by_card(home))
        builder = datasets.load_dataset_builder(str(place) if place.is_dir() else path)
        named = builder.config.data_files or {}
        # Images are checked row by row, so that one of them can be left out.
        home.check_all(
            f for files in named.values() for f in files if Path(f).suffix.lower() not in image_endings()
        )
    named = builder.config.data_files or {}
    if isinstance(builder, WebDataset):
        return _of_tars(list(named[choose_split(list(map(str, named)), split, name)]))
    _validate(
        f for files in named.values() for f in files if home.folder is not None and f.endswith(".arrow")
    )
    found: Any = builder.as_streaming_dataset()
    return found[choose_split([str(s) for s in found], split, name)]


def _named_by_card(home: Home) -> Iterator[str]:
    """The files and patterns that a folder's README.md names: datasets opens them while it looks for files."""
    from huggingface_hub.repocard import metadata_load

    assert home.folder is not None
    card = home.folder / "README.md"
    if not card.exists():
        return
    left: list[Any] = [(metadata_load(home.inside(card.name)) or {}).get("configs")]
    seen: set[int] = set()  # aliases of YAML make a few lines into millions of entries
    while left:
        value = left.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, (Mapping, list)) and id(value) not in seen:
            seen.add(id(value))
            left += value.values() if isinstance(value, Mapping) else value


@lru_cache(maxsize=1)
def image_endings() -> frozenset[str]:
    """Endings of the files that Pillow reads, with their dots, in small letters."""
    return frozenset(Image.registered_extensions())


def _saved(place: Path, split: str | None, name: str, home: Home) -> Any:
    """Of ``Dataset.save_to_disk``, whose own lists of files are checked first."""
    import datasets

    listing = place / "dataset_dict.json"
    parts = json.loads(home.read(listing.name))["splits"] if listing.exists() else ["."]
    for part in parts:
        state = json.loads(home.read(f"{part}/state.json"))
        home.check_all(str(Path(part) / file["filename"]) for file in state["_data_files"])
    found: Any = datasets.load_from_disk(str(place))
    if isinstance(found, datasets.DatasetDict):
        found = found[choose_split([str(s) for s in found], split, name)]
    found.data.table.validate(full=True)  # offsets that point elsewhere would end the process
    return found.to_iterable_dataset()


def _validate(files: Iterable[str]) -> None:
    """Of Arrow files: offsets that point elsewhere would end the process."""
    import pyarrow as pa

    for file in files:
        with pa.memory_map(file) as source:
            try:
                table = pa.ipc.open_stream(source).read_all()
            except pa.ArrowInvalid:
                table = pa.ipc.open_file(source).read_all()
            table.validate(full=True)


def _of_tars(tars: Sequence[str]) -> Any:
    import datasets

    parts = {"tars": list(tars), "labels": labels_of(tars)}
    return datasets.IterableDataset.from_generator(tar_rows, gen_kwargs=parts), fields_of(tars)


def _without_decoding(found: Any, home: Home) -> Opened:
    if isinstance(found, tuple):
        rows, fields = found
        return Opened(rows, dict.fromkeys([KEY, *fields]), home)
    features = found.features or found._resolve_features().features
    # datasets would open images of any column with any decoder of Pillow's, Ghostscript among them.
    return Opened(found.decode(False) if found.features else found, features, home)


def choose_split(splits: Sequence[str], split: str | None, name: str) -> str:
    """The split that was asked for, or that of validation or testing where there is one.

    Raises:
        DataError: no such split.
    """
    if split is None:
        return next((s for s in ("validation", "val", "test") if s in splits), splits[0])
    if split not in splits:
        raise DataError(f"{name} has no split {split!r}; it has {', '.join(splits)}")
    return split


def columns_of(
    opened: Opened, known: Source | None, image: str | None, text: str | None, name: str
) -> Columns:
    """Which columns hold the image, the texts and the id: as told, as known, or by type and name.

    Raises:
        DataError: no such column.
    """
    import datasets

    columns = opened.columns
    image = image or (known.image if known else None)
    image = image or next((c for c, f in columns.items() if isinstance(f, datasets.Image)), None)
    image = image or next((c for c in IMAGE_COLUMNS if c in columns), None)
    text = text or (known.text if known else None) or next((c for c in TEXT_COLUMNS if c in columns), None)
    key = known.id if known else next((c for c in ID_COLUMNS if c in columns), None)
    fitting = {"image": image in columns, "text": text is not None and root_of(text, columns) is not None}
    missing = [what for what, fits in fitting.items() if not fits]
    if missing or image is None or text is None:
        shown = ", ".join(c for c in columns if not c.startswith("__"))
        raise DataError(
            f"{name} has columns {shown}; no {' and no '.join(missing)} column among them: name it "
            "with image_column= or text_column= (a part of one as column.key)"
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


def encoded(value: Any, home: Home) -> bytes:
    """The file bytes of a row's image: in the row, or named by it. They are not looked at.

    Raises:
        DataError: no image there, or a file that cannot be read.
        MissingWeights: one that cannot be fetched.
    """
    if isinstance(value, str):
        value = {"path": value}
    if isinstance(value, Mapping):
        data, path = value.get("bytes"), value.get("path")
        if not data and path:
            try:
                data = home.read(str(path))
            except DataError as fault:
                raise DataError(f"its picture {str(path)[:200]!r} cannot be read: {fault}") from fault
        value = data
    if not isinstance(value, (bytes, bytearray)):
        raise DataError(f"no picture in it, got {type(value).__name__}")
    return bytes(value)


def read_on(opened: Opened, rows: Iterable[Mapping[str, Any]], name: str) -> Iterator[Mapping[str, Any]]:
    """The rows, with errors of ours where reading breaks off.

    Raises:
        DataError: a local file that is damaged; the message says after how many rows.
        MissingWeights: a connection that broke.
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
        if opened.home.folder is not None:
            raise DataError(
                f"{name}: it cannot be read on after {number} rows ({said}); a file of it is damaged"
            ) from fault
        raise MissingWeights(
            f"{name}: fetching broke off after {number} rows ({said}); call again"
        ) from fault
