"""Pairs of what lies in memory already: a ``datasets.Dataset``, a torch ``Dataset``, or a list of (image, text)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmhooks.data.pair_set import Pairs, Row, check_rows
from mmhooks.data.sources.caption_choice import Captions, chosen_texts
from mmhooks.data.sources.captions import captions_in
from mmhooks.data.sources.images import open_image
from mmhooks.data.sources.local_files import DataRoot, read_regular
from mmhooks.data.sources.opening import Columns, OpenDataset, choose_split, columns_of, encoded, id_of
from mmhooks.data.splits import choose
from mmhooks.errors import DataError
from mmhooks.utils.faults import first_line
from mmhooks.utils.progress import track

_FEW = 500  # up to this many items are read without a progress bar
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
_TUPLE = ("image", "text")


@dataclass(frozen=True)
class _Item:
    """What was read of one item; its image is opened again on access."""

    id: str
    captions: tuple[str, ...]
    content: bytes
    meta: Mapping[str, Any]


def pairs_in_memory(
    source: Any,
    *,
    split: str | None,
    limit: int | None,
    on_error: str,
    seed: int,
    image_column: str | None,
    text_column: str | None,
    meta_columns: Sequence[str],
    captions: Captions,
    allow_outside: bool,
    progress: bool,
) -> Pairs:
    """Pairs of an object in memory. Every item is read once here, so that unusable ones are reported now and the
    fingerprint covers the pixels; images are read from the object again on access.

    Raises:
        DataError: an object of another kind, or without the columns; an item that cannot be used.
    """
    source, split = _one_split(source, split)
    images = _Images(source, allow_outside)
    columns = images.columns_for(image_column, text_column, texts=captions != "none")
    images.columns = columns
    places = range(len(source)) if limit is None else choose(len(source), limit, seed)
    name = type(source).__name__
    found: dict[int, _Item] = {}
    skipped: dict[str, str] = {}
    show = progress and len(places) > _FEW
    for place in track(places, len(places), f"reading {name}", show=show):
        try:
            found[place] = images.read(place, meta_columns)
        except DataError as fault:
            if on_error != "skip":
                raise DataError(
                    f'{name}, item {place}: {fault}; on_error="skip" leaves such items out'
                ) from fault
            skipped[f"item {place}"] = str(fault)
    if on_error == "skip":
        found = dict(_without_repeats(found, skipped))
    check_rows([Row(item.id, "", place) for place, item in found.items()], name, has_texts=False)
    images.content = {place: item.content for place, item in found.items()}
    digest = blake2b(digest_size=10)
    for content in images.content.values():
        digest.update(content)
    rows = [
        Row(key, text, place, meta=item.meta, split_by=next(iter(item.captions), ""))
        for place, item in found.items()
        for key, text in chosen_texts(item.id, item.captions, captions, seed)
    ]
    info = getattr(source, "info", None)
    pairs = Pairs(
        rows, images, name=name, content=digest.hexdigest(), skipped=skipped, has_texts=captions != "none",
        licence=str(getattr(info, "license", "") or "not stated"),
    )  # fmt: skip
    return pairs if split is None else pairs.split(split)


def _one_split(source: Any, split: str | None) -> tuple[Any, str | None]:
    """The data set of one split, and the split that is still to be chosen by a hash of the texts.

    Raises:
        DataError: what is neither a data set with a length nor a sequence.
    """
    import datasets

    if isinstance(source, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        source, split = source[choose_split([str(s) for s in source], split, type(source).__name__)], None
    if (
        not hasattr(source, "__getitem__")
        or not hasattr(source, "__len__")
        or isinstance(source, (Mapping, bytes))
    ):
        raise DataError(
            "expected a path or name, a datasets.Dataset, a torch Dataset with a length, or a list of (image, text), got "
            f"{type(source).__name__}"
        )
    if len(source) == 0:
        raise DataError(f"expected at least one pair, got a {type(source).__name__} of none")
    return source, split


def _without_repeats(items: Mapping[int, _Item], skipped: dict[str, str]) -> Iterator[tuple[int, _Item]]:
    seen: set[str] = set()
    for place, item in items.items():
        if item.id in seen:
            skipped[f"item {place} (id {item.id})"] = "its id is a duplicate"
        else:
            seen.add(item.id)
            yield place, item


class _Images:
    """The items of an object in memory, as records of columns."""

    columns: Columns

    def __init__(self, source: Any, allow_outside: bool) -> None:
        import datasets

        self.content: dict[int, bytes] = {}
        self._features: Mapping[str, Any] | None = None
        self._root = DataRoot(Path(), allow_outside=allow_outside)
        if isinstance(source, datasets.Dataset):
            # datasets would open images with any decoder of Pillow, and in every column.
            source = _not_decoded(source.with_format(None))
            self._features = source.features
        self._source = source

    def columns_for(self, image: str | None, text: str | None, *, texts: bool) -> Columns:
        """The columns of image, texts and id; of tuples "image" and "text"."""
        name, columns = type(self._source).__name__, self._features
        if columns is None:
            columns = dict.fromkeys(self._record(0))
        return columns_of(OpenDataset(None, columns, self._root), None, image, text, name, texts=texts)

    def _record(self, place: int) -> Mapping[str, Any]:
        try:
            item = self._source[place]
        except Exception as fault:  # whatever the caller's data set raises
            raise DataError(
                f"reading item {place} failed ({type(fault).__name__}: {first_line(fault)})"
            ) from fault
        if isinstance(item, Mapping):
            return item
        if isinstance(item, (tuple, list)) and len(item) == 2:
            return dict(zip(_TUPLE, item, strict=True))
        found = (
            f"{type(item).__name__} of {len(item)}"
            if isinstance(item, (tuple, list))
            else type(item).__name__
        )
        raise DataError(
            f"expected items of (image, text), or records with columns for both, got a {found} as item {place}"
        )

    def read(self, place: int, meta_columns: Sequence[str]) -> _Item:
        """Reads an item whole.

        Raises:
            DataError: its image or text cannot be used.
        """
        record, columns = self._record(place), self.columns
        key = id_of(record, columns.id) if columns.id is not None else f"{place:09d}"
        captions = captions_in(record, columns.text) if columns.text is not None else []
        missing = [column for column in meta_columns if column not in record]
        if missing:
            raise DataError(f"expected columns {', '.join(missing)}, got {', '.join(map(str, record))}")
        meta = {column: self._word(column, record[column]) for column in meta_columns}
        content = _pixels_digest(self._image(record))
        return _Item(key, tuple(captions), content, {**meta, "captions": captions})

    def _word(self, column: str, value: Any) -> str:
        """A value as text, a class by its name."""
        name_of = getattr((self._features or {}).get(column), "int2str", None)
        return str(name_of(value)) if name_of and isinstance(value, int) and value >= 0 else str(value)

    def _image(self, record: Mapping[str, Any]) -> Image.Image:
        value = record.get(self.columns.image)
        if self._features is None and isinstance(value, (str, Path)):
            return open_image(read_regular(Path(value).expanduser()))  # the caller named the file
        if isinstance(value, Mapping) and not value.get("bytes") and not self._root.allow_outside:
            raise DataError(
                f"its image is in a file ({str(value.get('path'))[:200]}); allow_outside=True reads files that a Dataset names"
            )
        if isinstance(value, (bytes, bytearray, str, Mapping)):
            return open_image(encoded(value, self._root))
        return as_image(value)

    def open(self, image_key: int | str) -> Image.Image:
        place = int(image_key)
        image = self._image(self._record(place))
        if _pixels_digest(image) != self.content[place]:
            raise DataError(
                "its pixels differ from those read first; random augmentation belongs into preprocess"
            )
        return image


def _not_decoded(source: Any) -> Any:
    import datasets

    for column, feature in source.features.items():
        if isinstance(feature, datasets.Image):
            source = source.cast_column(column, datasets.Image(decode=False))
    return source


def as_image(value: Any) -> Image.Image:
    """A Pillow image of an image in memory: Pillow's own, or 8-bit samples ``[h w]``, ``[h w c]`` (an array) or
    ``[c h w]`` (a tensor).

    Raises:
        DataError: anything else; normalised pixels say where they belong.

    >>> as_image(np.zeros((4, 6, 3), dtype=np.uint8)).size
    (6, 4)
    """
    if isinstance(value, Image.Image):
        if value.mode not in _MODES:
            raise DataError(
                f"expected an image of 8 bits per channel, got mode {value.mode!r}; scale its samples to 8 bits"
            )
        return value
    if isinstance(value, Tensor):
        if value.dtype != torch.uint8:
            raise DataError(
                f"expected an image (Pillow's, a file, or uint8 samples), got a tensor of {value.dtype}; "
                "mm.data.from_tensors takes pixels that are preprocessed already"
            )
        value = (value.permute(1, 2, 0) if value.dim() == 3 else value).cpu().numpy()
    if not isinstance(value, np.ndarray) or value.dtype != np.uint8:
        kind = f"an array of {value.dtype}" if isinstance(value, np.ndarray) else f"a {type(value).__name__}"
        raise DataError(f"expected an image (Pillow's, a file, or uint8 samples), got {kind}")
    if value.ndim == 3 and value.shape[2] == 1:
        value = value[:, :, 0]
    if value.ndim not in (2, 3) or (value.ndim == 3 and value.shape[2] not in (3, 4)) or 0 in value.shape:
        raise DataError(f"expected samples of shape [h w] or [h w 3], got {list(value.shape)}")
    return Image.fromarray(np.ascontiguousarray(value))


def _pixels_digest(image: Image.Image) -> bytes:
    try:
        pixels = image.convert("RGBA").tobytes()
    except (OSError, ValueError) as fault:  # a file that Pillow opened and is damaged or gone
        raise DataError(f"its image cannot be read: {fault}") from fault
    digest = blake2b(f"{image.size}".encode(), digest_size=10)
    digest.update(pixels)
    return digest.digest()
