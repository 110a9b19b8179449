"""Pairs of a data set too large to keep: read once, from front to back, by one process or by many."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from itertools import count
from pathlib import Path
from typing import Any

from mmhooks.data.pair_set import Pair
from mmhooks.data.seen_ids import SeenIds
from mmhooks.data.sources.captions import captions_in
from mmhooks.data.sources.hub import first_reason, state_of
from mmhooks.data.sources.images import open_image, rgb
from mmhooks.data.sources.local_files import Home
from mmhooks.data.sources.opening import (
    KNOWN,
    Columns,
    Opened,
    columns_of,
    encoded,
    id_of,
    open_rows,
    read_on,
)
from mmhooks.data.sources.tars import FAULT, KEY
from mmhooks.errors import DataError


@dataclass(frozen=True)
class Raw:
    """A row as it was read, its image not yet decoded; ``fault``: why it cannot be used, where that is known."""

    id: str
    captions: tuple[str, ...] = ()
    image: Any = None
    home: Home = field(default_factory=Home)
    fault: str | None = None

    def decoded(self) -> Pair | str:
        """The pair, or why it is none."""
        if self.fault is not None:
            return self.fault
        try:
            data = encoded(self.image, self.home)
        except DataError as fault:
            return str(fault)
        try:
            image = rgb(open_image(data))
        except DataError as fault:
            return f"its picture cannot be read: {fault}"
        return Pair(self.id, image, self.captions[0], {"captions": list(self.captions)})


class PairStream:
    """Pairs that are read in order, without knowing how many there are; see :func:`pair_stream`.

    Attributes:
        name, licence, attribution: as of :class:`~mmhooks.data.Pairs`.
        fingerprint: of the request and of local files as far as :func:`~mmhooks.data.sources.hub.state_of` looks at them
            (names, sizes, times, first and last megabyte); the rows are not read for it.
        on_error: "raise" or "skip", for rows that cannot be used.
        skipped: row by row why it was left out, as far as the stream was last read by this object. (Rows that
            ``mm.extract`` leaves out stand in the store.)
    """

    def __init__(
        self,
        opened: Opened,
        columns: Columns,
        *,
        name: str,
        limit: int | None = None,
        fingerprint: str,
        licence: str,
        attribution: str,
        on_error: str,
    ) -> None:
        self._opened, self._columns, self._limit = opened, columns, limit
        self.name, self.fingerprint, self.on_error = name, fingerprint, on_error
        self.licence, self.attribution = licence, attribution
        self.skipped: dict[str, str] = {}

    def __repr__(self) -> str:
        return f"PairStream({self.name!r}, {self.fingerprint})"

    def __iter__(self) -> Iterator[Pair]:
        """The usable pairs.

        Raises:
            DataError: a row that cannot be used (``on_error="raise"``), or not a single one that can.
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
            raise DataError(f"{self.name}: none of its rows can be used{first_reason(self.skipped)}")

    def raw(self, *, rank: int = 0, world: int = 1, skip: int = 0) -> Iterator[Raw]:
        """The rows of one of ``world`` processes, as they are read; the first ``skip`` of them are passed over.

        Whole files go to a process where their number allows, else every ``world``-th row
        (``datasets.distributed.split_dataset_by_node``). A row without an id column is called by its number; an id
        that occurred before, among the rows of this call, is a fault of its row.
        """
        rows = self._opened.rows if self._limit is None else self._opened.rows.take(self._limit)
        if world > 1:
            from datasets.distributed import split_dataset_by_node

            rows = split_dataset_by_node(rows, rank=rank, world_size=world)
        before = f"{rank}of{world}-" if world > 1 else ""
        # Keys of tars are compared tar by tar while they are read, and carry the tar.
        seen = SeenIds() if self._columns.id not in (None, KEY) else None
        numbers = count(skip)
        for row in read_on(self._opened, rows.skip(skip) if skip else rows, self.name):
            key = f"{before}{next(numbers):09d}"
            try:
                if self._columns.id is not None:
                    key = str(row.get(self._columns.id) or key)
                    id_of(row, self._columns.id)
                    if seen is not None and not seen.add(key):
                        raise DataError("its id occurs before")
                if FAULT in row:
                    raise DataError(row[FAULT])
                captions = captions_in(row, self._columns.text)
            except DataError as fault:
                yield Raw(key, fault=str(fault))
            else:
                yield Raw(key, tuple(captions), row.get(self._columns.image), self._opened.home)


def pair_stream(
    source: str | Path,
    *,
    split: str | None = None,
    limit: int | None = None,
    on_error: str = "raise",
    image_column: str | None = None,
    text_column: str | None = None,
    allow_outside: bool = False,
) -> PairStream:
    """Pairs of any image-text data set that ``datasets`` streams: nothing is kept on disk, nothing is counted.

    For what :func:`~mmhooks.data.pairs` would have to fetch whole first: LAION's WebDataset tars, Parquet with
    picture bytes, any data set of the Hub. ``mm.extract`` reads either.

    Args:
        source, split, image_column, text_column, allow_outside: as of :func:`~mmhooks.data.pairs`; also a glob of
            local files, ``"laion/*.tar"``.
        limit: stop after so many rows.
        on_error: "raise" at the first row that cannot be used, or "skip" and go on.

    Raises:
        DataError: no such file, split or column.
        MissingWeights: a data set that is not to be fetched.

    >>> stream = pair_stream("laion/*.tar", on_error="skip")             # doctest: +SKIP
    >>> store = mm.extract(model, stream, sites=["image.embed"], out="runs/laion")  # doctest: +SKIP
    """
    if on_error not in ("raise", "skip"):
        raise DataError(f'on_error must be "raise" or "skip", came {on_error!r}')
    if limit is not None and limit < 1:
        raise DataError(f"limit must be at least 1, came {limit}")
    name = str(source)
    known = KNOWN.get(name)
    path, wanted = (known.path, split or known.split) if known else (name, split)
    opened = open_rows(path, wanted, name, allow_outside=allow_outside)
    columns = columns_of(opened, known, image_column, text_column, name)
    request = [
        path,
        wanted,
        limit,
        on_error,
        asdict(columns),
        allow_outside,
        state_of(Path(path).expanduser()),
    ]
    return PairStream(
        opened,
        columns,
        name=name,
        limit=limit,
        fingerprint=blake2b(json.dumps(request).encode(), digest_size=10).hexdigest(),
        licence=known.licence if known else "see the data set's card",
        attribution=known.attribution if known else name,
        on_error=on_error,
    )
