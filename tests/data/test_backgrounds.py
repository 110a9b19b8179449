"""Synthetic backgrounds: reproducible from their seed, and drawings put on them with exact masks."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from mmhooks.data.synthetic import backgrounds


@pytest.mark.parametrize("kind", backgrounds.BACKGROUNDS)
def test_backgrounds_follow_their_seed(kind):
    one, same, other = (np.asarray(backgrounds.draw_background(kind, 32, seed)) for seed in (1, 1, 2))
    assert one.shape == (32, 32, 3) and (one == same).all() and (one != other).mean() > 0.1


def test_a_drawing_covers_its_background_exactly_where_its_mask_is():
    red = Image.new("RGBA", (10, 10), (255, 0, 0, 255))
    image, mask = backgrounds.paste_on(red, Image.new("RGB", (40, 40), "blue"), scale=0.5, at=(1.0, 0.0))
    assert mask.sum() == 400 and mask[:20, 20:].all()
    assert ((np.asarray(image)[..., 0] == 255) == mask).all()
