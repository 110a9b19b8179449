"""The tables of the embedded heads on tokens: docs/heads.md says what the cards say."""

from __future__ import annotations

import shutil
from pathlib import Path

from publish import token_heads


def test_the_page_says_what_the_cards_say(tmp_path: Path) -> None:
    page = Path(shutil.copy(token_heads.PAGE, tmp_path / "heads.md"))
    token_heads.main(page)
    assert page.read_text() == token_heads.PAGE.read_text()
    page.write_text(page.read_text().replace("| 16.0 |", "| 17.0 |").replace("| 16.0 / 16.0 |", "| 0 |"))
    token_heads.main(page)
    assert page.read_text() == token_heads.PAGE.read_text()
