"""The generated part of a docs page: the block between its two markers, and the command that it names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from mmhooks.utils.files import write_text


def fill(page: Path, block: str, slot: str = "results") -> None:
    """Writes ``block`` between the markers of ``slot``.

    Raises:
        typer.BadParameter: the page has no pair of them, or several; nothing is written.
    """
    markers = re.compile(rf"(<!-- {slot}:begin[^>]*-->\n).*?(<!-- {slot}:end -->)", re.S)
    filled, count = markers.subn(lambda m: f"{m[1]}\n{block}\n\n{m[2]}", page.read_text(encoding="utf-8"))
    if count != 1:
        raise typer.BadParameter(f"{page}: expected one pair of {slot} markers, got {count}")
    write_text(page, filled)


def command(results: Mapping[str, Any]) -> str:
    """Returns the command of the run without ``--out``."""
    return re.sub(r" --out[ =]\S+", "", results["settings"]["command"])
