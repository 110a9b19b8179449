"""The one way in which mmhooks reads JSON that may be damaged or another file's: checked, and told in one sentence."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmhooks.errors import DataError, MMHooksError

Kind = type | tuple[type, ...]
_NAMES = {dict: "an object", list: "a list", str: "a text", int: "a whole number", float: "a number",
          bool: "true or false", type(None): "null"}  # fmt: skip


def read_json(
    path: str | Path,
    what: str,
    fields: Mapping[str, Kind] | None = None,
    *,
    remedy: str,
    error: type[MMHooksError] = DataError,
) -> Any:
    """The content of a JSON file.

    Args:
        what: with its article, what the file should be ("a result of a sweep"); ``remedy``: what to do where it is not.
        fields: names that the file, then an object, must hold, and the types of their values; more may be there.

    Raises:
        MMHooksError: (``error``) the file cannot be read, is no JSON, or differs from ``fields``; the sentence has the
            path, what was expected, what was found and ``remedy``.

    >>> import tempfile; place = Path(tempfile.mkdtemp()) / "run.json"
    >>> _ = place.write_text('{"seed": "1"}')
    >>> read_json(place, "a run", {"seed": int}, remedy="run it again")  # doctest: +IGNORE_EXCEPTION_DETAIL
    Traceback (most recent call last):
    mmhooks.errors.DataError: run.json is not a run: expected a whole number as 'seed', got '1'; run it again
    """
    path = Path(path)
    try:
        content = json.loads(path.read_bytes())
    except OSError as fault:
        raise error(f"{path}, {what}, cannot be read: {fault.strerror or fault}; {remedy}") from fault
    except (ValueError, RecursionError) as fault:  # no UTF-8, no JSON, numbers or nesting beyond reading
        raise error(
            f"{path} is not {what}: expected JSON, got a file broken at: {fault}; {remedy}"
        ) from fault
    if fields is not None:
        check_fields(content, fields, f"{path} is not {what}", remedy=remedy, error=error)
    return content


def check_fields(
    content: Any,
    fields: Mapping[str, Kind],
    where: str,
    *,
    remedy: str,
    error: type[MMHooksError] = DataError,
) -> None:
    """Refuses ``content`` where it is no object with these fields; ``where`` begins the sentence.

    Raises:
        MMHooksError: (``error``) names the first field that is missing or of another type.
    """
    if not isinstance(content, dict):
        raise error(f"{where}: expected an object, got {describe_json(content)}; {remedy}")
    for name, kinds in fields.items():
        if name not in content:
            found = ", ".join(list(content)[:8]) or "nothing"
            raise error(f"{where}: expected {name!r} in it, got {found}; {remedy}")
        allowed = kinds if isinstance(kinds, tuple) else (kinds,)
        value = content[name]
        # To Python, True is an int; to whoever reads a file, it is not a number.
        fits = bool in allowed if isinstance(value, bool) else isinstance(value, allowed)
        if not fits:
            expected = " or ".join(_NAMES.get(kind, kind.__name__) for kind in allowed)
            raise error(f"{where}: expected {expected} as {name!r}, got {describe_json(value)}; {remedy}")


def describe_json(value: Any) -> str:
    """A value of a file in a few words: its kind where it is large, itself where it is small."""
    if isinstance(value, (dict, list)):
        return f"{_NAMES[type(value)]} of {len(value)}"
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:60]}…"
