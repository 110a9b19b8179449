"""Which of the layouts of local image files a path names; what is none of them is read by ``datasets``."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from mmhooks.data.sources.caption_files import ENDINGS, read_caption_file
from mmhooks.data.sources.folder import folder
from mmhooks.data.sources.image_files import Captioned, Listing
from mmhooks.data.sources.local_files import DataRoot
from mmhooks.data.sources.opening import KNOWN
from mmhooks.data.sources.sidecars import image_files, read_sidecars
from mmhooks.errors import DataError

_OF_DATASETS = ("state.json", "dataset_dict.json")  # of Dataset.save_to_disk
_TRIED = 20  # images of a caption file that are looked for, to find their folder


def local_listing(
    source: str | Path,
    *,
    images: str | Path | None = None,
    image_column: str | None = None,
    text_column: str | None = None,
    texts: bool = True,
    allow_outside: bool = False,
) -> Listing | None:
    """The images that a folder or a file of captions lists; None for what ``datasets`` reads.

    Args:
        images: the folder of a caption file's images, if it is not beside the file, below it, or below the parent of a
            folder ``annotations``.
        texts: False where images are read alone.

    Raises:
        DataError: a listing that cannot be read, or images that are not found.
    """
    place = Path(source).expanduser()
    if place.is_file() and place.suffix.lower() in ENDINGS:
        return _of_caption_file(place, images, image_column, text_column, texts, allow_outside)
    if images is not None:
        raise DataError(
            f"images: expected it with a file of captions ({', '.join(ENDINGS)}), got it with {source}"
        )
    if not place.is_dir() or str(source) in KNOWN:
        return None
    if (place / "metadata.csv").exists():
        return folder(place, allow_outside=allow_outside)
    return _of_folder(place, text_column, texts, allow_outside)


def _of_folder(place: Path, text_column: str | None, texts: bool, allow_outside: bool) -> Listing | None:
    """Image files with or without texts, unless there are tars or tables with the images in them."""
    below = list(place.rglob("*"))  # once: a folder may hold millions of files
    endings, stems = {path.suffix.lower() for path in below}, {path.stem for path in below}
    if (
        any((place / name).exists() for name in _OF_DATASETS)
        or "metadata" in stems
        or endings & {".tar", ".zip"}
    ):
        return None
    files = image_files(place, below)
    if not files:
        return None
    root = DataRoot(place, allow_outside=allow_outside)
    entries, has_texts = read_sidecars(root, files, text_column, texts=texts)
    if not has_texts and endings & {".parquet", ".arrow"}:
        return None  # of a data set whose images lie in tables
    others = [] if has_texts or not texts else _caption_files(place)
    if others:
        raise DataError(
            f"{place}: expected texts beside the images (0.jpg, 0.txt), got none, and {', '.join(others[:4])}: name a file of "
            'captions itself, or read the images alone with captions="none"'
        )
    return Listing(str(place), tuple(entries), root, has_texts)


def _caption_files(place: Path) -> list[str]:
    """Files that may hold captions, by their names."""
    names = [path.name for path in sorted(place.iterdir()) if path.suffix.lower() in ENDINGS]
    return [name for name in names if not re.match(r"(?i)read.?me|licen[cs]e|.*_stats\.json", name)]


# -- caption files -------------------------------------------------------------------------------------------


def _of_caption_file(
    path: Path,
    images: str | Path | None,
    image_column: str | None,
    text_column: str | None,
    texts: bool,
    allow_outside: bool,
) -> Listing:
    entries = read_caption_file(path, image_column=image_column, text_column=text_column, texts=texts)
    links = [entry.image for entry in entries if "://" in entry.image]
    if links and not allow_outside:
        raise DataError(
            f"{path}: expected names of image files, got {len(links)} URLs ({links[0][:80]}); download them first, e.g. with "
            "img2dataset, and give its output folder, or read them from the web each time with allow_outside=True"
        )
    if links:
        return Listing(str(path), tuple(entries), DataRoot(path.parent, allow_outside=True))
    given = None if images is None else Path(images).expanduser()
    if given is not None and not given.is_dir():
        raise DataError(
            f"images: expected the folder of the images of {path}, got {given}, which is not a folder"
        )
    places = list(_places(path)) if given is None else [given]
    root, entries = _found(path, entries, places, allow_outside)
    return Listing(str(path), tuple(entries), DataRoot(root, allow_outside=allow_outside))


def _places(path: Path) -> Iterator[Path]:
    """Where the images of a caption file usually lie: beside it or in a folder there; for COCO's ``annotations/`` in a
    folder beside that."""
    tops = [path.parent, path.parent.parent] if path.parent.name == "annotations" else [path.parent]
    for top in tops:
        yield top
        yield from sorted(inner for inner in top.iterdir() if inner.is_dir())


def _found(
    path: Path, entries: Sequence[Captioned], places: Sequence[Path], allow_outside: bool
) -> tuple[Path, Sequence[Captioned]]:
    """The first place with one of the first images, and the entries by their paths there: as listed, or by file names."""
    tried = [entry for entry in entries if entry.fault is None][:_TRIED]
    for bare in (False, True):
        for place in places:
            root = DataRoot(place, allow_outside=allow_outside)
            if any(_is_there(root, _path(entry, bare)) for entry in tried):
                return place, [replace(entry, image=_path(entry, bare)) for entry in entries]
    if not tried:
        return path.parent, entries
    raise DataError(
        f"{path}: expected its images, such as {tried[0].image!r}, in {', '.join(map(str, places[:6]))}"
        f"{', …' if len(places) > 6 else ''}, got none of them there; name their folder with images="
    )


def _path(entry: Captioned, bare: bool) -> str:
    return Path(entry.image).name if bare else entry.image


def _is_there(root: DataRoot, name: str) -> bool:
    try:
        return root.inside(name).is_file()
    except DataError:
        return False
