"""EmbedSim against a loop over pairs; the streaming metric against the whole."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cosine_similarity

import mmhooks as mm
from mmhooks.analysis.measures.embed_sim import EmbedSim

from .conftest import FEATURES, M
from .loops import close, cos, mean, naive_pool, naive_top
from .streams import DIM, N_FEATURES, fed, streams


def test_embed_sim_equals_the_loop(data):
    latents, x = data
    result = mm.embed_sim(latents, x, m=M)
    s_minus = naive_pool(x)
    assert result.s_minus == pytest.approx(s_minus, abs=1e-6)
    for k in range(FEATURES):
        top = naive_top(latents, k, M)
        s_plus = mean(cos(x, i, j) for i in top for j in top if i != j)
        for form, expected in (
            ("primary", (s_plus - s_minus) / abs(s_minus)),
            ("difference", s_plus - s_minus),
        ):
            value = float(mm.embed_sim(latents, x, m=M, kind=form).values[k])
            assert value == pytest.approx(expected, abs=2e-5, nan_ok=True), (form, k)
    known = result.values[~result.values.isnan()]
    assert (
        result.estimate.value == pytest.approx(float(known.mean()), abs=1e-5)
        and result.estimate.n == len(known) == 4
    )
    assert result.estimate.low < result.estimate.value < result.estimate.high
    # The mean of relative gaps is the relative gap of the means: S- is shared.
    s = result.s_plus[~result.s_plus.isnan()].mean()
    assert result.estimate.value == pytest.approx((float(s) - s_minus) / abs(s_minus), abs=1e-4)


def test_pool_and_seed(data):
    latents, x = data
    assert mm.embed_sim(latents, x, m=M, pool=10, seed=1).pool == 10
    assert (
        mm.embed_sim(latents, x, m=M, pool=10, seed=1).s_minus
        == mm.embed_sim(latents, x, m=M, pool=10, seed=1).s_minus
    )
    assert (
        mm.embed_sim(latents, x, m=M, pool=10, seed=1).s_minus
        != mm.embed_sim(latents, x, m=M, pool=10, seed=2).s_minus
    )
    strict = mm.embed_sim(latents, x, m=M, min_samples=M)
    assert strict.values[4].isnan() and not mm.embed_sim(latents, x, m=M).values[4].isnan()


@given(streams(), st.sampled_from(["primary", "difference", "paper"]))
@settings(max_examples=40, deadline=None)
def test_embed_sim(stream, kind):
    image, _, vectors, bounds, sparse = stream
    make = lambda: EmbedSim(N_FEATURES, DIM, m=5, kind=kind, seed=2)  # noqa: E731
    result = fed(make, bounds, image, vectors, sparse=sparse, start=True).result()
    whole = mm.embed_sim(image.dense(), vectors, m=5, kind=kind, seed=2)
    close(result.s_minus, whole.s_minus)
    close(result.s_plus, whole.s_plus)
    assert torch.equal(result.counts, whole.counts)
    if kind != "paper":  # the paper's own draws come from the pool, in its order
        close(result.values, whole.values, 1e-4)
    dense = image.dense()
    for k in range(N_FEATURES):
        top = naive_top(dense, k, 5)
        pairs = [(i, j) for i in top for j in top if i < j]
        cosines = [float(cosine_similarity(vectors[i], vectors[j], dim=0)) for i, j in pairs]
        close(result.s_plus[k], sum(cosines) / len(cosines) if cosines else math.nan, 1e-5)
