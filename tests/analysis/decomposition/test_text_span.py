"""TextSpan against the algorithm step by step; moments; reconstruction; overlap; labels; pools."""

from __future__ import annotations

import json

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

import mmhooks as mm
from mmhooks.analysis.decomposition.head_labels import HeadLabels
from mmhooks.analysis.decomposition.head_moments import HeadMoments, merged
from mmhooks.analysis.decomposition.text_span_checks import (
    half_overlap,
    reconstruction_accuracy,
    span_overlap,
    subset_overlap,
)
from mmhooks.errors import DataError, MMHooksError, NotFinite, ShapeMismatch
from mmhooks.models.clip.embed_texts import embed_texts


def naive(data, pool, n_texts, rank, selection="unit"):
    """Runs the paper's algorithm literally: SVD, projection of the pool, then deflation of all data and all texts."""
    data, pool = data.double().numpy(), pool.double().numpy()
    _, values, vh = np.linalg.svd(data, full_matrices=False)
    vh = vh[: min(rank, int((values > 1e-5 * values[0]).sum()))]
    pool = pool @ vh.T @ vh
    data = data - data.mean(0)
    chosen = []
    for _ in range(n_texts):
        lengths = np.linalg.norm(pool, axis=1) if selection == "unit" else np.ones(len(pool))
        lengths[chosen] = np.inf  # nothing but rounding is left of them
        spread = (data @ pool.T / lengths).std(0)
        best = int(spread.argmax())
        chosen.append(best)
        u = pool[best] / np.linalg.norm(pool[best])
        data = data - np.outer(data @ u, u)
        pool = pool - np.outer(pool @ u, u)
    return chosen


def sample(n, d, t, width, seed):
    """Outputs of a head of this width, away from 0, with directions of different strength; texts of different length."""
    g = torch.Generator().manual_seed(seed)
    strength = torch.linspace(3, 0.2, width)
    outputs = (torch.randn(n, width, generator=g) * strength) @ torch.randn(width, d, generator=g)
    texts = torch.randn(t, d, generator=g) * (0.5 + torch.rand(t, 1, generator=g))
    return outputs + 5 * torch.randn(d, generator=g), texts


def names(n):
    return [f"text {i}" for i in range(n)]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    width=st.integers(6, 24),
    rank=st.integers(6, 80),
    selection=st.sampled_from(["unit", "paper"]),
)
def test_same_texts_in_the_same_order(seed, width, rank, selection):
    outputs, pool = sample(90, 32, 120, width, seed)
    k = min(5, rank, width)
    found = mm.text_span(outputs, pool, names(120), n_texts=k, rank=rank, selection=selection)
    assert list(found.indices[0]) == naive(outputs, pool, k, rank, selection)
    assert found.texts[0] == tuple(f"text {i}" for i in found.indices[0])


@pytest.mark.parametrize("selection", ["unit", "paper"])
def test_twenty_texts_of_a_wide_pool(selection):
    outputs, pool = sample(2000, 128, 1500, 64, 0)
    found = mm.text_span(outputs, pool, names(1500), selection=selection)
    assert list(found.indices[0]) == naive(outputs, pool, 20, 80, selection)
    assert found.rank == (65,)  # the head's width, and its mean: not the 80 that were allowed


def test_the_two_selections_differ_by_the_length_of_texts():
    outputs, pool = sample(300, 16, 50, 8, 1)
    long = pool.clone()
    long[7] *= 1000
    unit = [mm.text_span(outputs, p, names(50), n_texts=4).indices for p in (pool, long)]
    assert unit[0] == unit[1]
    assert mm.text_span(outputs, long, names(50), n_texts=4, selection="paper").indices[0][0] == 7


def test_several_heads_at_once_and_in_batches():
    both = torch.stack([sample(300, 24, 80, 10, s)[0] for s in (0, 1)], 1)
    pool = sample(300, 24, 80, 10, 0)[1]
    together = mm.text_span(both, pool, names(80), n_texts=6, heads=["3.0", "3.1"])
    moments = HeadMoments(2, 24)
    for part in both.split(77):
        moments.update(part)
    streamed = mm.text_span(moments, pool, names(80), n_texts=6, heads=["3.0", "3.1"])
    assert streamed.indices == together.indices and streamed.n_samples == 300
    for h in range(2):
        assert together.indices[h] == mm.text_span(both[:, h], pool, names(80), n_texts=6).indices[0]


