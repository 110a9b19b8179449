"""Density and L0 against counting by hand, from a whole table and streamed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from mmhooks.analysis.measures.density import FeatureDensity, density

from .conftest import FEATURES, N
from .loops import mean
from .streams import N_FEATURES, ROWS, fed, streams


def test_density_equals_the_loop(data):
    latents, _ = data
    d = density(latents)
    assert d.values.tolist() == [sum(float(v) != 0 for v in latents[:, k]) / N for k in range(FEATURES)]
    assert d.dead == pytest.approx(1 / FEATURES)
    assert d.l0.value == pytest.approx(mean(sum(float(v) != 0 for v in row) for row in latents))


@given(streams(signed=True))
@settings(max_examples=40, deadline=None)
def test_density_and_l0(stream):
    image, _, _, bounds, sparse = stream
    result = fed(lambda: FeatureDensity(N_FEATURES), bounds, image, sparse=sparse).result()
    table = image.dense().tolist()
    for k in range(N_FEATURES):
        assert float(result.values[k]) == pytest.approx(sum(row[k] != 0 for row in table) / ROWS)
    l0 = [sum(x != 0 for x in row) for row in table]
    assert result.l0.value == pytest.approx(sum(l0) / ROWS) and result.l0.n == ROWS
    assert result.dead == pytest.approx(
        sum(all(row[k] == 0 for row in table) for k in range(N_FEATURES)) / N_FEATURES
    )
    edges, counts = result.histogram()
    alive = [v for v in result.values.tolist() if v > 0]
    for i, count in enumerate(counts):
        last = i == len(counts) - 1
        assert count == sum(
            edges[i] * (1 - 1e-9) <= v < edges[i + 1] * (1 - 1e-9) or (last and v > 0.999) for v in alive
        )
    assert sum(counts) == len(alive)


def test_l0_interval_is_that_of_the_samples():
    torch.manual_seed(2)
    latents = (torch.rand(400, 12) < torch.rand(400, 1)).float()
    l0 = (latents != 0).sum(1).double()
    found = density(latents).l0
    half = 1.96 * float(l0.std()) / 20
    assert found.low == pytest.approx(float(l0.mean()) - half, abs=0.15 * half)
    assert found.high == pytest.approx(float(l0.mean()) + half, abs=0.15 * half)
