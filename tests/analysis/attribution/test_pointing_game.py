"""The pointing game on maps that hit and maps that miss."""

from __future__ import annotations

import pytest
import torch

import mmhooks as mm
from mmhooks.analysis.attribution.pointing_game import pointing_game
from mmhooks.errors import ShapeMismatch


def test_pointing_game():
    heat = torch.zeros(5, 4, 4)
    masks = torch.zeros(5, 8, 8, dtype=torch.bool)
    masks[:, :4, :4] = True
    heat[:3, 0, 0] = 1.0  # on the object
    heat[3:, 3, 3] = 1.0
    masks[4] = False  # decides nothing
    game = pointing_game(heat, masks)
    assert game.rate.n == 4 and game.rate.value == 0.75 and game.chance == 0.25
    assert game.centre.value == 0.0 and 0.7 < game.energy < 0.8
    assert game.rate.low < 0.75 < game.rate.high and game.table()[0]["n"] == 4
    flipped = pointing_game(heat, ~masks)
    assert flipped.rate.value == 0.25
    with pytest.raises(ShapeMismatch, match="neither|none of the 5 masks"):
        pointing_game(heat, torch.ones_like(masks))
    with pytest.raises(ShapeMismatch, match="5 maps and 3 masks"):
        pointing_game(heat, masks[:3])
    with pytest.raises(mm.errors.NotFinite):
        pointing_game(heat / 0, masks)
