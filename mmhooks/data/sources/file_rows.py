"""Listed image files as the rows of a stream."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mmhooks.data.sources.image_files import Captioned, Listing, of_split
from mmhooks.data.sources.opening import Columns, OpenDataset
from mmhooks.data.sources.tars import FAULT
from mmhooks.errors import DataError


def rows_of_files(listing: Listing, split: str | None) -> tuple[OpenDataset, Columns]:
    """The entries of a listing in one split, of which images are opened when the stream reaches them.

    Raises:
        DataError: no entry is in the split.
    """
    import datasets

    # A tuple, since datasets shares the items of a list out among processes: rows are to alternate.
    entries = tuple(of_split(listing.entries, split, listing.name))
    rows = datasets.IterableDataset.from_generator(_rows, gen_kwargs={"entries": entries})
    opened = OpenDataset(rows, dict.fromkeys(("id", "image", "captions")), listing.root)
    return opened, Columns("image", "captions" if listing.has_texts else None, "id")


def listing_state(listing: Listing) -> list[Any]:
    """Identifies a listing: its entries, and size and time of every file in the folder."""
    return [
        [e.id, e.image, list(e.captions), e.split, e.fault, _file_state(listing, e.image)]
        for e in listing.entries
    ]


def _file_state(listing: Listing, image: str) -> list[int] | None:
    if not image or "://" in image:
        return None
    try:
        found = listing.root.inside(image).stat()
    except (DataError, OSError):
        return None  # told when the stream reaches it
    return [found.st_size, found.st_mtime_ns]


def _rows(entries: tuple[Captioned, ...]) -> Iterator[dict[str, Any]]:
    for entry in entries:
        row: dict[str, Any] = {
            "id": entry.id or entry.place,
            "image": entry.image,
            "captions": list(entry.captions),
        }
        yield row if entry.fault is None else {"id": entry.place, FAULT: entry.fault}
