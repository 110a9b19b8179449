"""MonoSemanticity against a loop over pairs, and contrasts of groups against their random control."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings

import mmhooks as mm
from mmhooks.analysis.measures.monosemanticity import (
    MonoSemanticity,
    monosemanticity,
    textual_monosemanticity,
    visual_monosemanticity,
)
from mmhooks.errors import WrongHead
from mmhooks.hooks.features import FeatureSet

from .conftest import FEATURES, N
from .loops import close, cos, naive_monosemanticity
from .streams import DIM, N_FEATURES, fed, streams


def test_monosemanticity_equals_the_loop(data):
    latents, x = data
    latents = latents - 0.3  # min-max scaling takes the offset out again
    result = monosemanticity(latents, x)
    for k in range(FEATURES):
        z = latents[:, k].double()
        if z.max() == z.min():
            assert result.values[k].isnan()
            continue
        a = ((z - z.min()) / (z.max() - z.min())).tolist()
        pairs = [(a[i] * a[j], cos(x, i, j)) for i in range(N) for j in range(i + 1, N)]
        weight = sum(w for w, _ in pairs)
        expected = sum(w * c for w, c in pairs) / weight if weight > 1e-9 else math.nan
        assert float(result.values[k]) == pytest.approx(expected, abs=1e-5, nan_ok=True), k


def test_group_contrasts_and_their_random_control():
    torch.manual_seed(6)
    latents = torch.rand(60, 100)
    x = torch.randn(60, 4)
    sim = mm.embed_sim(latents, x, m=5, kind="difference")
    order = sim.values.argsort(descending=True)
    imgd, textd = FeatureSet(order[:20], 100, name="ImgD"), FeatureSet(order[-10:], 100, name="TextD")
    visual = visual_monosemanticity(sim, imgd, textd)
    expected = float(sim.values[imgd.indices].mean() - sim.values[textd.indices].mean())
    assert visual.estimate.value == pytest.approx(expected, abs=1e-6)
    assert visual.estimate.low < expected < visual.estimate.high and visual.estimate.n == 30
    textual = textual_monosemanticity(sim, imgd, textd)
    assert textual.estimate.value == pytest.approx(-expected, abs=1e-6)
    assert visual.beats_control and visual.control.low < 0 < visual.control.high and visual.control.n == 200
    mixed = FeatureSet(range(20), 100), FeatureSet(range(20, 30), 100)
    assert not visual_monosemanticity(sim, *mixed).beats_control
    assert visual.table()[0]["contrast"] == "ImgD − TextD"
    with pytest.raises(WrongHead):
        visual_monosemanticity(sim, FeatureSet([1], 50), textd)
    empty = visual_monosemanticity(sim, FeatureSet([], 100, name="ImgD"), textd)
    assert math.isnan(empty.estimate.value) and empty.control.n == 0


@given(streams(signed=True))
@settings(max_examples=30, deadline=None)
def test_monosemanticity(stream):
    image, _, vectors, bounds, sparse = stream
    metric = fed(lambda: MonoSemanticity(N_FEATURES, DIM), bounds, image, vectors, sparse=sparse)
    close(metric.result().values, naive_monosemanticity(image.dense(), vectors), 1e-4)


def test_monosemanticity_keeps_its_digits_far_from_zero():
    torch.manual_seed(1)
    latents, vectors = torch.rand(30, 4), torch.randn(30, 3)
    moved = latents + torch.tensor([0.0, 10.0, -50.0, 0.0])
    close(monosemanticity(moved, vectors).values, naive_monosemanticity(moved, vectors), 1e-4)
    assert monosemanticity(torch.ones(9, 2), torch.randn(9, 3)).values.isnan().all()
