"""The one way in which mmhooks writes files: aside in the same folder, synced, and renamed. Never half a file.

And where it keeps what it derives: the cache folder, whose files are made anew when they are damaged.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from hashlib import file_digest
from pathlib import Path
from typing import Any, NoReturn

from mmhooks.errors import CannotWrite, DataError, MMHooksError
from mmhooks.utils.faults import first_line


def cache_dir(*parts: str, base: str | Path | None = None) -> Path:
    """The user's cache folder of mmhooks, or ``$MMHOOKS_CACHE`` where set; made if it is not there.

    Raises:
        DataError: the folder cannot be made or written.
    """
    if base is None:
        base = os.environ.get("MMHOOKS_CACHE")
    if not base:
        from platformdirs import user_cache_dir

        base = user_cache_dir("mmhooks")
    folder = Path(base).expanduser().joinpath(*parts)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise DataError(
            f"the cache folder {folder} cannot be made ({fault.strerror}); set MMHOOKS_CACHE to a writable folder"
        ) from fault
    return folder


@contextmanager
def kept_copy(path: Path) -> Iterator[None]:
    """Around the reading of a file that mmhooks keeps in its cache: what fails there is damage of the file.

    Raises:
        DataError: anything failed; says that the file is to be deleted.
    """
    try:
        yield
    except Exception as fault:  # pyarrow, safetensors and json each raise their own
        raise DataError(
            f"{path}, the kept copy of a data set, is damaged ({type(fault).__name__}: {first_line(fault)}); expected "
            "what mmhooks wrote there: delete it, and it is made anew"
        ) from fault


PARTS = ".*.part"  # what a killed process leaves beside its files

_FULL = (errno.ENOSPC, errno.EDQUOT)
# These can only come from writing, whatever else a block under `written_aside` does.
_OF_WRITING = (*_FULL, errno.EROFS, errno.EFBIG)
# Writers in Rust (safetensors) say the system's number in words alone.
_IN_WORDS = re.compile(r"\(os error (\d+)\)")


@contextmanager
def written_aside(path: str | Path) -> Iterator[Path]:
    """A path beside ``path`` to write; it takes the name of ``path`` when the block ends without an exception.

    Its content and then its name are synced to the disk, so a crash leaves the old file or the new one. Two
    processes that write the same file do not disturb each other: the later rename wins. Permissions are those
    of any new file, by the umask.

    Raises:
        CannotWrite: the disk is full or read-only, the folder is missing or not ours; names the path.

    >>> import tempfile; from pathlib import Path
    >>> target = Path(tempfile.mkdtemp()) / "result.json"
    >>> with written_aside(target) as aside:
    ...     _ = aside.write_text("{}")
    >>> target.read_text(), [p.name for p in target.parent.iterdir()]
    ('{}', ['result.json'])
    """
    path = Path(path)
    aside = path.with_name(f".{path.name[:200]}.{secrets.token_hex(6)}.part")
    try:
        with wrapped(path):
            # mkstemp would make it readable for its owner alone, whatever the umask of a shared cache says.
            handle = os.open(aside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
            mode = os.fstat(handle).st_mode
            os.close(handle)
        try:
            yield aside
        except Exception as fault:
            if not isinstance(fault, MMHooksError) and _number(fault) in _OF_WRITING:
                _complain(path, fault)
            raise
        with wrapped(path):
            aside.chmod(mode)  # safetensors puts a private file of its own in the place
            sync_file(aside)
            aside.replace(path)
            sync_folder(path.parent)
    except BaseException:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise


def write_whole(path: str | Path, write: Callable[[Any], Any]) -> Path:
    """Lets ``write(file)`` fill the file ``path``, aside; returns the path.

    Raises:
        CannotWrite: as :func:`written_aside`.
    """
    with written_aside(path) as aside, aside.open("wb") as file:
        write(file)
    return Path(path)


def write_bytes(path: str | Path, content: bytes) -> Path:
    """Writes the file ``path`` aside with this content; returns the path."""
    return write_whole(path, lambda file: file.write(content))


def write_text(path: str | Path, content: str) -> Path:
    """Writes the file ``path`` aside with this text, in UTF-8; returns the path."""
    return write_bytes(path, content.encode())


def make_folder(folder: str | Path) -> Path:
    """Makes ``folder`` and those above it where they are missing; returns it.

    Raises:
        CannotWrite: it cannot be made, or a file has its name.
    """
    with wrapped(Path(folder)):
        Path(folder).mkdir(parents=True, exist_ok=True)
    return Path(folder)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def sync_file(path: Path) -> None:
    """Waits until the content of ``path`` is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Makes renames and removals in ``folder`` last, where the system can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def wrapped(path: Path) -> Iterator[None]:
    """What the system refuses while ``path`` is written becomes :class:`~mmhooks.errors.CannotWrite`."""
    try:
        yield
    except MMHooksError:
        raise
    except OSError as fault:
        _complain(path, fault)


def _complain(path: Path, fault: Exception) -> NoReturn:
    number = _number(fault)
    if number in _FULL:
        why, remedy = "the disk is full", "make room and run the same call again"
    elif number == errno.EROFS:
        why, remedy = "the file system is read-only", "choose a folder that can be written"
    elif number in (errno.EACCES, errno.EPERM):
        why, remedy = "permission denied", "choose another folder, or change the permissions of this one"
    elif number in (errno.ENOENT, errno.ENOTDIR, errno.EEXIST):
        why, remedy = f"{path.parent} is not a folder", "make it first, or choose another path"
        if number == errno.EEXIST or path.parent.is_dir():
            why, remedy = f"a file is in the way ({fault})", "choose another path"
    else:
        why, remedy = str(fault), "choose another path"
    wrapped = CannotWrite(f"{path} could not be written: {why}; {remedy}")
    wrapped.errno = number
    raise wrapped from fault


def _number(fault: Exception) -> int | None:
    if isinstance(fault, OSError) and fault.errno is not None:
        return fault.errno
    words = _IN_WORDS.search(str(fault))
    return int(words.group(1)) if words else None