def test_moments_against_numpy_and_merged_parts():
    outputs = torch.randn(200, 3, 5) + 10
    parts = [HeadMoments(3, 5), HeadMoments(3, 5)]
    parts[0].update(outputs[:60])
    parts[1].update(outputs[60:])
    state = merged(parts).compute()
    for h in range(3):
        expected = np.cov(outputs[:, h].double().numpy().T, bias=True)
        assert np.allclose(state["covariance"][h].numpy(), expected, atol=1e-12)
    assert int(parts[0].n_samples) == 60
    with pytest.raises(ShapeMismatch, match="same heads and width"):
        merged([parts[0], HeadMoments(2, 5)])
    parts[0].reset()
    assert int(parts[0].n_samples) == 0 and float(parts[0].second.abs().max()) == 0


def test_explained_is_the_share_of_variance_kept_by_reconstruction():
    outputs, pool = sample(400, 24, 60, 12, 2)
    found = mm.text_span(outputs, pool, names(60), n_texts=8)
    centred = outputs - outputs.mean(0)
    assert found.explained[0] == tuple(sorted(found.explained[0]))
    assert found.variance[0] == pytest.approx(float(centred.square().sum(1).mean()), rel=1e-5)
    for k in (1, 4, 8):
        rebuilt = found.reconstruct(outputs[:, None], k)[:, 0]
        left = (outputs - rebuilt).square().sum() / centred.square().sum()
        assert 1 - float(left) == pytest.approx(found.explained[0][k - 1], abs=1e-5)
    assert torch.allclose(found.reconstruct(outputs[:, None], 0)[:, 0], outputs.mean(0), atol=1e-4)
    assert torch.allclose(found.bases[0] @ found.bases[0].T, torch.eye(8), atol=1e-5)


def test_a_head_with_few_directions_gets_few_texts():
    outputs = torch.randn(50, 2) @ torch.randn(2, 10)
    found = mm.text_span(outputs, torch.randn(40, 10), names(40), n_texts=8)
    assert len(found.texts[0]) == 2 and found.explained[0][-1] == pytest.approx(1)
    still = mm.text_span(torch.ones(50, 10), torch.randn(40, 10), names(40), n_texts=8)
    assert still.texts == ((),) and str(still.table())


def test_reconstruction_accuracy_goes_from_ablation_to_all():
    torch.manual_seed(0)
    classes = torch.eye(6)
    labels = torch.randint(6, (300,))
    outputs = torch.stack([3 * classes[labels], torch.randn(300, 6) * 0.1], 1)
    span = mm.text_span(outputs, classes, [f"class {i}" for i in range(6)], n_texts=6)
    found = reconstruction_accuracy(span, outputs, torch.zeros(300, 6), classes, labels, n_texts=[0, 2, 6])
    assert found.by_texts[0].value < 0.4 < found.by_texts[2].value < 1
    assert found.by_texts[6].value == found.full.value == 1 and found.full.n == 300
    assert [row["heads rebuilt from"] for row in found.table()][-1] == "all of each head"
    with pytest.raises(ShapeMismatch, match=r"expected 0\.\.5, got 0\.\.6"):
        reconstruction_accuracy(
            span, outputs, torch.zeros(300, 6), classes, labels.clone().index_fill_(0, torch.tensor([0]), 6)
        )


def test_overlap_of_subsets_lies_between_chance_and_one():
    outputs, pool = sample(600, 16, 200, 10, 3)
    strong = torch.stack([outputs, torch.randn(600, 16)], 1)
    found = subset_overlap(strong, pool, names(200), n_texts=5, subsets=4)
    assert found.texts[0] > found.texts_chance[0] == pytest.approx(5 / 200)
    assert found.texts[0] > found.texts[1]  # noise has no texts of its own
    same = mm.text_span(strong, pool, names(200), n_texts=5)
    twice = span_overlap([same, same])
    assert twice.texts == (1, 1) and twice.first == (1, 1) and twice.space[0] == pytest.approx(1)
    again = subset_overlap(strong, pool, names(200), n_texts=5, subsets=4)
    assert again == found
    with pytest.raises(ShapeMismatch, match="different heads or pools"):
        span_overlap([same, mm.text_span(strong, pool[:100], names(100), n_texts=5)])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"text_embeddings": torch.randn(5, 7)}, ShapeMismatch, "width 4, as the head outputs have, got 7"),
        ({"texts": ["one"]}, ShapeMismatch, "1 texts but 5 text embeddings"),
        ({"n_texts": 9}, ShapeMismatch, r"n_texts in 1\.\.5"),
        ({"rank": 0}, ShapeMismatch, "rank of at least 1"),
        ({"head_outputs": torch.full((9, 4), torch.nan)}, NotFinite, "head outputs"),
        ({"text_embeddings": torch.full((5, 4), torch.inf)}, NotFinite, "text embeddings"),
        ({"head_outputs": torch.randn(1, 4)}, ShapeMismatch, "at least 2 images, got 1"),
        ({"heads": ["a", "b"]}, ShapeMismatch, "each of 1 heads, got 2"),
    ],
)
def test_bad_input_is_named(change, error, message):
    arguments = {"head_outputs": torch.randn(9, 4), "text_embeddings": torch.randn(5, 4), "texts": names(5)}
    with pytest.raises(error, match=message):
        mm.text_span(**{**arguments, "n_texts": 2, **change})


