"""Retrieval against a loop, ties, repeated captions, chance, and the intervals."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from scipy.stats import binomtest
from torch.nn.functional import cosine_similarity

import mmhooks as mm
from mmhooks.analysis.statistics.intervals import bootstrap, bootstrap_difference, wilson
from mmhooks.errors import NotFinite, ShapeMismatch


def naive_ranks(query, candidates, same):
    ranks = []
    for i in range(len(query)):
        scores = [float(cosine_similarity(query[i], c, dim=0)) for c in candidates]
        best = max(s for j, s in enumerate(scores) if same[j] == same[i])
        ranks.append(sum(s >= best and same[j] != same[i] for j, s in enumerate(scores)))
    return ranks


@pytest.mark.parametrize("labels", [list(range(30)), [i // 3 for i in range(30)]])
def test_equals_the_loop(labels):
    torch.manual_seed(0)
    text = torch.randn(30, 6)
    image = text + torch.randn(30, 6)
    same = None if len(set(labels)) == 30 else torch.tensor(labels)
    result = mm.retrieval(image, text, ks=(1, 5), same=same)
    assert result.image_ranks.tolist() == naive_ranks(image, text, labels)
    assert result.text_ranks.tolist() == naive_ranks(text, image, labels)
    hits = sum(r < 5 for r in naive_ranks(image, text, labels))
    assert result.image_to_text[5].value == hits / 30 and result.image_to_text[5].n == 30


def test_chance_is_the_share_of_draws_that_hold_a_right_one():
    same = torch.tensor([0, 0, 1, 2, 2, 2])
    result = mm.retrieval(torch.randn(6, 3), torch.randn(6, 3), ks=(1, 2, 9), same=same)
    for k in (1, 2):
        draws = list(itertools.combinations(range(6), k))
        expected = sum(any(same[j] == same[i] for j in d) for i in range(6) for d in draws) / len(draws) / 6
        assert result.chance[k] == pytest.approx(expected)
    assert result.chance[9] == pytest.approx(1)
    assert mm.retrieval(torch.randn(50, 3), torch.randn(50, 3)).chance[10] == 0.2


def test_a_collapsed_model_does_not_score():
    result = mm.retrieval(torch.ones(20, 4), torch.ones(20, 4))
    assert result.image_to_text[10].value == 0 and result.text_to_image[1].value == 0


def test_bad_input_is_named():
    with pytest.raises(
        ShapeMismatch, match=r"image embeddings of shape \(5, 3\) and text embeddings of shape \(5, 4\)"
    ):
        mm.retrieval(torch.randn(5, 3), torch.randn(5, 4))
    with pytest.raises(NotFinite, match="text embeddings"):
        mm.retrieval(torch.randn(5, 3), torch.full((5, 3), math.nan))
    with pytest.raises(ShapeMismatch, match="0 pairs"):
        mm.retrieval(torch.randn(0, 3), torch.randn(0, 3))


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (5, 20), (20, 20), (137, 600)])
def test_wilson_equals_scipy(hits, n):
    expected = binomtest(hits, n).proportion_ci(method="wilson")
    assert wilson(hits, n).low == pytest.approx(expected.low, abs=1e-9)
    assert wilson(hits, n).high == pytest.approx(expected.high, abs=1e-9)


def test_bootstrap_interval_is_that_of_a_mean():
    values = torch.randn(400, generator=torch.Generator().manual_seed(1)) * 2 + 5
    values[::10] = math.nan
    known = values[~values.isnan()]
    found = bootstrap(values, seed=2)
    half = 1.96 * float(known.std()) / math.sqrt(len(known))
    assert found.n == 360 and found.value == pytest.approx(float(known.mean()), abs=1e-5)
    assert found.high - found.low == pytest.approx(2 * half, rel=0.1)
    assert bootstrap(values, seed=2) == found != bootstrap(values, seed=3)
    difference = bootstrap_difference(known[:200], known[200:] + 1)
    assert difference.low < difference.value < difference.high < 0
    assert math.isnan(bootstrap(torch.tensor([1.0])).low) and bootstrap(torch.tensor([1.0])).n == 1


def test_a_row_of_zeros_finds_nothing_and_is_found_by_nobody():
    """What a mask leaves may be nothing: no error, and no luck by ties either."""
    image, text = torch.eye(4), torch.eye(4)
    image[1], text[2] = 0, 0
    found = mm.retrieval(image, text, ks=(1, 3))
    assert found.image_ranks.tolist() == [0, 3, 3, 0]
    assert found.text_ranks.tolist() == [0, 3, 3, 0]
    assert found.image_to_text[3].value == 0.5
