"""Bridge scores against a loop over pairs of features."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from torch.nn.functional import cosine_similarity

from mmhooks.analysis.measures.bridges import Bridge
from mmhooks.errors import ShapeMismatch, WrongHead

from .loops import close
from .streams import DIM, N_FEATURES, ROWS, fed, streams


@given(streams(signed=True))
@settings(max_examples=30, deadline=None)
def test_bridge(stream):
    image, text, _, bounds, sparse = stream
    metric = fed(lambda: Bridge(N_FEATURES), bounds, image, text, sparse=sparse)
    a, b = image.dense().tolist(), text.dense().tolist()
    decoder = torch.randn(N_FEATURES, DIM, generator=torch.Generator().manual_seed(0))
    result = metric.result(decoder)
    scores = {}
    for i in range(N_FEATURES):
        for j in range(N_FEATURES):
            together = sum(a[r][i] * b[r][j] for r in range(ROWS)) / ROWS
            close(metric.compute()["together"][i, j], together, 1e-5)
            scores[i, j] = together * float(
                cosine_similarity(decoder[i].double(), decoder[j].double(), dim=0)
            )
    for i in range(N_FEATURES):
        close(result.own[i], scores[i, i], 1e-5)
        best = max(scores[i, j] for j in range(N_FEATURES) if j != i)
        close(result.partner_score[i], max(best, 0), 1e-5)
        assert int(result.partner[i]) == -1 or scores[i, int(result.partner[i])] == pytest.approx(
            best, abs=1e-5
        )
    mass = sum(max(s, 0) for s in scores.values())
    outside = sum(max(s, 0) for (i, j), s in scores.items() if i != j)
    close(result.off_diagonal, outside / mass if mass else 0.0, 1e-4)
    assert [p[2] for p in result.strongest] == sorted((p[2] for p in result.strongest), reverse=True)
    with pytest.raises(WrongHead, match="decoder of 7 rows, one per feature, got 6"):
        metric.result(decoder[:6])
    with pytest.raises(ShapeMismatch, match=r"got 20000, which take 3\.2 GB"):
        Bridge(20_000)
