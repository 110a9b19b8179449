"""Atomic writing of files, which all of mmhooks uses: written to a temporary sibling, synced, and renamed.

Also the cache folder, whose files can be rebuilt when they are damaged.
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
    """The user's cache folder for mmhooks (``$MMHOOKS_CACHE`` if set), created if missing.

    Raises:
        DataError: the folder cannot be created.
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
            f"the cache folder {folder} cannot be created ({fault.strerror}); set MMHOOKS_CACHE to a writable folder"
        ) from fault
    return folder


@contextmanager
def reading_cache_file(path: Path) -> Iterator[None]:
    """Turns any failure while a cached file is read into an error that says the file is damaged.

    Raises:
        DataError: anything failed; says to delete the file.
    """
    try:
        yield
    except Exception as fault:  # pyarrow, safetensors and json each raise their own
        raise DataError(
            f"{path}, the cached copy of a data set, is damaged ({type(fault).__name__}: {first_line(fault)}); expected "
            "what mmhooks wrote there: delete it, and it is rebuilt"
        ) from fault


PARTS = ".*.part"  # temporary files that a killed process leaves behind

_FULL = (errno.ENOSPC, errno.EDQUOT)
# Errors that only writing can cause, whatever else a block under `atomic_path` does.
_OF_WRITING = (*_FULL, errno.EROFS, errno.EFBIG)
# Writers in Rust (safetensors) give the system's error number only in the message.
_IN_WORDS = re.compile(r"\(os error (\d+)\)")


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path`` to write to; it is renamed to ``path`` when the block succeeds.

    Content and rename are synced to disk, so a crash leaves either the old file or the new one. Two processes that
    write the same file do not interfere: the later rename wins. Permissions follow the umask, as for any new file.

    Raises:
        CannotWrite: the disk is full or read-only, or the folder is missing or not writable; names the path.

    >>> import tempfile; from pathlib import Path
    >>> target = Path(tempfile.mkdtemp()) / "result.json"
    >>> with atomic_path(target) as aside:
    ...     _ = aside.write_text("{}")
    >>> target.read_text(), [p.name for p in target.parent.iterdir()]
    ('{}', ['result.json'])
    """
    path = Path(path)
    aside = path.with_name(f".{path.name[:200]}.{secrets.token_hex(6)}.part")
    try:
        with explain_os_errors(path):
            # mkstemp would make it readable only to its owner, ignoring the umask of a shared cache.
            handle = os.open(aside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
            mode = os.fstat(handle).st_mode
            os.close(handle)
        try:
            yield aside
        except Exception as fault:
            if not isinstance(fault, MMHooksError) and _errno_of(fault) in _OF_WRITING:
                _raise_cannot_write(path, fault)
            raise
        with explain_os_errors(path):
            aside.chmod(mode)  # safetensors replaces the file by a private one of its own
            sync_file(aside)
            aside.replace(path)
            sync_folder(path.parent)
    except BaseException:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise


def write_atomic(path: str | Path, write: Callable[[Any], Any]) -> Path:
    """Writes ``path`` atomically by calling ``write(file)``; returns the path.

    Raises:
        CannotWrite: as :func:`atomic_path`.
    """
    with atomic_path(path) as aside, aside.open("wb") as file:
        write(file)
    return Path(path)


def write_bytes(path: str | Path, content: bytes) -> Path:
    """Writes ``content`` to ``path`` atomically; returns the path."""
    return write_atomic(path, lambda file: file.write(content))


def write_text(path: str | Path, content: str) -> Path:
    """Writes ``content`` to ``path`` atomically, in UTF-8; returns the path."""
    return write_bytes(path, content.encode())


def make_folder(folder: str | Path) -> Path:
    """Creates ``folder`` and its missing parents; returns it.

    Raises:
        CannotWrite: it cannot be created, or a file has its name.
    """
    with explain_os_errors(Path(folder)):
        Path(folder).mkdir(parents=True, exist_ok=True)
    return Path(folder)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def sync_file(path: Path) -> None:
    """Waits until the content of ``path`` is on disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Makes renames and removals in ``folder`` durable, where the system supports it."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def explain_os_errors(path: Path) -> Iterator[None]:
    """Turns an ``OSError`` raised while ``path`` is written into :class:`~mmhooks.errors.CannotWrite`."""
    try:
        yield
    except MMHooksError:
        raise
    except OSError as fault:
        _raise_cannot_write(path, fault)


def _raise_cannot_write(path: Path, fault: Exception) -> NoReturn:
    number = _errno_of(fault)
    if number in _FULL:
        why, remedy = "the disk is full", "make room and run the same call again"
    elif number == errno.EROFS:
        why, remedy = "the file system is read-only", "choose a folder that can be written"
    elif number in (errno.EACCES, errno.EPERM):
        why, remedy = "permission denied", "choose another folder, or change the permissions of this one"
    elif number in (errno.ENOENT, errno.ENOTDIR, errno.EEXIST):
        why, remedy = f"{path.parent} is not a folder", "create it first, or choose another path"
        if number == errno.EEXIST or path.parent.is_dir():
            why, remedy = f"a file is in the way ({fault})", "choose another path"
    else:
        why, remedy = str(fault), "choose another path"
    error = CannotWrite(f"{path} could not be written: {why}; {remedy}")
    error.errno = number
    raise error from fault


def _errno_of(fault: Exception) -> int | None:
    if isinstance(fault, OSError) and fault.errno is not None:
        return fault.errno
    words = _IN_WORDS.search(str(fault))
    return int(words.group(1)) if words else None
