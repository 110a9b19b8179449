"""Reports errors of mmhooks as one line instead of a traceback."""

from __future__ import annotations

import sys
from typing import Any

from mmhooks.utils.say import say_error


class clear_errors:
    """Context manager: an :class:`MMHooksError` becomes one line on stderr and exit code 1; others keep their traceback.

    Args:
        name: of the command; the line begins with it.
    """

    def __init__(self, name: str = "mmhooks") -> None:
        self.name = name

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        from mmhooks.errors import MMHooksError

        if isinstance(error, MMHooksError):
            say_error(error, self.name)
            sys.exit(1)
