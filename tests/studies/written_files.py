"""A check that a study's results and its files agree."""

from __future__ import annotations

import json

from mmhooks.studies.common.write import Results


def written(found: Results) -> dict:
    """What ``results.json`` holds, which is what the run returned; every file is one that it names."""
    out = found.paths[0].parent
    assert {p.suffix for p in out.iterdir()} == {".json", ".md", ".png", ".html"}
    assert set(found.paths) == set(out.iterdir())
    assert json.loads((out / "results.json").read_text()) == found.found
    return found.found
