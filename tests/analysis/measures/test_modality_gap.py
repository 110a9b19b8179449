"""The modality gap against means by hand, from whole tables and streamed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from torch.nn.functional import cosine_similarity

from mmhooks.analysis.measures.modality_gap import ModalityMeans, modality_gap

from .conftest import D, N
from .loops import close, mean
from .streams import DIM, ROWS, fed, streams


def test_modality_gap_equals_the_loop(data):
    _, x = data
    y = torch.randn(N, D) * 3
    unit = [v / v.norm(dim=1, keepdim=True) for v in (x, y)]
    gap = modality_gap(x, y)
    expected = float((unit[0].mean(0) - unit[1].mean(0)).norm())
    assert gap.gap.value == pytest.approx(expected, abs=1e-6) and gap.gap.low < gap.gap.high
    assert gap.pair_cosine.value == pytest.approx(mean(cos_pair(x, y)), abs=1e-6)


def cos_pair(x, y):
    return [float(cosine_similarity(a, b, dim=0)) for a, b in zip(x, y, strict=True)]


@given(streams())
@settings(max_examples=30, deadline=None)
def test_modality_means(stream):
    _, _, vectors, bounds, _ = stream
    other = vectors.roll(1, 0) - 1.2
    metric = fed(lambda: ModalityMeans(DIM), bounds, vectors, other, sparse=True)
    whole = modality_gap(vectors, other)
    close(metric.result().gap.value, whole.gap.value)
    cosines = [float(cosine_similarity(a, b, dim=0)) for a, b in zip(vectors, other, strict=True)]
    close(metric.result().pair_cosine.value, sum(cosines) / ROWS)
