"""One door to every source of pairs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from mmhooks.data.pair_set import Pairs
from mmhooks.data.splits import choose
from mmhooks.errors import DataError

OnError = Literal["raise", "skip"]


def pairs(
    source: str | Path = "mini",
    *,
    split: str | None = None,
    limit: int | None = None,
    on_error: OnError = "raise",
    seed: int = 0,
    image_column: str | None = None,
    text_column: str | None = None,
    meta_columns: Sequence[str] = (),
    allow_outside: bool = False,
    progress: bool = True,
) -> Pairs:
    """Picture-text pairs from the embedded corpus, a folder, or any image-text data set of ``datasets``.

    Args:
        source: ``"mini"`` (OpenMoji, offline); a folder with ``metadata.csv`` (columns ``file_name,text``,
            optional ``id`` and ``split``, others kept as ``meta``); a folder or file that ``datasets`` reads
            (Parquet, Arrow, image folder, WebDataset); ``"coco"``, ``"cc3m"``; or any data set's name on the Hub.
        split: of ``mini`` and folders "train", "heldout_pictures" or "heldout_concepts"; of data sets the
            name that they give it (default: validation where there is one).
        limit: at most so many pairs: a random choice by ``seed``, in the source's order; from a stream
            the first ones, so that nothing is fetched for nothing.
        on_error: "raise" names the first pair that cannot be used; "skip" leaves such pairs out and lists
            them in ``.skipped``.
        image_column, text_column: of a data set whose columns are not found by type and name; for the texts also a
            part of one: ``"captions.en"``, ``"conversations.1.value"``, ``"txt.lines"`` (of a tar: a caption a line).
        meta_columns: of a data set, columns to keep in ``meta`` as text (names of classes, not their numbers);
            of a folder all columns are kept anyway.
        allow_outside: also read files that lie outside of the data set's folder: what a table or a row names by
            ``../``, an absolute path, a link or an address. Set it only if you trust who wrote them.

    Raises:
        DataError: a source that is not there, a file or row that cannot be used; the message names it.
        MissingWeights: a package or a data set that is neither here nor to be fetched.

    >>> corpus = pairs("mini", split="heldout_concepts")        # doctest: +SKIP
    >>> pairs("photos/", on_error="skip").skipped               # doctest: +SKIP
    {'broken.png': 'cannot identify image file'}
    """
    if limit is not None and limit < 1:
        raise DataError(f"limit must be at least 1, came {limit}")
    if on_error not in ("raise", "skip"):
        raise DataError(f'on_error must be "raise" or "skip", came {on_error!r}')
    place = Path(source).expanduser()
    if str(source) == "mini":
        from mmhooks.data.sources.openmoji import openmoji

        found = openmoji(progress=progress)
    elif (place / "metadata.csv").exists():
        from mmhooks.data.sources.folder import folder

        return folder(
            place,
            split=split,
            limit=limit,
            on_error=on_error,
            seed=seed,
            allow_outside=allow_outside,
            progress=progress,
        )
    else:
        from mmhooks.data.sources.hub import stream

        return stream(
            str(source),
            split=split,
            limit=limit,
            on_error=on_error,
            image_column=image_column,
            text_column=text_column,
            meta_columns=meta_columns,
            allow_outside=allow_outside,
            progress=progress,
        )
    if split is not None:
        found = found.split(split)
    return found if limit is None or limit >= len(found) else found.select(choose(len(found), limit, seed))
