"""Sequential reading of WebDataset tars; damage is reported by sample key or tar name.

``datasets`` reads them too, but decodes every file while reading (one caption in Latin-1 ends the stream), and like
Python's ``tarfile`` it treats a damaged header, or a missing end marker, as the end of the archive.
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
_TRAILING = 2**20  # number of bytes checked after the end marker


def tar_rows(tars: Sequence[str], labels: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Samples of the tars, not decoded: ``{"__key__": "0000/000123", "jpg": bytes, "txt": bytes}``.

    A key contains its tar's label, since keys often restart in every tar. What cannot be read becomes a row with
    ``__fault__``; after damage, reading continues with the next tar.

    Raises:
        MissingWeights: the connection failed.
    """
    for tar, label in zip(tars, labels, strict=True):
        seen: set[str] = set()
        for row in _samples(tar):
            key = row[KEY]
            row[KEY] = f"{label}/{key}"
            if key in seen and FAULT not in row:
                row = {KEY: row[KEY], FAULT: "its key is a duplicate in this tar"}
            seen.add(key)
            yield row


def labels_of(tars: Sequence[str]) -> list[str]:
    """A short name for each tar: its file name without extension, with as many folders as make it unique.

    >>> labels_of(["a/0.tar", "a/1.tar"]), labels_of(["a/0.tar", "b/0.tar"])
    (['0', '1'], ['a/0', 'b/0'])
    """
    parts = [re.sub(r"\.tar$", "", tar).replace("\\", "/").split("/") for tar in tars]
    for depth in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(p[-depth:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    raise DataError(f"{tars[0]}: the same tar is given twice")


def fields_of(tars: Sequence[str], samples: int = 5) -> list[str]:
    """The file extensions in the first readable samples.

    Raises:
        DataError: no sample can be read.
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
    """Groups consecutive files of one key into a sample; damage is reported as the last one."""
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
        # The sample being read may be incomplete, so it is reported as faulty.
        yield {KEY: sample.get(KEY, ""), FAULT: str(fault)}
        return
    if sample:
        yield sample


class _Damaged(Exception):
    """A tar whose remainder cannot be read."""


def _files(tar: str) -> Iterator[tuple[str, str, bytes | str]]:
    """Key, field and content of every regular file, or why it cannot be read."""
    remote, begun = "://" in tar.rsplit("::", 1)[-1], False
    try:
        with _open(tar) as file, tarfile.open(fileobj=file, mode="r|", tarinfo=_Header) as members:
            begun = True
            while (member := members.next()) is not None:
                cast(Any, members).members.clear()  # tarfile would keep every header in memory
                # Distance to the next header; in mode "r|" it may lie beyond the end of the file.
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
                    data = f"{member.name!r}: expected a regular file, got a link or another special file"
                else:
                    data = cast(Any, members.extractfile(member)).read()
                yield named[1], named[2], data
            trailing = cast(Any, members.fileobj).read(_TRAILING)
            if any(trailing) or len(trailing) == _TRAILING:
                raise _Damaged("data after its end marker: it is damaged, or several tars in one file")
    except _Damaged as fault:
        raise _Damaged(f"{tar}: {fault}") from fault
    except (tarfile.TarError, EOFError, ValueError, LookupError, OverflowError, RecursionError) as fault:
        hint = (
            "truncated or damaged from here on"
            if begun
            else "not a tar, or a compressed one; expected an uncompressed tar"
        )
        raise _Damaged(f"{tar} is {hint} ({first_line(fault)})") from fault
    except Exception as fault:  # of the disk; of fsspec, huggingface_hub and httpx
        said = f"{type(fault).__name__}: {first_line(fault)}"
        if remote:
            raise MissingWeights(f"{tar}: the download failed ({said}); call again to resume") from fault
        raise _Damaged(f"{tar} cannot be read ({said})") from fault


def _open(tar: str) -> Any:
    from datasets.utils.file_utils import xopen

    return xopen(tar, "rb")


class _Header(tarfile.TarInfo):
    """Tar headers that raise an error if damaged, which ``tarfile`` would treat as the end."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> tarfile.TarInfo:  # type: ignore[override]
        try:
            return super().fromtarfile(archive)
        except tarfile.HeaderError as fault:
            if isinstance(fault, tarfile.EOFHeaderError):  # type: ignore[attr-defined]
                raise
            raise tarfile.ReadError(str(fault) or "no end marker") from fault
