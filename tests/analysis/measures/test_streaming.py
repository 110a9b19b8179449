"""What all streaming metrics share: bad batches change nothing, and half precision of a store."""

from __future__ import annotations

import math

import pytest
import torch

import mmhooks as mm
from mmhooks.analysis.measures.bridges import Bridge
from mmhooks.analysis.measures.density import FeatureDensity, density
from mmhooks.analysis.measures.embed_sim import EmbedSim
from mmhooks.analysis.measures.mds import MDS
from mmhooks.analysis.measures.monosemanticity import MonoSemanticity, monosemanticity
from mmhooks.analysis.measures.top_activating import TopSamples
from mmhooks.data.sparse_rows import SparseRows
from mmhooks.errors import NotFinite, ShapeMismatch

from .loops import close


def test_bad_batches_are_named_and_change_nothing():
    good = SparseRows(torch.ones(4, 2), torch.tensor([[0, 1]] * 4), 5)
    bad = SparseRows(torch.tensor([[1.0, 1.0], [1.0, math.nan]]), torch.tensor([[0, 1], [0, 3]]), 5)
    outside = SparseRows(torch.ones(1, 1), torch.tensor([[5]]), 5)
    vectors = torch.randn(4, 3)
    metrics = {
        "mds": (MDS(5), (good, good)),
        "top": (TopSamples(5), (good,)),
        "density": (FeatureDensity(5), (good,)),
        "ms": (MonoSemanticity(5, 3), (good, vectors)),
        "sim": (EmbedSim(5, 3, m=2), (good, vectors)),
        "bridge": (Bridge(5), (good, good)),
    }
    for metric, inputs in metrics.values():
        metric.update(*inputs)
        before = {name: value.clone() for name, value in metric.metric_state.items()}
        rest = [x[:2] if isinstance(x, torch.Tensor) else bad for x in inputs]
        with pytest.raises(NotFinite, match="row 5, feature 3"):
            metric.update(*rest)
        with pytest.raises(ShapeMismatch, match="features 0 to 4, got 5 to 5"):
            metric.update(*(x[:1] if isinstance(x, torch.Tensor) else outside for x in inputs))
        with pytest.raises(ShapeMismatch, match="expected 5 features, got 6"):
            wide = SparseRows(good.values, good.indices, 6)
            metric.update(*(x if isinstance(x, torch.Tensor) else wide for x in inputs))
        assert all(torch.equal(before[name], value) for name, value in metric.metric_state.items())
    with pytest.raises(ShapeMismatch, match="expected the samples' embeddings"):
        metrics["sim"][0].update(good)
    with pytest.raises(ShapeMismatch, match=r"expected 0 numbers for each of 4 samples, got shape \(4, 3\)"):
        metrics["top"][0].update(good, vectors)
    with pytest.raises(NotFinite):
        metrics["ms"][0].update(good, vectors * math.nan)
    with pytest.raises(
        ShapeMismatch, match=r"embeddings: expected shape \(4, 3\), one vector per sample, got \(4, 2\)"
    ):
        metrics["ms"][0].update(good, vectors[:, :2])


def test_half_precision_and_small_indices_of_a_store():
    torch.manual_seed(4)
    values = torch.rand(50, 3)
    indices = torch.rand(50, 9).argsort(1)[:, :3]
    for dtype in (torch.float16, torch.bfloat16):
        rows = SparseRows(values.to(dtype), indices.short(), 9)
        exact = rows.values.float()
        whole = SparseRows(exact, indices, 9)
        close(
            mm.mds(rows, rows[torch.arange(49, -1, -1)]).R, mm.mds(whole, whole[torch.arange(49, -1, -1)]).R
        )
        assert torch.equal(mm.top_activating(rows, 4).indices, mm.top_activating(whole.dense(), 4).indices)
        assert torch.equal(density(rows).values, density(whole).values)
        metric, vectors = MonoSemanticity(9, 5), torch.randn(50, 5)
        metric.update(rows, vectors)
        close(metric.result().values, monosemanticity(whole.dense(), vectors).values)
