"""Image-text pairs as a map-style data set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import blake2b
from typing import Any, Protocol, overload, runtime_checkable

from PIL import Image

from mmhooks.data.sources.images import rgb
from mmhooks.data.splits import SPLITS, split_of
from mmhooks.errors import DataError
from mmhooks.utils.indexing import as_place, as_places, one_place


@dataclass(frozen=True)
class Row:
    """Everything about a pair but its pixels, which its source opens by ``image_key``, a number or a path.

    Rows of one ``image_key`` show one image. ``split_by``: what a split is hashed from, if it is not the text: the first
    caption of the image, so that all its captions are in one split.
    """

    id: str
    text: str
    image_key: int | str
    split: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)
    split_by: str = ""


@dataclass(frozen=True)
class Pair:
    """One image (RGB) with its text. ``meta`` holds further data of the source: keywords, other captions."""

    id: str
    image: Image.Image
    text: str
    meta: Mapping[str, Any] = field(default_factory=dict)


@runtime_checkable
class ImageSource(Protocol):
    """Opens the image of a row, with its transparency if it has one."""

    def open(self, image_key: int | str) -> Image.Image: ...


class Pairs(Sequence[Any]):  # not of Pair: type checks at run time must not open an image
    """A fixed list of pairs; images are decoded on access.

    Attributes:
        name: the source, as passed to :func:`mmhooks.data.pairs`.
        ids: of all pairs, in order.
        has_texts: whether pairs have texts; images alone (``captions="none"``) have none.
        licence, attribution: of the images and texts; shown in reports.
        fingerprint: a short hash of ids, texts and pixels.
        skipped: file or row of every pair that was left out, and why (``on_error="skip"``).

    Raises:
        DataError: (on construction) a duplicate id, an empty text, or no pair at all.

    >>> animals = pairs("mini").split("train")                       # doctest: +SKIP
    >>> animals[0].image.size, animals[0].text                       # doctest: +SKIP
    ((64, 64), 'keycap: #')
    """

    def __init__(
        self,
        rows: Iterable[Row],
        images: ImageSource,
        *,
        name: str,
        content: str,
        licence: str = "",
        attribution: str = "",
        skipped: Mapping[str, str] | None = None,
        has_texts: bool = True,
    ) -> None:
        self.has_texts = has_texts
        self._rows = tuple(rows)
        self._images = images
        self._content = content
        self.name, self.licence, self.attribution = name, licence, attribution
        self.skipped: Mapping[str, str] = dict(skipped or {})
        if not self._rows:
            raise DataError(
                f"{name}: expected at least one usable pair, got none ({len(self.skipped)} skipped)"
            )
        check_rows(self._rows, name, has_texts=has_texts)
        self.ids: list[str] = [row.id for row in self._rows]
        self.fingerprint: str = _fingerprint(content, self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Pair: ...
    @overload
    def __getitem__(self, index: slice) -> Pairs: ...
    def __getitem__(self, index: Any) -> Pair | Pairs:
        """One pair, or :meth:`select` of a slice, of indices or of a mask."""
        place = None if isinstance(index, slice) else as_place(index, len(self), "pairs")
        if place is None:
            return self.select(index)
        row = self._rows[place]
        return Pair(row.id, self.image(place), row.text, row.meta)

    def __iter__(self) -> Iterator[Pair]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        return f"Pairs({self.name!r}, {len(self)} pairs, {self.fingerprint})"

    def image(self, index: Any) -> Image.Image:
        """The image in RGB, on white where it is transparent."""
        return rgb(self._open(index))

    def rgba(self, index: Any) -> Image.Image:
        """The image with its transparency, to paste it on another background."""
        return self._open(index).convert("RGBA")

    def images(self) -> Sequence[Image.Image]:
        """All images as a sequence that decodes each on access."""
        return _LazyImages(self)

    @cached_property
    def texts(self) -> list[str]:
        """The texts of all pairs, in order.

        Raises:
            DataError: images without texts.
        """
        if not self.has_texts:
            raise DataError(
                f"{self.name}: expected pairs with texts, got {len(self)} images without; give captions to them, or use "
                "what needs images alone (sites of the image tower)"
            )
        return [row.text for row in self._rows]

    @property
    def image_numbers(self) -> list[int]:
        """For every pair the number of its image, in order of first appearance; captions of one image share it.

        >>> mm.retrieval(images, texts, images=torch.tensor(pairs.image_numbers))   # doctest: +SKIP
        """
        known: dict[int | str, int] = {}
        return [known.setdefault(row.image_key, len(known)) for row in self._rows]

    @property
    def meta(self) -> list[Mapping[str, Any]]:
        return [row.meta for row in self._rows]

    @property
    def splits(self) -> list[str]:
        """The split of every pair: given by the source, or by a hash of the text (:mod:`mmhooks.data.splits`)."""
        return [row.split or split_of(self.name, row.split_by or row.text or row.id) for row in self._rows]

    def split(self, name: str) -> Pairs:
        """The pairs of one split: "train", "heldout_pictures", "heldout_concepts", or one named by the source.

        Raises:
            DataError: no pair is in it; the message lists the splits with their counts.
        """
        chosen = [i for i, split in enumerate(self.splits) if split == name]
        if not chosen:
            counts = ", ".join(f"{split} ({n})" for split, n in Counter(self.splits).items())
            known = f"; usual names are {', '.join(SPLITS)}" if name not in SPLITS else ""
            raise DataError(f"{self.name} has no pair in split {name!r}; it has {counts}{known}")
        return self.select(chosen)

    def select(self, indices: Any) -> Pairs:
        """The pairs at ``indices``, in that order.

        Args:
            indices: whole numbers, negative ones from the end, a slice, or a bool mask of all pairs.

        Raises:
            ShapeMismatch: floats, or a mask of another length. OutOfRange: a pair that does not exist.
            DataError: none is selected, or one twice.
        """
        if isinstance(indices, slice):
            indices = range(*indices.indices(len(self)))
        places = as_places(indices, len(self), "pairs").tolist()
        return self._like([self._rows[i] for i in places], self.has_texts)

    def without_texts(self) -> Pairs:
        """The images alone, in the same splits."""
        rows = [replace(row, text="", split_by=row.split_by or row.text) for row in self._rows]
        return self._like(rows, False)

    def _like(self, rows: Iterable[Row], has_texts: bool) -> Pairs:
        """Other rows of the same images."""
        return type(self)(
            rows,
            self._images,
            name=self.name,
            content=self._content,
            licence=self.licence,
            attribution=self.attribution,
            skipped=self.skipped,
            has_texts=has_texts,
        )

    def _open(self, index: Any) -> Image.Image:
        row = self._rows[one_place(index, len(self), "pairs")]
        try:
            image = self._images.open(row.image_key)
            image.load()
        except (OSError, ValueError) as fault:  # DataError is one
            raise DataError(
                f"{self.name}: the image of pair {row.id!r} ({row.image_key}) cannot be read: {fault}; it was "
                "readable when the pairs were opened: has it changed since?"
            ) from fault
        return image


class _LazyImages(Sequence[Image.Image]):
    def __init__(self, pairs: Pairs) -> None:
        self._pairs = pairs

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._pairs.image(i) for i in range(*index.indices(len(self)))]
        place = as_place(index, len(self), "images")
        if place is None:
            return [self._pairs.image(i) for i in as_places(index, len(self), "images").tolist()]
        return self._pairs.image(place)


def check_rows(rows: Sequence[Row], name: str, *, has_texts: bool = True) -> None:
    """Raises DataError for a duplicate id, or an empty text where there are texts, naming the first one."""
    counts = Counter(row.id for row in rows)
    twice = [key for key, n in counts.items() if n > 1]
    if twice:
        raise DataError(
            f"{name}: expected unique ids, got {len(twice)} that occur more than once, the first is {twice[0]!r} "
            f"({counts[twice[0]]} times)"
        )
    empty = [row.id for row in rows if not row.text.strip()]
    if empty and has_texts:
        raise DataError(
            f"{name}: expected non-empty texts, got {len(empty)} empty ones, the first is that of {empty[0]!r}; "
            'on_error="skip" leaves them out'
        )


def _fingerprint(content: str, rows: Sequence[Row]) -> str:
    digest = blake2b(content.encode(), digest_size=10)
    for row in rows:
        digest.update(f"\0{row.id}\0{row.text}".encode())
    return digest.hexdigest()
