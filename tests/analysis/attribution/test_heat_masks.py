"""Expanded heat and its overlap with masks against DAAM's public code, written out map by map."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from mmhooks.analysis.attribution.heat_masks import expand_as, heat_overlap
from mmhooks.errors import NotFinite, ShapeMismatch


def public_expand(heat, size, absolute, threshold):
    """``WordHeatMap.expand_as``; there width and height are exchanged, which only square images do not show."""
    im = F.interpolate(heat[None, None].float(), size=size, mode="bicubic")
    if not absolute:
        im = (im - im.min()) / (im.max() - im.min() + 1e-8)
    if threshold:
        im = (im > threshold).float()
    return im.squeeze()


@pytest.mark.parametrize("absolute", [True, False])
@pytest.mark.parametrize("threshold", [None, 0.02, 0.5])
def test_equals_the_public_code(absolute, threshold):
    scale = torch.tensor([1, 0.1, 2, 3, 0.01])[:, None, None]
    heat = scale * torch.rand(5, 8, 8, generator=torch.Generator().manual_seed(0))
    masks = torch.rand(5, 24, 40, generator=torch.Generator().manual_seed(1)) > 0.6
    image = Image.new("RGB", (40, 24))
    found = expand_as(heat, image, absolute=absolute, threshold=threshold)
    expected = torch.stack([public_expand(h, (24, 40), absolute, threshold) for h in heat])
    torch.testing.assert_close(found, expected)
    assert torch.equal(found, expand_as(heat, (24, 40), absolute=absolute, threshold=threshold))
    if threshold is None:
        return
    overlap = heat_overlap(heat, masks, absolute=absolute, threshold=threshold)
    for n in range(5):
        a, b = expected[n], masks[n].float()
        intersection = (a * b).sum()
        union = a.sum() + b.sum() - intersection
        assert float(overlap.ious[n]) == pytest.approx(float(intersection / (union + 1e-8)), abs=1e-6)
    assert overlap.iou.value == pytest.approx(float(overlap.ious.mean())) and overlap.iou.n == 5
    assert overlap.area == pytest.approx(float(expected.mean()))
    assert overlap.chance == pytest.approx(float(masks.float().mean()))
    assert overlap.table()[0]["threshold"] == threshold


def test_a_perfect_map_and_an_absolute_threshold_that_nothing_reaches():
    masks = torch.zeros(3, 16, 16, dtype=torch.bool)
    masks[:, 4:12, 4:12] = True
    perfect = heat_overlap(masks.float(), masks, threshold=0.5)
    assert perfect.iou.value == 1 and perfect.iou.low == 1
    low = heat_overlap(masks.float() * 0.3, masks, threshold=0.5, absolute=True)
    assert low.iou.value == 0 and low.area == 0
    assert heat_overlap(masks.float() * 0.3, masks, threshold=0.5).iou.value == 1  # of its own range


def test_wrong_input_is_named():
    heat, masks = torch.rand(2, 4, 4), torch.ones(2, 8, 8, dtype=torch.bool)
    with pytest.raises(ShapeMismatch, match="2 maps and 1 masks"):
        heat_overlap(heat, masks[:1])
    masks[1] = False
    with pytest.raises(ShapeMismatch, match="got none in mask 1"):
        heat_overlap(heat, masks)
    with pytest.raises(ShapeMismatch, match="expected a PIL image, or height and width, got a int"):
        expand_as(heat, 8)
    with pytest.raises(ShapeMismatch, match="expected height and width"):
        expand_as(heat, (8, 8, 3))
    with pytest.raises(NotFinite):
        expand_as(heat / 0, (8, 8))
