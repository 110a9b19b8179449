"""Reads JSON files that may be damaged or of another kind: fields are checked, and errors are one sentence."""

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
        what: what the file should be, with its article ("a result of a sweep"). ``remedy``: what to do if it is not.
        fields: required names of the object in the file, and the types of their values; others are allowed.

    Raises:
        MMHooksError: (``error``) the file cannot be read, is not JSON, or lacks ``fields``; the message has the path,
            what was expected, what was found and ``remedy``.

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
    except (
        ValueError,
        RecursionError,
    ) as fault:  # not UTF-8, not JSON, or numbers or nesting too large to parse
        raise error(
            f"{path} is not {what}: expected JSON, got a file that cannot be parsed: {fault}; {remedy}"
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
    """Raises unless ``content`` is an object with these fields; ``where`` begins the message.

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
        # In Python True is an int; in JSON it is not a number.
        fits = bool in allowed if isinstance(value, bool) else isinstance(value, allowed)
        if not fits:
            expected = " or ".join(_NAMES.get(kind, kind.__name__) for kind in allowed)
            raise error(f"{where}: expected {expected} as {name!r}, got {describe_json(value)}; {remedy}")


def describe_json(value: Any) -> str:
    """A JSON value for messages: the kind and size of an object or list, otherwise the value, shortened."""
    if isinstance(value, (dict, list)):
        return f"{_NAMES[type(value)]} of {len(value)}"
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:60]}…"
