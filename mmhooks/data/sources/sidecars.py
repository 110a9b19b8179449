"""Folders of image files, each with its caption in a text file beside it, or without texts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from mmhooks.data.sources.captions import captions_in
from mmhooks.data.sources.image_files import Captioned
from mmhooks.data.sources.local_files import DataRoot
from mmhooks.data.sources.opening import image_endings
from mmhooks.errors import DataError

CAPTION_ENDINGS = (".txt", ".json")


def image_files(place: Path, below: Iterable[Path]) -> list[Path]:
    """The image files among those below a folder, by name; hidden ones are left out."""
    endings = image_endings()
    found = (path for path in below if path.suffix.lower() in endings)
    return sorted(
        path for path in found if not any(part.startswith(".") for part in path.relative_to(place).parts)
    )


def read_sidecars(
    root: DataRoot, files: Sequence[Path], text_column: str | None, *, texts: bool = True
) -> tuple[list[Captioned], bool]:
    """The images with the captions beside them, and whether there are captions: ``a/0.jpg`` with ``a/0.txt``.

    If one image has a text file, all need one. Without any, they are images alone; ``meta["folder"]`` has the folder of
    each, which in many data sets is its class.

    Args:
        text_column: "txt" (the default), "txt.lines" (each line a caption), "txt.whole", or a part of the ``.json`` beside
            an image, such as "json.caption" (img2dataset).
        texts: False where images are read alone.

    Raises:
        DataError: ``text_column`` names another file.
    """
    assert root.folder is not None
    field = (text_column or "txt").split(".")[0]
    if f".{field}" not in CAPTION_ENDINGS:
        raise DataError(
            f"{root.folder}: expected a text_column in the files beside the images, txt or json (or a part of one: "
            f"txt.lines, json.caption), got {text_column!r}"
        )
    beside = (file.with_suffix(f".{field}") for file in files)
    has_texts = texts and (text_column is not None or any(file.exists() for file in beside))
    return [_entry(root, file, field, text_column or "txt", has_texts) for file in files], has_texts


def _entry(root: DataRoot, file: Path, field: str, column: str, has_texts: bool) -> Captioned:
    assert root.folder is not None
    name = file.relative_to(root.folder).as_posix()
    inside = file.relative_to(root.folder).parent.as_posix()
    meta = {"folder": inside} if inside != "." else {}
    if not has_texts:
        return Captioned(name, name, meta=meta, place=name)
    beside = Path(name).with_suffix(f".{field}").as_posix()
    try:
        captions = captions_in({field: root.read(beside)}, column)
    except DataError as fault:
        return Captioned(name, name, place=name, fault=f"its {beside}: {fault}")
    return Captioned(name, name, tuple(captions), meta={**meta, "captions": captions}, place=name)
