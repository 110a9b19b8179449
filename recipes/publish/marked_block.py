"""The part of a page that a command writes: what stands between its two markers."""

from __future__ import annotations

import re
from pathlib import Path

SLOT = re.compile(r"(<!-- results:begin[^>]*-->\n).*?(<!-- results:end -->)", re.S)


def fill(page: Path, block: str) -> bool:
    """Puts ``block`` between the markers; False, and nothing is written, unless the page holds just one pair."""
    filled, count = SLOT.subn(lambda m: f"{m[1]}\n{block}\n\n{m[2]}", page.read_text(encoding="utf-8"))
    if count != 1:
        return False
    page.write_text(filled, encoding="utf-8")
    return True
