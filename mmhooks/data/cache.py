"""Where derived files are kept."""

from __future__ import annotations

import os
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
