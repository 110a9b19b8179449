"""Pairs of a data set too large to keep: read once, from front to back, by one process or by many."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from itertools import count
from pathlib import Path
from typing import Any

from PIL import Image

from mmhooks.data.pair_set import Pair, rgb
from mmhooks.data.stream import KNOWN, _columns, _encoded, _first_line, _open, _state_of, _texts
from mmhooks.errors import DataError, MissingWeights


@dataclass(frozen=True)
class Raw:
    """A row as it was read, its picture not yet decoded."""

    id: str
    text: Any
    picture: Any

    def decoded(self) -> Pair | str:
        """The pair, or why it is none."""
        captions = _texts(self.text)
        if not captions:
            return "its text is empty"
        data, fault = _encoded(self.picture)
        if fault is not None:
            return fault
        return Pair(self.id, rgb(Image.open(io.BytesIO(data))), captions[0], {"captions": captions})


class PairStream:
    """Pairs that are read in order, without knowing how many there are; see :func:`pair_stream`.

    Attributes:
        name, licence, attribution: as of :class:`~mmhooks.data.Pairs`.
        fingerprint: of the request, and of names, sizes and times of local files; the rows are not read for it.
        on_error: "raise" or "skip", for rows that cannot be used.
    """

    def __init__(
        self,
        rows: Any,
        columns: Mapping[str, str | None],
        *,
        name: str,
        fingerprint: str,
        licence: str,
        attribution: str,
        on_error: str,
    ) -> None:
        self._rows, self._columns = rows, columns
        self.name, self.fingerprint, self.on_error = name, fingerprint, on_error
        self.licence, self.attribution = licence, attribution

    def __repr__(self) -> str:
        return f"PairStream({self.name!r}, {self.fingerprint})"

    def __iter__(self) -> Iterator[Pair]:
        for raw in self.raw():
            pair = raw.decoded()
            if isinstance(pair, Pair):
                yield pair
            elif self.on_error == "raise":
                raise DataError(f'{self.name}, {raw.id}: {pair}; on_error="skip" leaves such rows out')

    def raw(self, *, rank: int = 0, world: int = 1, skip: int = 0) -> Iterator[Raw]:
        """The rows of one of ``world`` processes, as they are read; the first ``skip`` of them are passed over.

        Whole files go to a process where their number allows, else every ``world``-th row
        (``datasets.distributed.split_dataset_by_node``). A row without an id is called by its number.
        """
        rows = self._rows
        if world > 1:
            from datasets.distributed import split_dataset_by_node

            rows = split_dataset_by_node(rows, rank=rank, world_size=world)
        key, text, image = self._columns["id"], str(self._columns["text"]), str(self._columns["image"])
        before = f"{rank}of{world}-" if world > 1 else ""
        numbers = count(skip)
        try:
            for row in rows.skip(skip) if skip else rows:
                number = next(numbers)
                yield Raw(str(row[key]) if key else f"{before}{number:09d}", row[text], row[image])
        except (OSError, ValueError) as fault:
            raise MissingWeights(
                f"{self.name}: fetching broke off ({type(fault).__name__}: {_first_line(fault)}); an extraction that "
                "is called again goes on with the shard it was at"
            ) from fault


def pair_stream(
    source: str | Path,
    *,
    split: str | None = None,
    limit: int | None = None,
    on_error: str = "raise",
    image_column: str | None = None,
    text_column: str | None = None,
) -> PairStream:
    """Pairs of any image-text data set that ``datasets`` streams: nothing is kept on disk, nothing is counted.

    For what :func:`~mmhooks.data.pairs` would have to fetch whole first: LAION's WebDataset tars, Parquet with
    picture bytes, any data set of the Hub. ``mm.extract`` reads either.

    Args:
        source, split, image_column, text_column: as of :func:`~mmhooks.data.pairs`; also a glob of local files,
            ``"laion/*.tar"``.
        limit: stop after so many rows.
        on_error: "raise" at the first row that cannot be used, or "skip" and go on.

    Raises:
        DataError: no such file, split or column.
        MissingWeights: a data set that is not to be fetched.

    >>> stream = pair_stream("laion/*.tar", on_error="skip")             # doctest: +SKIP
    >>> store = mm.extract(model, stream, sites=["image.embed"], out="runs/laion")  # doctest: +SKIP
    """
    import datasets

    if on_error not in ("raise", "skip"):
        raise DataError(f'on_error must be "raise" or "skip", came {on_error!r}')
    if limit is not None and limit < 1:
        raise DataError(f"limit must be at least 1, came {limit}")
    name = str(source)
    known = KNOWN.get(name)
    path, wanted = (known.path, split or known.split) if known else (name, split)
    rows = _open(path, wanted, name)
    columns = _columns(rows, known, image_column, text_column, name)
    image = str(columns["image"])
    if isinstance((rows.features or {}).get(image), datasets.Image):
        rows = rows.cast_column(image, datasets.Image(decode=False))
    request = [path, wanted, limit, on_error, columns, _state_of(Path(path).expanduser())]
    return PairStream(
        rows if limit is None else rows.take(limit),
        columns,
        name=name,
        fingerprint=blake2b(json.dumps(request).encode(), digest_size=10).hexdigest(),
        licence=known.licence if known else "see the data set's card",
        attribution=known.attribution if known else name,
        on_error=on_error,
    )
