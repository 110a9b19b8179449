"""A toolkit error as one sentence instead of a traceback."""

from __future__ import annotations

import sys
from typing import Any

import typer


class clear_errors:
    """A toolkit error becomes one sentence on stderr and exit code 1; anything else keeps its traceback."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        from mmhooks.errors import MMHooksError

        if isinstance(error, MMHooksError):
            typer.echo(f"mmhooks: {error}", err=True)
            sys.exit(1)
