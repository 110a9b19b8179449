"""Pairs from image files that are listed with their captions; every layout of local files ends up here."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any

from PIL import Image

from mmhooks.data.pair_set import Pairs, Row, check_rows
from mmhooks.data.sources.caption_choice import Captions, chosen_texts
from mmhooks.data.sources.images import image_fault, open_image
from mmhooks.data.sources.local_files import DataRoot
from mmhooks.data.splits import choose
from mmhooks.errors import DataError
from mmhooks.utils.progress import track

_FEW = 500  # up to this many images are checked without a progress bar


@dataclass(frozen=True)
class Captioned:
    """An image file with its captions, as a data set lists it.

    Attributes:
        image: its path in the folder of images, or a URL.
        place: where it is listed, such as ``"line 3"``.
        fault: why the listing cannot be used.
    """

    id: str
    image: str
    captions: tuple[str, ...] = ()
    split: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)
    place: str = ""
    fault: str | None = None


@dataclass(frozen=True)
class Listing:
    """The images that a local data set lists, in order, and the folder in which they lie.

    ``has_texts``: False where it has images alone.
    """

    name: str
    entries: tuple[Captioned, ...]
    root: DataRoot
    has_texts: bool = True

    @property
    def licence(self) -> str:
        """The first line of the folder's LICENSE, if it has one."""
        try:
            notice = self.root.read("LICENSE").decode("utf-8", errors="replace")
        except DataError:
            notice = ""
        return (notice.strip().splitlines() or [""])[0] or "not stated (add a LICENSE file)"


def grouped(entries: Iterable[Captioned]) -> list[Captioned]:
    """Joins the captions of one image under one id, in order; ``meta["captions"]`` holds all of an image that has several."""
    first: dict[tuple[str, str], list[Captioned]] = {}
    found: list[list[Captioned]] = []
    for entry in entries:
        key = (entry.id, entry.image)
        if entry.fault is None and key in first:
            first[key].append(entry)
            continue
        found.append([entry])
        if entry.fault is None:
            first[key] = found[-1]
    return [_joined(group) for group in found]


def _joined(group: Sequence[Captioned]) -> Captioned:
    if len(group) == 1:
        return group[0]
    captions = [text for entry in group for text in entry.captions if text.strip()]
    return replace(group[0], captions=tuple(captions), meta={**group[0].meta, "captions": captions})


def of_split(entries: Sequence[Captioned], split: str | None, name: str) -> list[Captioned]:
    """The entries of one split, given by the data set or else by a hash of their first captions; all of them for None.

    Raises:
        DataError: no entry is in it; the message lists the splits.
    """
    if split is None:
        return list(entries)
    rows = [Row(str(i), "", e.image, e.split, split_by=_first(e) or e.id) for i, e in enumerate(entries)]
    chosen = Pairs(rows, _Files(DataRoot()), name=name, content="", has_texts=False).split(split)
    return [entries[int(key)] for key in chosen.ids]


def _first(entry: Captioned) -> str:
    return next(iter(entry.captions), "")


def usable(listing: Listing, on_error: str, skipped: dict[str, str]) -> list[Captioned]:
    """The entries without a fault, the first of every id; the others are added to ``skipped``.

    Raises:
        DataError: an entry with a fault, if ``on_error`` is "raise".
    """
    kept = []
    for entry in listing.entries:
        if entry.fault is None:
            kept.append(entry)
        elif on_error == "skip":
            skipped[entry.place] = entry.fault
        else:
            raise DataError(
                f'{listing.name}, {entry.place}: {entry.fault}; fix it, or leave it out with on_error="skip"'
            )
    if on_error == "skip":
        kept = list(_without_repeats(kept, skipped))
    return kept


def pairs_of_files(
    listing: Listing,
    *,
    split: str | None,
    limit: int | None,
    on_error: str,
    seed: int,
    captions: Captions,
    progress: bool,
) -> Pairs:
    """Pairs of a listing. Every image is read once here, so that undecodable ones are reported now and not an hour into
    an extraction, and the fingerprint covers the files' bytes.

    Raises:
        DataError: an entry, image or text that cannot be used; no pair in the split.
    """
    name, has_texts = listing.name, listing.has_texts and captions != "none"
    skipped: dict[str, str] = {}
    entries = usable(listing, on_error, skipped)
    if on_error == "skip" and has_texts:
        for entry in [entry for entry in entries if not any(map(str.strip, entry.captions))]:
            skipped[entry.image] = "its text is empty"
        entries = [entry for entry in entries if any(map(str.strip, entry.captions))]
    check_rows([Row(e.id, _first(e), e.image) for e in entries], name, has_texts=has_texts)
    entries = of_split(entries, split, name)
    if limit is not None and limit < len(entries):
        entries = [entries[i] for i in choose(len(entries), limit, seed)]
    content, faults = _checked(listing.root, [e.image for e in entries], name, progress)
    if faults and on_error != "skip":
        bad = next(iter(faults))
        raise DataError(
            f"{name}: {len(faults)} of {len(content) + len(faults)} images cannot be used, the first is {bad}: "
            f'{faults[bad]}; fix or remove them, or leave them out with on_error="skip"'
        )
    skipped |= faults
    rows = [
        Row(key, text, e.image, e.split, e.meta, split_by=_first(e))
        for e in entries
        if e.image in content
        for key, text in chosen_texts(e.id, e.captions, captions if has_texts else "none", seed)
    ]
    digest = blake2b(digest_size=10)
    for file in content.values():
        digest.update(file)
    return Pairs(
        rows, _Files(listing.root), name=name, content=digest.hexdigest(), skipped=skipped, licence=listing.licence,
        has_texts=has_texts,
    )  # fmt: skip


def _without_repeats(entries: Iterable[Captioned], skipped: dict[str, str]) -> Iterator[Captioned]:
    seen: dict[str, int] = {}
    for entry in entries:
        seen[entry.id] = seen.get(entry.id, 0) + 1
        if seen[entry.id] == 1:
            yield entry
        else:
            skipped[f"{entry.image} (id {entry.id}, no. {seen[entry.id]})"] = "its id is a duplicate"


def _checked(
    root: DataRoot, images: Sequence[str], name: str, progress: bool
) -> tuple[dict[str, bytes], dict[str, str]]:
    """The hash of every usable image's bytes, and why each other one cannot be used."""
    files = list(dict.fromkeys(images))
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:  # decoding releases the interpreter lock
        checks = pool.map(lambda file: _check(root, file), files)
        show = progress and len(files) > _FEW
        results = list(track(checks, len(files), f"checking images of {name}", show=show))
    content = {file: hashed for file, (hashed, fault) in zip(files, results, strict=True) if fault is None}
    return content, {f: fault for f, (_, fault) in zip(files, results, strict=True) if fault is not None}


def _check(root: DataRoot, file: str) -> tuple[bytes, str | None]:
    """The hash of the file's bytes, or why it is not a usable image."""
    try:
        data = root.read(file)
    except DataError as fault:
        return b"", str(fault)
    fault = image_fault(data)
    return (blake2b(data, digest_size=10).digest(), None) if fault is None else (b"", fault)


class _Files:
    def __init__(self, root: DataRoot) -> None:
        self._root = root

    def open(self, image_key: int | str) -> Image.Image:
        return open_image(self._root.read(str(image_key)))
