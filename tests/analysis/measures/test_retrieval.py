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


def naive_multi_caption_ranks(image_of, image, text):
    """COCO's task by loops: images counted once, the best of an image's captions decides."""
    first = {number: row for row, number in reversed(list(enumerate(image_of)))}
    score = {
        (number, j): float(cosine_similarity(image[row], text[j], dim=0))
        for number, row in first.items()
        for j in range(len(text))
    }
    forward = []
    for number in sorted(first):
        best = max(score[number, j] for j in range(len(text)) if image_of[j] == number)
        forward.append(sum(score[number, j] >= best and image_of[j] != number for j in range(len(text))))
    backward = [
        sum(score[number, j] >= score[image_of[j], j] and number != image_of[j] for number in first)
        for j in range(len(text))
    ]
    return forward, backward


@pytest.mark.parametrize("image_of", [[i // 5 for i in range(40)], [2, 0, 2, 1, 1, 2, 3, 0], list(range(9))])
def test_every_caption_of_an_image_is_right_and_an_image_counts_once(image_of):
    torch.manual_seed(1)
    image = torch.randn(max(image_of) + 1, 5)[torch.tensor(image_of)]
    text = image + 2 * torch.randn(len(image_of), 5)
    found = mm.retrieval(image, text, ks=(1, 2, 3), images=torch.tensor(image_of))
    forward, backward = naive_multi_caption_ranks(image_of, image, text)
    assert found.image_ranks.tolist() == forward and found.text_ranks.tolist() == backward
    m, n = max(image_of) + 1, len(image_of)
    assert found.image_to_text[1].n == m and found.text_to_image[1].n == n == found.n
    for k in (1, 2, 3):
        assert found.text_to_image_chance[k] == pytest.approx(k / m)
        draws = list(itertools.combinations(image_of, k))
        expected = sum(i in draw for i in range(m) for draw in draws) / len(draws) / m
        assert found.chance[k] == pytest.approx(expected)
    chances = [row["chance"] for row in found.table() if row["direction"] == "text to image"]
    assert chances == [found.text_to_image_chance[k] for k in (1, 2, 3)]


def test_rows_of_one_image_must_agree():
    image = torch.eye(4)
    numbers = torch.tensor([0, 0, 1, 2])
    with pytest.raises(ShapeMismatch, match=r"got row 1 of image 0 at a distance of 1\.41 from row 0"):
        mm.retrieval(image, image, images=numbers)
    with pytest.raises(ShapeMismatch, match="got both"):
        mm.retrieval(image, image, images=numbers, same=numbers)
    with pytest.raises(ShapeMismatch, match="3 labels"):
        mm.retrieval(image, image, images=numbers[:3])
