"""Files that a data set names are read where the data set lies, and only if they are regular files of some size.

A caption file or a Parquet row that a stranger wrote may name ``../../.ssh/id_rsa``, ``/dev/zero`` or a pipe.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mmhooks.errors import DataError, MissingWeights

MAX_BYTES = 2**28  # 256 MiB: four photographs of 20 megapixels without compression
_ARCHIVES = ("zip", "tar", "gzip", "bz2", "xz", "zstd", "lz4")
_MEANT = "allow_outside=True reads it all the same"


@dataclass(frozen=True)
class Home:
    """Where a data set lies: a folder here, or a prefix of addresses such as ``hf://datasets/owner/name``.

    Attributes:
        folder: of local files; None for a data set that is read from elsewhere.
        address: without a slash at its end; "" for local files.
        allow_outside: what the data set names may lie anywhere.
    """

    folder: Path | None = None
    address: str = ""
    allow_outside: bool = False

    def read(self, name: str) -> bytes:
        """Reads the file that a row names; relative names are of the folder.

        Raises:
            DataError: no such file, none that lies inside, not a regular one, or one larger than :data:`MAX_BYTES`.
            MissingWeights: a connection that broke.
        """
        if "::" in name or "://" in name:
            self.check(name)
            return _read_address(name)
        if self.folder is None:
            raise DataError(
                f"{name!r} is a path of this machine, named by a data set from elsewhere; it is not read"
            )
        return read_regular(self.inside(name))

    def inside(self, name: str | Path) -> Path:
        """The path of a file of the folder, links followed.

        Raises:
            DataError: it lies elsewhere.
        """
        folder = self.folder or Path()
        try:
            root, target = folder.resolve(), (folder / name).resolve()
        except (OSError, RuntimeError, ValueError) as fault:  # loops of links, names that no file can have
            raise DataError(f"{str(name)[:200]!r} names no file: {fault}") from fault
        if not self.allow_outside and not target.is_relative_to(root):
            raise DataError(
                f"{str(name)[:200]!r} is {target}, expected a file inside {root}: nothing else is read; {_MEANT}"
            )
        return target

    def check(self, file: str) -> None:
        """Checks a file that ``datasets`` opens: a path, or an address such as ``zip://0.png::/photos/train.zip``.

        Raises:
            DataError: it lies elsewhere.
        """
        *hops, last = file.split("::")
        for hop in hops:
            protocol = hop.partition("://")[0]
            if protocol not in _ARCHIVES:
                raise DataError(f"{file!r} asks for {protocol!r}; expected one of {', '.join(_ARCHIVES)}")
        if "://" not in last:
            if self.folder is None:
                raise DataError(
                    f"{last!r} is a path of this machine, named by a data set from elsewhere; it is not read"
                )
            target = self.inside(last)
            if target.exists() and not target.is_file():
                raise DataError(f"{last!r} is not a regular file; it is not read")
            return
        here = bool(self.address) and last.startswith((self.address + "/", self.address + "@"))
        if not (here and ".." not in last.split("/")) and not self.allow_outside:
            where = self.address or str(self.folder)
            raise DataError(f"{last!r} lies outside of {where}: nothing else is read; {_MEANT}")

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
        # Without O_NONBLOCK, opening a pipe waits for somebody to write into it.
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
        raise DataError(f"{max(state.st_size, len(data)):,} bytes, expected at most {most:,}")
    return data


def _read_address(name: str) -> bytes:
    """Of an address that was checked, by what ``datasets`` knows to open."""
    from datasets.utils.file_utils import xopen

    try:
        with xopen(name, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError as fault:
        raise DataError("there is no such file") from fault
    except Exception as fault:  # fsspec, zipfile, zlib, httpx and huggingface_hub each raise their own
        said = f"{type(fault).__name__}: {(str(fault).splitlines() or [''])[0][:200]}"
        if "://" in name.rsplit("::", 1)[-1]:
            raise MissingWeights(f"{name!r} cannot be fetched ({said}); try again") from fault
        raise DataError(f"{name!r} cannot be read ({said})") from fault
    if len(data) > MAX_BYTES:
        raise DataError(f"more than {MAX_BYTES:,} bytes in {name!r}")
    return data
