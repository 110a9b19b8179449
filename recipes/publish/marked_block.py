"""The generated part of a docs page: the block between its two markers, and the command that it names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmhooks.utils.files import write_text


def fill(page: Path, block: str, slot: str = "results") -> bool:
    """Writes ``block`` between the markers of ``slot``; returns False and writes nothing unless the page has exactly one
    pair of them."""
    markers = re.compile(rf"(<!-- {slot}:begin[^>]*-->\n).*?(<!-- {slot}:end -->)", re.S)
    filled, count = markers.subn(lambda m: f"{m[1]}\n{block}\n\n{m[2]}", page.read_text(encoding="utf-8"))
    if count != 1:
        return False
    write_text(page, filled)
    return True


def command(results: Mapping[str, Any]) -> str:
    """Returns the command of the run without ``--out``."""
    return re.sub(r" --out[ =]\S+", "", results["settings"]["command"])