def test_labels_as_a_file(tmp_path):
    outputs = torch.stack([torch.randn(90, 4) * torch.tensor(s) for s in ([9.0, 1, 1, 1], [1.0, 1, 9, 1])], 1)
    found = mm.text_span(
        outputs, torch.eye(4), ["red", "blue", "a beach", "a lake"], n_texts=1, heads=["5.0", "5.1"]
    )
    labels = found.labels(model="mini", pool="own", kinds=["colour", "colour", "place", "place"])
    assert labels.of_kind("place") == ["5.1"] and labels.share("colour") == {"5.0": 1, "5.1": 0}
    assert HeadLabels.load(labels.save(tmp_path / "labels.json")) == labels
    content = json.loads(found.save(tmp_path / "span.json").read_text())
    assert content["texts"] == [["red"], ["a beach"]] and "bases" not in content
    with pytest.raises(MMHooksError, match="is not a file of head labels"):
        HeadLabels.load(tmp_path / "span.json")
    with pytest.raises(MMHooksError, match=r"expected one of colour, place, got mood"):
        labels.of_kind("mood")


def test_pools(tmp_path):
    general = mm.data.text_pool("general")
    assert len(general) == len(set(general.texts)) == len(general.kinds) > 1000
    assert general.texts == tuple(
        t for lines in _recipe_kinds().values() for t in lines
    )  # the file is the script's
    imagenet = mm.data.text_pool("imagenet")
    assert 990 < len(imagenet) <= 1000 and imagenet.texts[1] == "a photo of a goldfish."
    own = tmp_path / "own.txt"
    own.write_text("# colour\nred\nblue\nred\n\n# place\nbeach\n")
    pool = mm.data.text_pool(own, template="a picture of {}")
    assert pool.texts == ("a picture of red", "a picture of blue", "a picture of beach")
    assert pool.kinds == ("colour", "colour", "place")
    with pytest.raises(DataError, match="no text pool 'generel'"):
        mm.data.text_pool("generel")
    with pytest.raises(DataError, match=r"expected \{\} in place of the text"):
        mm.data.text_pool(own, template="a picture")


def _recipe_kinds():
    from embedded import text_pool

    return text_pool.kinds()


def test_texts_through_the_text_tower():
    model = mm.load("mini")
    found = embed_texts(model, ["a dog", "a cat", "a red circle"], batch=2)
    expected = model.encode_text(model.tokenizer(["a dog", "a cat", "a red circle"]), normalize=True)
    assert torch.allclose(found, expected, atol=1e-5)


def test_overlap_of_other_pools_of_the_same_size_is_refused():
    from mmhooks.analysis.decomposition.text_span_checks import span_overlap

    outputs = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    spans = [mm.text_span(outputs, torch.eye(4), pool, n_texts=2) for pool in (list("abcd"), list("abdc"))]
    with pytest.raises(ShapeMismatch, match="different heads or pools"):
        span_overlap(spans)


def test_halves_share_no_family():
    """Two families that vary along other texts: halves disjoint by family find other texts, halves of images the same."""
    numbers = torch.arange(40) % 2
    outputs = torch.zeros(40, 1, 4)
    spread = torch.linspace(-1, 1, 20)
    outputs[numbers == 0, 0, 0], outputs[numbers == 1, 0, 1] = spread, spread
    options = {"n_texts": 1, "splits": 3}
    pool = torch.eye(4) + 0.01
    apart = half_overlap(outputs, pool, list("abcd"), families=7 * numbers, **options)
    assert apart.texts == (0.0,) and apart.n_subsets == 6
    outputs[:, 0, 0] *= 3  # now every random half of the images varies most along the first text
    assert half_overlap(outputs, pool, list("abcd"), **options).texts == (1.0,)
    with pytest.raises(ShapeMismatch, match="40 labels of 1 families for 40 images"):
        half_overlap(outputs, pool, list("abcd"), families=numbers * 0)
    with pytest.raises(ShapeMismatch, match="39 labels"):
        half_overlap(outputs, pool, list("abcd"), families=numbers[1:])
