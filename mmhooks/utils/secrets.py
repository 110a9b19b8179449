"""API keys from the environment: validated when read, revealed only where they are sent, never printed or logged."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from mmhooks.errors import MMHooksError

WINDOW = 8  # so many consecutive characters reveal a key; a shorter key is a placeholder for a local server
HIDDEN = "[key]"


class Secret:
    """A string hidden from ``repr``, ``str`` and pickles; :meth:`reveal` is for the code that sends it.

    >>> key = Secret("sk-1234567890"); key, f"{key}", key.redact("wrong key: sk-1234567890!")
    ([key], '[key]', 'wrong key: [key]!')
    """

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    @classmethod
    def from_environment(cls, variable: str, error: type[MMHooksError] = MMHooksError) -> Secret | None:
        """The stripped value of an environment variable; None if it is empty.

        Raises:
            MMHooksError: (``error``) an invalid variable name, or a value that no header can carry. The message shows
                neither: people paste the key itself where the variable's name belongs.
        """
        if not re.fullmatch(r"[A-Z][A-Z0-9_]{0,63}", variable):
            raise error(
                "expected the name of an environment variable in capitals, such as DEEPSEEK_API_KEY, got "
                f"{len(variable)} characters that are not one (not shown, in case they are the key itself); "
                "export the key in a variable and give the variable's name"
            )
        secret = cls(os.environ.get(variable, "").strip())  # no local variable holds the key itself
        bad = secret._first_unfit()
        if bad is not None:
            raise error(
                f"the key in {variable} has a character that no header can carry, number {bad + 1} of "
                f"{len(secret._value)}; expected printable ASCII without spaces. Copy the key again"
            )
        return secret if secret._value else None

    def _first_unfit(self) -> int | None:
        return next((i for i, c in enumerate(self._value) if not "!" <= c <= "~"), None)

    def reveal(self) -> str:
        """The string itself."""
        return self._value

    def redact(self, text: str) -> str:
        """``text`` with every part that reveals the key (eight or more consecutive characters of it) replaced."""
        key, low = self._value.lower(), text.lower()
        if len(low) != len(text):  # a few letters change length when lowered; positions must match
            low = text
        if len(key) < WINDOW:
            return text
        parts = {key[i : i + WINDOW] for i in range(len(key) - WINDOW + 1)}
        if not any(part in low for part in parts):
            return text
        shown = [False] * len(text)
        for i in range(len(low) - WINDOW + 1):
            if low[i : i + WINDOW] in parts:
                shown[i : i + WINDOW] = [True] * WINDOW
        marks = "".join("x" if hidden else "." for hidden in shown)
        spans = [m.span() for m in re.finditer("x+", marks)]
        for begin, end in reversed(spans):
            text = text[:begin] + HIDDEN + text[end:]
        return text

    def __repr__(self) -> str:
        return HIDDEN

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a key is neither pickled nor copied; read it from the environment where it is needed"
        )


@contextmanager
def redacted_logs(secret: Secret, *packages: str) -> Iterator[None]:
    """Redacts the key in records of these packages' loggers while open: servers echo keys in what gets logged."""

    def redact(record: logging.LogRecord) -> bool:
        said = record.getMessage()
        if (shown := secret.redact(said)) != said:
            record.msg, record.args = shown, ()
        return True

    loggers = [
        logger
        for name, logger in list(logging.root.manager.loggerDict.items())
        if isinstance(logger, logging.Logger) and name.split(".")[0] in packages
    ]
    for logger in loggers:
        logger.addFilter(redact)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(redact)
