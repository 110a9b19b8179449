"""``mm.data.pairs``: opens pairs from any source."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from mmhooks.data.pair_set import Pairs
from mmhooks.data.sources.caption_choice import Captions, check_choice
from mmhooks.data.sources.image_files import pairs_of_files
from mmhooks.data.sources.local_layouts import local_listing
from mmhooks.data.splits import choose
from mmhooks.errors import DataError

OnError = Literal["raise", "skip"]


def pairs(
    source: Any = "mini",
    *,
    split: str | None = None,
    limit: int | None = None,
    on_error: OnError = "raise",
    seed: int = 0,
    image_column: str | None = None,
    text_column: str | None = None,
    meta_columns: Sequence[str] = (),
    captions: Captions = "first",
    images: str | Path | None = None,
    allow_outside: bool = False,
    progress: bool = True,
) -> Pairs:
    """Image-text pairs from the embedded corpus, files in their usual layouts, an object in memory, or the Hub.

    Args:
        source: ``"mini"`` (OpenMoji, offline); a folder of images with ``metadata.csv`` (columns ``file_name,text``,
            optional ``id`` and ``split``, others kept as ``meta``), with a text file beside each, or without texts; a file
            of captions (COCO, Karpathy, Flickr8k, Flickr30k, open_clip, CC3M, CC12M, records in JSON); files or a folder of
            tars, Parquet or Arrow, also by ``*`` and ``{00000..00012}``; ``"coco"``, ``"cc3m"``, or any data set's name on
            the Hub. In memory: a ``datasets.Dataset``, a torch ``Dataset``, or a list of (image, text), where an image is
            Pillow's, uint8 samples or a path, and a text may be a list of captions. docs/data.md has a table.
        split: for ``mini`` and folders "train", "heldout_pictures" or "heldout_concepts"; for data sets one of their
            own splits (default: validation if there is one).
        limit: at most this many images: a random subset by ``seed``, in the source's order; of a data set the first
            ones, so that no more than these are downloaded.
        on_error: "raise" reports the first pair that cannot be used; "skip" leaves such pairs out and lists
            them in ``.skipped``.
        image_column, text_column: of a data set whose columns cannot be inferred by type and name; for texts also a
            part of a column: ``"captions.en"``, ``"conversations.1.value"``, ``"txt.lines"`` (in a tar: one caption
            per line).
        meta_columns: columns of a data set to keep in ``meta`` as text (class names instead of numbers);
            for a folder all columns are kept.
        captions: where an image has several: its "first", "all" (one pair each, a family; ids end in ``#0``, ``#1``), a
            "random" one (by ``seed`` and the image's id), or "none", for images alone. All are in ``meta["captions"]``.
        images: the folder of the images of a file of captions, if it is not found beside it.
        allow_outside: also read files outside the data set's folder, which a table or row may refer to by ``../``, an
            absolute path, a link or a URL. Set it only if you trust the author of the data set.

    Raises:
        DataError: a source that does not exist, a file or row that cannot be used; the message names it.
        MissingWeights: a package or data set that is neither installed nor downloadable.

    >>> corpus = pairs("mini", split="heldout_concepts")        # doctest: +SKIP
    >>> pairs("photos/", on_error="skip").skipped               # doctest: +SKIP
    {'broken.png': 'cannot identify image file'}
    """
    if limit is not None and limit < 1:
        raise DataError(f"limit must be at least 1, got {limit}")
    if on_error not in ("raise", "skip"):
        raise DataError(f'on_error: expected "raise" or "skip", got {on_error!r}')
    check_choice(captions)
    if not isinstance(source, (str, Path)):
        from mmhooks.data.sources.memory import pairs_in_memory

        if images is not None:
            raise DataError(
                f"images: expected it with a file of captions, got it with a {type(source).__name__}"
            )
        return pairs_in_memory(
            source,
            split=split,
            limit=limit,
            on_error=on_error,
            seed=seed,
            image_column=image_column,
            text_column=text_column,
            meta_columns=meta_columns,
            captions=captions,
            allow_outside=allow_outside,
            progress=progress,
        )
    if str(source) == "mini":
        from mmhooks.data.sources.openmoji import openmoji

        if images is not None:
            raise DataError(f'images: expected it with a file of captions, got it with "mini": {images}')
        found = openmoji(progress=progress)
        if captions == "none":
            found = found.without_texts()
        if split is not None:
            found = found.split(split)
        return (
            found if limit is None or limit >= len(found) else found.select(choose(len(found), limit, seed))
        )
    listing = local_listing(
        source,
        images=images,
        image_column=image_column,
        text_column=text_column,
        texts=captions != "none",
        allow_outside=allow_outside,
    )
    if listing is not None:
        return pairs_of_files(
            listing,
            split=split,
            limit=limit,
            on_error=on_error,
            seed=seed,
            captions=captions,
            progress=progress,
        )
    from mmhooks.data.sources.hub import stream

    return stream(
        str(source),
        split=split,
        limit=limit,
        on_error=on_error,
        image_column=image_column,
        text_column=text_column,
        meta_columns=meta_columns,
        captions=captions,
        seed=seed,
        allow_outside=allow_outside,
        progress=progress,
    )
