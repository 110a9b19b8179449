"""The page on hooking one's own model runs as it stands, and gives the answers that it prints."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).parent.parent / "docs" / "hook_your_own.md"
BLOCKS = [b for b in re.findall(r"```python\n(.+?)\n```", PAGE.read_text(), re.S) if b.startswith("import")]


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_a_block_runs(number):
    torch.manual_seed(0)
    checked, answers = re.subn(
        r"(\S.*\.texts)  # (\[.+\])$", r"assert \1 == \2, \1", BLOCKS[number], flags=re.M
    )
    assert bool(answers) == ("model.generate([image]" in checked)
    exec(compile(checked, f"{PAGE.name}, block {number}", "exec"), {})


def test_every_section_has_a_block():
    assert len(BLOCKS) == 5
