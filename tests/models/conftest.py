from __future__ import annotations

import pytest

import mmhooks as mm

from .pipelines import build, draw


@pytest.fixture(scope="module")
def models():
    made: dict[str, mm.HookedDiffusion] = {}

    def get(kind: str) -> mm.HookedDiffusion:
        if kind not in made:
            pipe = build(kind)
            draw(pipe)  # transformers installs recorders of hidden states at the first call, and keeps them
            made[kind] = mm.HookedDiffusion(pipe)
        return made[kind]

    return get
