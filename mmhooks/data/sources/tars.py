"""WebDataset tars, read from front to back. What is damaged is told: a sample by its key, a tar by its name.

``datasets`` reads them too, but decodes every file while it reads (one caption in Latin-1 ends the stream), and like
Python's ``tarfile`` it takes a header that is damaged, or an end without its mark, for the end.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator, Sequence
from typing import Any, cast

from mmhooks.data.sources.local_files import MAX_BYTES
from mmhooks.errors import DataError, MissingWeights
from mmhooks.utils.faults import first_line

KEY, FAULT = "__key__", "__fault__"
_NAME = re.compile(r"^((?:.*/|)[^./][^./]*)[.]([^/]+)$")
_BEHIND = 2**20  # bytes behind the end's mark that are looked through


def tar_rows(tars: Sequence[str], labels: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Samples of the tars: ``{"__key__": "0000/000123", "jpg": bytes, "txt": bytes}``, nothing decoded.

    A key carries its tar's label: keys often begin anew in every tar. What cannot be read is a row too, with
    ``__fault__``; after damage in a tar its next one follows.

    Raises:
        MissingWeights: a connection that broke.
    """
    for tar, label in zip(tars, labels, strict=True):
        seen: set[str] = set()
        for row in _samples(tar):
            key = row[KEY]
            row[KEY] = f"{label}/{key}"
            if key in seen and FAULT not in row:
                row = {KEY: row[KEY], FAULT: "its key occurs before in this tar"}
            seen.add(key)
            yield row


def labels_of(tars: Sequence[str]) -> list[str]:
    """A short name for each tar: its file's name without ending, with as many folders as tell them apart.

    >>> labels_of(["a/0.tar", "a/1.tar"]), labels_of(["a/0.tar", "b/0.tar"])
    (['0', '1'], ['a/0', 'b/0'])
    """
    parts = [re.sub(r"\.tar$", "", tar).replace("\\", "/").split("/") for tar in tars]
    for depth in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(p[-depth:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    raise DataError(f"{tars[0]}: the same tar is named twice")


def fields_of(tars: Sequence[str], samples: int = 5) -> list[str]:
    """The endings of the files in the first samples that can be read.

    Raises:
        DataError: not one can be read.
    """
    fields: dict[str, None] = {}
    first, found = None, 0
    for row in tar_rows(tars, labels_of(tars)):
        if FAULT in row:
            first = first or f"{row[KEY]}: {row[FAULT]}"
            continue
        fields |= dict.fromkeys(name for name in row if name != KEY)
        found += 1
        if found == samples:
            break
    if not fields:
        raise DataError(f"no sample can be read in {len(tars)} tars; {first or 'they are empty'}")
    return list(fields)


def _samples(tar: str) -> Iterator[dict[str, Any]]:
    """Files of one key, which follow each other, in one dictionary; damage as a last one."""
    sample: dict[str, Any] = {}
    try:
        for key, field, data in _files(tar):
            if sample and sample[KEY] != key:
                yield sample
                sample = {}
            sample[KEY] = key
            if isinstance(data, str):
                sample[FAULT] = data
            elif field in sample:
                sample[FAULT] = f"it has two files .{field}"
            sample[field] = data
    except _Damaged as fault:
        # Of the sample that was being read nobody knows what else belongs to it.
        yield {KEY: sample.get(KEY, ""), FAULT: str(fault)}
        return
    if sample:
        yield sample


class _Damaged(Exception):
    """A tar that cannot be read on."""


def _files(tar: str) -> Iterator[tuple[str, str, bytes | str]]:
    """Key, field and bytes of every regular file, or why it is not read."""
    remote, begun = "://" in tar.rsplit("::", 1)[-1], False
    try:
        with _open(tar) as file, tarfile.open(fileobj=file, mode="r|", tarinfo=_Header) as members:
            begun = True
            while (member := members.next()) is not None:
                cast(Any, members).members.clear()  # it keeps every header otherwise
                # The next header stands so far on; "r|" counts up to there even behind the file's end.
                ahead = cast(Any, members).offset - member.offset
                if not 0 <= member.size <= MAX_BYTES or ahead > 2 * MAX_BYTES:
                    most = max(member.size, ahead)
                    raise _Damaged(
                        f"{member.name[:100]!r} announces {most:,} bytes, expected at most {MAX_BYTES:,}"
                    )
                named = _NAME.match(member.name)
                if named is None or member.isdir():
                    continue
                if not member.isreg() or member.issparse():
                    data = f"{member.name!r} is a link or another special file, expected a regular one"
                else:
                    data = cast(Any, members.extractfile(member)).read()
                yield named[1], named[2], data
            behind = cast(Any, members.fileobj).read(_BEHIND)
            if any(behind) or len(behind) == _BEHIND:
                raise _Damaged("more follows the mark of its end: it is damaged, or several tars in one file")
    except _Damaged as fault:
        raise _Damaged(f"{tar}: {fault}") from fault
    except (tarfile.TarError, EOFError, ValueError, LookupError, OverflowError, RecursionError) as fault:
        hint = (
            "truncated or damaged from here on"
            if begun
            else "no tar, or a compressed one, expected a tar as it is"
        )
        raise _Damaged(f"{tar} is {hint} ({first_line(fault)})") from fault
    except Exception as fault:  # of the disk; of fsspec, huggingface_hub and httpx
        said = f"{type(fault).__name__}: {first_line(fault)}"
        if remote:
            raise MissingWeights(
                f"{tar}: fetching broke off ({said}); call again, it goes on from there"
            ) from fault
        raise _Damaged(f"{tar} cannot be read ({said})") from fault


def _open(tar: str) -> Any:
    from datasets.utils.file_utils import xopen

    return xopen(tar, "rb")


class _Header(tarfile.TarInfo):
    """Headers whose damage is an error: ``tarfile`` takes it for the end."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> tarfile.TarInfo:  # type: ignore[override]
        try:
            return super().fromtarfile(archive)
        except tarfile.HeaderError as fault:
            if isinstance(fault, tarfile.EOFHeaderError):  # type: ignore[attr-defined]
                raise
            raise tarfile.ReadError(str(fault) or "no mark of its end") from fault
