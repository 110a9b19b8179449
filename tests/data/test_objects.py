import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmhooks.data.synthetic.objects import Placement, draw_into, to_layers
from mmhooks.errors import MMHooksError


def square():
    rgba = torch.zeros(16, 16, 4, dtype=torch.uint8)
    rgba[4:12, 2:14] = torch.tensor([255, 0, 0, 255], dtype=torch.uint8)
    return rgba


def test_a_thing_is_cut_to_its_ink_and_premultiplied():
    rgba = square()
    rgba[4, 2] = torch.tensor([200, 100, 50, 128], dtype=torch.uint8)
    thing = to_layers(rgba)
    assert thing.shape == (4, 8, 12)
    assert thing[:, 0, 0] * 255 == pytest.approx(torch.tensor([200, 100, 50, 255]) * 128 / 255, abs=0.1)


@settings(max_examples=30, deadline=None)
@given(st.floats(0.2, 0.9), st.floats(0.45, 0.55), st.floats(0.0, 1.0))
def test_only_the_box_changes_and_mixes_by_opacity(size, x, opacity):
    picture = torch.full((3, 40, 60), 0.5)
    before = picture.clone()
    made = draw_into(picture, to_layers(square()), Placement(size, (x, 0.5), opacity))
    assert torch.equal(picture, before)  # a copy
    wide, tall = round(size * 40), max(1, round(size * 40 * 8 / 12))
    changed = (made - picture).abs().sum(0) > 1e-6
    assert int(changed.sum()) in (0, wide * tall) if opacity else not changed.any()
    assert float(made[0].max()) == pytest.approx(0.5 + 0.5 * opacity, abs=1e-5)


def test_what_does_not_fit_is_named():
    with pytest.raises(MMHooksError, match="does not fit into"):
        draw_into(torch.zeros(3, 32, 32), to_layers(square()), Placement(0.9, (0.1, 0.5)))
    with pytest.raises(MMHooksError, match="transparent"):
        to_layers(torch.zeros(4, 4, 4, dtype=torch.uint8))
