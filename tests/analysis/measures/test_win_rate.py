"""WinRate against a loop over pairs; the streaming metric and its pool against the whole."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

import mmhooks as mm
from mmhooks.analysis.measures.samples import hash_keys
from mmhooks.analysis.measures.win_rate import WinRate

from .conftest import FEATURES, M, N
from .loops import close, cos, mean, naive_top
from .streams import DIM, N_FEATURES, fed, streams


def test_win_rate_expectation_equals_the_loop(data):
    latents, x = data
    result = mm.win_rate(latents, x, m=M)
    pool = [cos(x, i, j) for i in range(N) for j in range(i + 1, N)]
    for k in range(FEATURES):
        top = naive_top(latents, k, M)
        # A top pair is itself in the pool: no win over itself, and rounding must not make it one.
        wins = [sum(cos(x, i, j) > p + 1e-7 for p in pool) / len(pool) for i in top for j in top if i < j]
        assert float(result.values[k]) == pytest.approx(mean(wins), abs=1.5 / len(pool), nan_ok=True)


@given(streams())
@settings(max_examples=40, deadline=None)
def test_win_rate(stream):
    image, _, vectors, bounds, sparse = stream
    result = fed(
        lambda: WinRate(N_FEATURES, DIM, m=5), bounds, image, vectors, sparse=sparse, start=True
    ).result()
    close(result.values, mm.win_rate(image.dense(), vectors, m=5).values)


def test_the_pool_is_a_uniform_draw_for_any_order():
    torch.manual_seed(0)
    latents, vectors = torch.rand(500, 3), torch.randn(500, 2)
    pools = []
    for order in (torch.arange(10), torch.randperm(10)):
        metric = WinRate(3, 2, m=2, pool=50)
        for i in order.tolist():
            metric.update(latents[50 * i : 50 * i + 50], vectors[50 * i : 50 * i + 50], start=50 * i)
        pools.append(metric.pool)
    assert torch.equal(*pools)
    numbers = pools[0][:, 1].long()
    assert len(numbers.unique()) == 50
    close(pools[0][:, 2:], torch.nn.functional.normalize(vectors[numbers], dim=1))
    keys = hash_keys(torch.arange(100_000), 0)
    assert float(keys.mean()) == pytest.approx(0.5, abs=0.005) and len(keys.unique()) == 100_000
    assert not torch.equal(keys, hash_keys(torch.arange(100_000), 1))
