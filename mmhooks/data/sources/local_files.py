"""Safe reading of files that a data set refers to: only regular files of limited size inside the data set's folder.

A caption file or Parquet row from an untrusted source may refer to ``../../.ssh/id_rsa``, ``/dev/zero`` or a pipe.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mmhooks.errors import DataError, MissingWeights
from mmhooks.utils.faults import first_line

MAX_BYTES = 2**28  # 256 MiB: four photographs of 20 megapixels without compression
_WEB_SECONDS = 20.0  # without an answer
_ARCHIVES = ("zip", "tar", "gzip", "bz2", "xz", "zstd", "lz4")
_OPT_IN = "allow_outside=True reads it anyway"


@dataclass(frozen=True)
class DataRoot:
    """The location of a data set: a local folder, or a URL prefix such as ``hf://datasets/owner/name``.

    Attributes:
        folder: of local files; None for a remote data set.
        address: URL prefix without a trailing slash; "" for local files.
        allow_outside: whether files that the data set refers to may lie anywhere.
    """

    folder: Path | None = None
    address: str = ""
    allow_outside: bool = False

    def read(self, name: str) -> bytes:
        """Reads a file that a row refers to; relative names are resolved in the folder.

        Raises:
            DataError: a file that is missing, outside, not regular, or larger than :data:`MAX_BYTES`.
            MissingWeights: the connection failed.
        """
        if "::" in name or "://" in name:
            self.check(name)
            return _read_web(name) if name.startswith(("http://", "https://")) else _read_address(name)
        if self.folder is None:
            raise DataError(f"{name!r} is a local path in a remote data set; it is not read")
        return read_regular(self.inside(name))

    def inside(self, name: str | Path) -> Path:
        """The resolved path of a file in the folder, with links followed.

        Raises:
            DataError: it lies outside the folder.
        """
        folder = self.folder or Path()
        try:
            root, target = folder.resolve(), (folder / name).resolve()
        except (OSError, RuntimeError, ValueError) as fault:  # loops of links, names that no file can have
            raise DataError(f"{str(name)[:200]!r} is not a valid file name: {fault}") from fault
        if not self.allow_outside and not target.is_relative_to(root):
            raise DataError(f"{str(name)[:200]!r}: expected a file inside {root}, got {target}; {_OPT_IN}")
        return target

    def check(self, file: str) -> None:
        """Checks a file that ``datasets`` opens: a path, or a URL such as ``zip://0.png::/photos/train.zip``.

        Raises:
            DataError: it lies outside the data set's location.
        """
        *hops, last = file.split("::")
        for hop in hops:
            protocol = hop.partition("://")[0]
            if protocol not in _ARCHIVES:
                raise DataError(
                    f"{file!r}: expected a protocol among {', '.join(_ARCHIVES)}, got {protocol!r}"
                )
        if "://" not in last:
            if self.folder is None:
                raise DataError(f"{last!r} is a local path in a remote data set; it is not read")
            target = self.inside(last)
            if target.exists() and not target.is_file():
                raise DataError(f"{last!r} is not a regular file; it is not read")
            return
        here = bool(self.address) and last.startswith((self.address + "/", self.address + "@"))
        if not (here and ".." not in last.split("/")) and not self.allow_outside:
            where = self.address or str(self.folder)
            raise DataError(f"{last!r}: expected a file inside {where}; {_OPT_IN}")

    def check_all(self, files: Iterable[str]) -> None:
        """:meth:`check` of every file; raises at the first."""
        for file in files:
            self.check(file)


def read_regular(path: Path, most: int = MAX_BYTES) -> bytes:
    """Reads a regular file of at most ``most`` bytes.

    Raises:
        DataError: no such file, a folder, a device, a pipe, or a larger file.
    """
    try:
        # Without O_NONBLOCK, opening a pipe blocks until another process opens it for writing.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with os.fdopen(handle, "rb") as file:
            state = os.fstat(handle)
            if not stat.S_ISREG(state.st_mode):
                raise DataError(f"{path.name!r} is not a regular file; it is not read")
            data = b"" if state.st_size > most else file.read(most + 1)
    except (FileNotFoundError, NotADirectoryError) as fault:
        raise DataError("there is no such file") from fault
    except IsADirectoryError as fault:
        raise DataError(f"{path.name!r} is a folder, expected a file") from fault
    except (OSError, ValueError) as fault:
        raise DataError(str(getattr(fault, "strerror", None) or fault)) from fault
    if state.st_size > most or len(data) > most:
        raise DataError(f"expected at most {most:,} bytes, got {max(state.st_size, len(data)):,}")
    return data


def _read_web(url: str, most: int = MAX_BYTES) -> bytes:
    """Reads a URL that a row names, such as those of CC3M. Of old tables many are gone, so that no answer is a fault of
    the row, not of the connection."""
    import httpx

    data = bytearray()
    try:
        with httpx.stream("GET", url, follow_redirects=True, timeout=_WEB_SECONDS) as answer:
            if not answer.is_success:
                raise DataError(f"the server answered {answer.status_code} {answer.reason_phrase}")
            for part in answer.iter_bytes():
                data += part
                if len(data) > most:
                    raise DataError(f"expected at most {most:,} bytes, got more")
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as fault:  # DataError is a ValueError
        if isinstance(fault, DataError):
            raise
        raise DataError(f"it cannot be downloaded ({type(fault).__name__}: {first_line(fault)})") from fault
    return bytes(data)


def _read_address(name: str) -> bytes:
    """Reads a checked URL with the protocols of ``datasets``."""
    from datasets.utils.file_utils import xopen

    try:
        with xopen(name, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError as fault:
        raise DataError("there is no such file") from fault
    except Exception as fault:  # fsspec, zipfile, zlib, httpx and huggingface_hub each raise their own
        said = f"{type(fault).__name__}: {first_line(fault)}"
        if "://" in name.rsplit("::", 1)[-1]:
            raise MissingWeights(f"{name!r} cannot be downloaded ({said}); try again") from fault
        raise DataError(f"{name!r} cannot be read ({said})") from fault
    if len(data) > MAX_BYTES:
        raise DataError(f"{name!r}: expected at most {MAX_BYTES:,} bytes, got more")
    return data
