"""Where derived files are kept."""

from __future__ import annotations

import os
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
def kept_copy(path: Path) -> Iterator[None]:
    """Around the reading of a file that mmhooks keeps in its cache: what fails there is damage of the file.

    Raises:
        DataError: anything failed; says that the file is to be deleted.
    """
    try:
        yield
    except Exception as fault:  # pyarrow, safetensors and json each raise their own
        said = (str(fault).strip().splitlines() or [""])[0][:200]
        raise DataError(
            f"{path}, the kept copy of a data set, is damaged ({type(fault).__name__}: {said}); expected what mmhooks "
            "wrote there: delete it, and it is made anew"
        ) from fault
