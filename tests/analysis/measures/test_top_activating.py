"""Top-activating samples against a sort by hand; the streaming metric against the whole."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mmhooks as mm
from mmhooks.analysis.measures.top_activating import VECTOR, TopSamples
from mmhooks.errors import ShapeMismatch

from .conftest import FEATURES, M
from .loops import naive_top
from .streams import DIM, N_FEATURES, ROWS, fed, streams


def test_top_activating_is_the_stable_sort_without_zeros(data):
    latents, _ = data
    result = mm.top_activating(latents, m=M)
    for k in range(FEATURES):
        expected = naive_top(latents, k, M)
        assert result.of(k).tolist() == expected and int(result.count[k]) == len(expected)
        assert result.values[k, : len(expected)].tolist() == [float(latents[i, k]) for i in expected]
    assert (result.indices[2] == -1).all() and (result.values[2] == 0).all()
    assert result.indices[3].tolist() == [7, -1, -1, -1]


def test_top_activating_settles_ties_by_position():
    latents = torch.randint(0, 3, (50, 20), generator=torch.Generator().manual_seed(1)).float()
    result = mm.top_activating(latents, m=30)
    for k in range(20):
        assert result.of(k).tolist() == naive_top(latents, k, 30)
    assert mm.top_activating(latents, m=80).indices.shape == (20, 80)  # more than there are samples
    assert mm.top_activating(-latents - 1, m=3).count.sum() == 0  # negative is not active
    with pytest.raises(ShapeMismatch, match="m: expected at least 1"):
        mm.top_activating(latents, m=0)


@given(streams(signed=True), st.integers(1, 6))
@settings(max_examples=80, deadline=None)
def test_top_samples(stream, m):
    image, _, vectors, bounds, sparse = stream
    dense = image.dense()
    metric = fed(
        lambda: TopSamples(N_FEATURES, m=m, width=DIM), bounds, image, vectors, sparse=sparse, start=True
    )
    result = metric.result()
    for k in range(N_FEATURES):
        expected = naive_top(dense, k, m)
        assert result.of(k).tolist() == expected
        assert result.values[k].tolist() == [float(dense[i, k]) for i in expected] + [0.0] * (
            m - len(expected)
        )
        assert torch.equal(metric.best[k, : len(expected), VECTOR:].float(), vectors[expected])
    assert int(result.count[N_FEATURES - 1]) == 0 and (result.indices[N_FEATURES - 1] == -1).all()
    assert result.n_samples == ROWS
    assert torch.equal(mm.top_activating(image, m=m).indices, mm.top_activating(dense, m=m).indices)


def naive_families(latents, feature: int, m: int, families) -> list[int]:
    kept: list[int] = []
    for row in naive_top(latents, feature, len(latents)):
        if all(families[row] != families[other] for other in kept):
            kept.append(row)
    return kept[:m]


@given(streams(signed=True), st.integers(1, 6), st.integers(1, 12), st.integers(0, 99))
@settings(max_examples=80, deadline=None)
def test_at_most_one_sample_per_family(stream, m, n_families, seed):
    image, _, vectors, bounds, sparse = stream
    dense = image.dense()
    families = torch.randint(0, n_families, (ROWS,), generator=torch.Generator().manual_seed(seed))
    metrics = [TopSamples(N_FEATURES, m=m, width=DIM, by_family=True) for _ in range(2)]
    for number, (begin, end) in enumerate(bounds):
        rows = slice(begin, end)
        metrics[number % 2].update(
            image[rows] if sparse else dense[rows], vectors[rows], start=begin, families=families[rows]
        )
    metrics[0].merge_state(metrics[1])
    whole = mm.top_activating(dense, m=m, families=families)
    for result in (metrics[0].result(), whole, mm.top_activating(image, m=m, families=families)):
        for k in range(N_FEATURES):
            assert result.of(k).tolist() == naive_families(dense, k, m, families)
    for k in range(N_FEATURES):
        expected = whole.of(k)
        assert torch.equal(metrics[0].best[k, : len(expected), VECTOR:].float(), vectors[expected])


def test_families_that_do_not_fit_are_refused():
    latents = torch.rand(6, 2)
    with pytest.raises(ShapeMismatch, match="families: expected one label for each of 6 samples, got 5"):
        mm.top_activating(latents, families=torch.zeros(5, dtype=torch.long))
    with pytest.raises(ShapeMismatch, match="families: expected one label per sample, got none"):
        TopSamples(2, m=2, by_family=True).update(latents)
    with pytest.raises(ShapeMismatch, match="families: expected none, got 6"):
        TopSamples(2, m=2).update(latents, families=torch.arange(6))
