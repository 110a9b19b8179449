"""Where derived files are kept, and how they are written: aside, then renamed, never half."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmhooks.errors import DataError


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
def written_aside(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` to write; it takes the name of ``path`` only when the block ends well.

    Two processes that build the same file do not disturb each other: the later rename wins, with equal bytes.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    os.close(handle)
    aside = Path(name)
    try:
        yield aside
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
