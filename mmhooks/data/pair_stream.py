"""Streams of pairs from data sets too large to store: read once, in order, by one process or several."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from itertools import count, islice
from pathlib import Path
from typing import Any

from mmhooks.data.pair_set import Pair
from mmhooks.data.seen_ids import SeenIds
from mmhooks.data.sources.caption_choice import Captions, check_choice, chosen_texts
from mmhooks.data.sources.captions import captions_in
from mmhooks.data.sources.file_rows import listing_state, rows_of_files
from mmhooks.data.sources.hub import describe_skipped, file_state
from mmhooks.data.sources.images import open_image, rgb
from mmhooks.data.sources.local_files import DataRoot
from mmhooks.data.sources.local_layouts import local_listing
from mmhooks.data.sources.opening import (
    KNOWN,
    Columns,
    OpenDataset,
    columns_of,
    encoded,
    id_of,
    iterate_rows,
    open_rows,
)
from mmhooks.data.sources.tars import FAULT, KEY
from mmhooks.errors import DataError


@dataclass(frozen=True)
class RawRow:
    """A pair as read, with its image still encoded; ``fault``: why it cannot be used, if that is known already.

    ``captions``: all of its image, of which ``text`` is one.
    """

    id: str
    text: str = ""
    captions: tuple[str, ...] = ()
    image: Any = None
    root: DataRoot = field(default_factory=DataRoot)
    fault: str | None = None

    def decoded(self) -> Pair | str:
        """The decoded pair, or why it cannot be used."""
        if self.fault is not None:
            return self.fault
        try:
            data = encoded(self.image, self.root)
        except DataError as fault:
            return str(fault)
        try:
            image = rgb(open_image(data))
        except DataError as fault:
            return f"its image cannot be read: {fault}"
        return Pair(self.id, image, self.text, {"captions": list(self.captions)})


class PairStream:
    """Pairs that are read in order, their number being unknown; see :func:`pair_stream`.

    Attributes:
        name, licence, attribution: as in :class:`~mmhooks.data.Pairs`.
        fingerprint: of the request and of what :func:`~mmhooks.data.sources.hub.file_state` reads of local files (names,
            sizes, times, first and last megabyte); the rows are not read for it.
        on_error: "raise" or "skip", for rows that cannot be used.
        has_texts: as in :class:`~mmhooks.data.Pairs`.
        skipped: why each skipped row was left out, as of the last iteration over this object. (Rows that
            ``mm.extract`` leaves out are listed in the store.)
    """

    def __init__(
        self,
        opened: OpenDataset,
        columns: Columns,
        *,
        name: str,
        limit: int | None = None,
        fingerprint: str,
        licence: str,
        attribution: str,
        on_error: str,
        captions: Captions = "first",
        seed: int = 0,
    ) -> None:
        self._opened, self._columns, self._limit = opened, columns, limit
        self.name, self.fingerprint, self.on_error = name, fingerprint, on_error
        self.licence, self.attribution = licence, attribution
        self._captions: Captions = captions
        self._seed, self.has_texts = seed, captions != "none"
        self.skipped: dict[str, str] = {}

    def __repr__(self) -> str:
        return f"PairStream({self.name!r}, {self.fingerprint})"

    def __iter__(self) -> Iterator[Pair]:
        """The usable pairs.

        Raises:
            DataError: a row that cannot be used (``on_error="raise"``), or no usable row at all.
        """
        self.skipped = {}
        read = 0
        for raw in self.raw():
            pair = raw.decoded()
            if isinstance(pair, Pair):
                read += 1
                yield pair
            elif self.on_error == "raise":
                raise DataError(f'{self.name}, {raw.id}: {pair}; on_error="skip" leaves such rows out')
            else:
                self.skipped[raw.id] = pair
        if not read:
            raise DataError(f"{self.name}: none of its rows can be used{describe_skipped(self.skipped)}")

    def raw(self, *, rank: int = 0, world: int = 1, skip: int = 0) -> Iterator[RawRow]:
        """The pairs of one of ``world`` processes, still encoded, after skipping the first ``skip`` of them.

        Whole files are assigned to a process if their number allows, else every ``world``-th row
        (``datasets.distributed.split_dataset_by_node``). Without an id column, rows are named by their number; a row
        whose id has occurred before in this call is reported as faulty.
        """
        if self._captions == "all":  # how many pairs a row makes is known only after reading it
            return islice(self._expanded(rank, world, 0), skip, None)
        return self._expanded(rank, world, skip)

    def _expanded(self, rank: int, world: int, skip: int) -> Iterator[RawRow]:
        """The pairs that the rows make, after skipping the first ``skip`` rows."""
        rows = self._opened.rows if self._limit is None else self._opened.rows.take(self._limit)
        if world > 1:
            from datasets.distributed import split_dataset_by_node

            rows = split_dataset_by_node(rows, rank=rank, world_size=world)
        before = f"{rank}of{world}-" if world > 1 else ""
        # Keys of tars contain the tar's label and are checked per tar while it is read.
        seen = SeenIds() if self._columns.id not in (None, KEY) else None
        numbers = count(skip)
        for row in iterate_rows(self._opened, rows.skip(skip) if skip else rows, self.name):
            key = f"{before}{next(numbers):09d}"
            try:
                if self._columns.id is not None:
                    key = str(row.get(self._columns.id) or key)
                    id_of(row, self._columns.id)
                    if seen is not None and not seen.add(key):
                        raise DataError("its id is a duplicate")
                if FAULT in row:
                    raise DataError(row[FAULT])
                captions = captions_in(row, self._columns.text) if self._columns.text is not None else []
            except DataError as fault:
                yield RawRow(key, fault=str(fault))
            else:
                image = row.get(self._columns.image)
                for name, text in chosen_texts(key, captions, self._captions, self._seed):
                    yield RawRow(name, text, tuple(captions), image, self._opened.root)


def pair_stream(
    source: str | Path,
    *,
    split: str | None = None,
    limit: int | None = None,
    on_error: str = "raise",
    image_column: str | None = None,
    text_column: str | None = None,
    captions: Captions = "first",
    seed: int = 0,
    images: str | Path | None = None,
    allow_outside: bool = False,
) -> PairStream:
    """Pairs of any image-text data set that ``datasets`` can stream; nothing is stored on disk.

    For data sets that :func:`~mmhooks.data.pairs` would have to download completely: LAION's WebDataset tars, Parquet
    files with image bytes, any data set of the Hub. ``mm.extract`` reads both.

    Args:
        source, split, image_column, text_column, captions, seed, images, allow_outside: as in :func:`~mmhooks.data.pairs`.
        limit: stop after this many rows.
        on_error: "raise" at the first row that cannot be used, or "skip" it and continue.

    Raises:
        DataError: no such file, split or column.
        MissingWeights: a data set that cannot be downloaded.

    >>> stream = pair_stream("laion/*.tar", on_error="skip")             # doctest: +SKIP
    >>> store = mm.extract(model, stream, sites=["image.embed"], out="runs/laion")  # doctest: +SKIP
    """
    if on_error not in ("raise", "skip"):
        raise DataError(f'on_error: expected "raise" or "skip", got {on_error!r}')
    if limit is not None and limit < 1:
        raise DataError(f"limit must be at least 1, got {limit}")
    check_choice(captions)
    name = str(source)
    known = KNOWN.get(name)
    path, wanted = (known.path, split or known.split) if known else (name, split)
    texts = captions != "none"
    listing = None
    if (
        images is not None or not (Path(source).expanduser() / "metadata.csv").exists()
    ):  # which datasets reads
        listing = local_listing(
            source, images=images, image_column=image_column, text_column=text_column, texts=texts,
            allow_outside=allow_outside,
        )  # fmt: skip
    if listing is None:
        opened = open_rows(path, wanted, name, allow_outside=allow_outside)
        columns = columns_of(opened, known, image_column, text_column, name, texts=texts)
        state = file_state(Path(path).expanduser())
    else:
        opened, columns = rows_of_files(listing, wanted)
        state = listing_state(listing)
        captions = captions if listing.has_texts else "none"
    request = [
        path,
        wanted,
        limit,
        on_error,
        asdict(columns),
        allow_outside,
        state,
    ]
    if captions != "first":  # stores of first captions keep their identity
        request += [captions, seed]
    return PairStream(
        opened,
        columns,
        name=name,
        limit=limit,
        fingerprint=blake2b(json.dumps(request).encode(), digest_size=10).hexdigest(),
        licence=known.licence if known else "see the data set's card",
        attribution=known.attribution if known else name,
        on_error=on_error,
        captions=captions,
        seed=seed,
    )
