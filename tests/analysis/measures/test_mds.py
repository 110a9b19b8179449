"""MDS against naive loops, its invariants, and the streaming metric against the whole."""

from __future__ import annotations

import json
import math
import statistics

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from hypothesis.extra.numpy import arrays

import mmhooks as mm
from mmhooks.analysis.measures.mds import MDS
from mmhooks.analysis.statistics.controls import size_matched
from mmhooks.errors import NotFinite, ShapeMismatch

from .loops import close
from .streams import N_FEATURES, fed, streams

# Sparse latents: zeros are common, values are of ordinary size.
numbers = st.one_of(st.just(0.0), st.floats(0.015625, 100, width=32))
signed = st.one_of(st.just(0.0), st.floats(0.015625, 100, width=32), st.floats(-100, -0.015625, width=32))


def tables(values, n_pairs=9, n=4):
    return arrays("float32", (n_pairs, n), elements=values).map(torch.from_numpy)


def naive_mds(image, text, kind):
    scores, counts, means = [], [], []
    for k in range(image.shape[1]):
        ratios, sum_i, sum_t = [], 0.0, 0.0
        for i in range(image.shape[0]):
            a, b = float(image[i, k]), float(text[i, k])
            if kind == "relu":
                a, b = max(a, 0.0), max(b, 0.0)
            elif kind == "abs":
                a, b = abs(a), abs(b)
            sum_i, sum_t = sum_i + a, sum_t + b
            if a + b != 0:
                ratios.append(a / (a + b))
        counts.append(len(ratios))
        scores.append(sum(ratios) / len(ratios) if ratios else math.nan)
        means.append(sum_i / (sum_i + sum_t) if sum_i + sum_t else math.nan)
    return torch.tensor(scores), torch.tensor(counts), torch.tensor(means)


@pytest.mark.parametrize("kind", ["relu", "abs", "paper"])
def test_equals_the_loop(kind):
    torch.manual_seed(0)
    image, text = torch.randn(60, 7), torch.randn(60, 7) - 0.5
    image[:, 3] = text[:, 3] = 0
    result = mm.mds(image, text, kind=kind)
    scores, counts, means = naive_mds(image, text, kind)
    torch.testing.assert_close(result.R.float(), scores, equal_nan=True, rtol=1e-4, atol=1e-5)
    assert torch.equal(result.counts, counts)
    torch.testing.assert_close(result.ratio_of_means.float(), means, equal_nan=True, rtol=1e-3, atol=1e-4)
    assert result.dead.tolist() == [k == 3 for k in range(7)]


@given(tables(numbers), tables(numbers))
@settings(max_examples=60, deadline=None)
def test_swapping_the_modalities_gives_one_minus_r(image, text):
    forward, backward = mm.mds(image, text).R, mm.mds(text, image).R
    torch.testing.assert_close(forward, 1 - backward, equal_nan=True, rtol=0, atol=1e-6)


@given(tables(signed), st.sampled_from(["relu", "abs"]))
@settings(max_examples=60, deadline=None)
def test_equal_sides_give_one_half_and_no_group(z, kind):
    result = mm.mds(z, z, kind=kind)
    alive = ~result.dead
    assert torch.equal(result.R[alive], torch.full((int(alive.sum()),), 0.5, dtype=torch.float64))
    assert result.R[result.dead].isnan().all() and result.ratio_of_means[result.dead].isnan().all()
    imgd, textd, crossd = result.groups
    assert len(imgd) == len(textd) == 0 and len(crossd) == int(alive.sum())


@given(tables(numbers, n=6), tables(numbers, n=6))
@settings(max_examples=60, deadline=None)
def test_groups_split_the_alive_features_at_mu_and_sigma(image, text):
    result = mm.mds(image, text)
    scores = [x for x in result.R.tolist() if not math.isnan(x)]
    never = ((image > 0).sum(0) + (text > 0).sum(0)) == 0
    assert torch.equal(result.dead, never)
    if not scores:
        assert math.isnan(result.mu) and [len(g) for g in result.groups] == [0, 0, 0]
        return
    mu = sum(scores) / len(scores)
    sigma = math.sqrt(sum((x - mu) ** 2 for x in scores) / len(scores))
    assert result.mu == pytest.approx(mu) and result.sigma == pytest.approx(sigma, abs=1e-9)
    imgd, textd, crossd = result.groups
    assert (imgd | textd | crossd).mask.tolist() == (~result.dead).tolist()
    assert len(imgd & textd) == len(imgd & crossd) == len(textd & crossd) == 0
    assert all(result.R[k] > result.mu + result.sigma for k in imgd)
    assert all(result.R[k] < result.mu - result.sigma for k in textd)


@pytest.mark.parametrize("cuts", [[100], [1, 99], [33, 33, 34]])
def test_the_stream_equals_the_whole(cuts):
    torch.manual_seed(1)
    image, text = torch.relu(torch.randn(100, 9) - 1), torch.relu(torch.randn(100, 9) - 1)
    metric = MDS(9, head="h", data="d")
    for a, b in zip(image.split(cuts), text.split(cuts), strict=True):
        metric.update(a, b)
    whole, stream = mm.mds(image, text, head="h", data="d"), metric.result()
    for name in ("R", "ratio_of_means", "standard_error"):
        torch.testing.assert_close(
            getattr(stream, name), getattr(whole, name), equal_nan=True, rtol=1e-6, atol=1e-7
        )
    for name in ("counts", "image_counts", "text_counts", "dead", "rare"):
        assert torch.equal(getattr(stream, name), getattr(whole, name))
    assert stream.groups == whole.groups
    metric.reset()
    metric.update(image, text)
    assert torch.equal(metric.result().R, whole.R)


def test_two_processes_add_up_as_torchmetrics_reduces_them():
    torch.manual_seed(2)
    image, text = torch.rand(40, 5), torch.rand(40, 5)
    parts = [MDS(5), MDS(5)]
    parts[0].update(image[:25], text[:25])
    parts[1].update(image[25:], text[25:])
    together = MDS(5)
    for name, reduce in together._reductions.items():
        stacked = torch.stack([getattr(p, name) for p in parts])
        setattr(together, name, reduce(stacked))  # what Metric.sync does with the gathered states
    together._update_count = 2
    torch.testing.assert_close(together.result().R, mm.mds(image, text).R)


def test_standard_error_is_that_of_the_mean():
    torch.manual_seed(3)
    image, text = torch.rand(50, 3), torch.rand(50, 3)
    ratios = (image / (image + text)).double()
    expected = ratios.std(0, unbiased=True) / math.sqrt(50)
    torch.testing.assert_close(mm.mds(image, text).standard_error, expected, rtol=1e-4, atol=1e-7)


def test_shuffled_control_tells_marginals_from_pairing():
    torch.manual_seed(4)
    scale = torch.rand(200) * 4
    image = torch.rand(500, 200) * scale
    text = torch.rand(500, 200)
    assert mm.mds(image, text).shuffled_r > 0.95  # dominance that lies in the marginals alone
    # Where one side is a function of the other and both have equal marginals, shuffling destroys the score.
    power = torch.rand(200) * 3
    base = torch.rand(500, 200).sort(0).values
    image = base.pow(power) / base.pow(power).mean(0)
    paired = mm.mds(image, base / base.mean(0))
    assert torch.equal(paired.shuffled_R, mm.mds(image, base / base.mean(0)).shuffled_R)
    assert not torch.allclose(paired.R, paired.shuffled_R, atol=1e-3)


def test_no_text_stays_with_its_own_picture_in_the_control():
    image = torch.eye(30) + 0.0
    result = mm.mds(image, image)
    # Paired: a_I = a_T on the diagonal. Shuffled: a picture alone and a text alone, 1 and 0.
    assert torch.equal(result.counts, torch.ones(30, dtype=torch.long))
    assert torch.equal(result.shuffled_R, torch.full((30,), 0.5, dtype=torch.float64))


def test_rare_features_are_flagged_and_dead_ones_are_not_rare():
    image = torch.zeros(50, 3)
    image[:5, 0] = 1
    image[:, 1] = 1
    result = mm.mds(image, torch.zeros(50, 3), min_fires=10)
    assert result.rare.tolist() == [True, False, False]
    assert result.dead.tolist() == [False, False, True]


def test_bad_input_is_named():
    good = torch.rand(10, 4)
    with pytest.raises(ShapeMismatch, match=r"\(10, 4\).*\(10, 3\).*widths"):
        mm.mds(good, good[:, :3])
    with pytest.raises(ShapeMismatch, match="numbers of pairs"):
        mm.mds(good, good[:5])
    bad = good.clone()
    bad[7, 2] = math.nan
    bad[9, 3] = math.inf
    with pytest.raises(NotFinite, match=r"text latents: 2 of 40 .*rows 7, 9 and columns 2, 3"):
        mm.mds(good, bad)
    metric = MDS(5)
    with pytest.raises(ShapeMismatch, match="expected 5 features, got 4"):
        metric.update(good, good)
    metric = MDS(4)
    metric.update(good, good)
    with pytest.raises(NotFinite, match="rows 17, 19"):
        metric.update(good, bad)
    assert int(metric.n_pairs) == 10  # nothing of the bad batch was added


def test_table_and_file(tmp_path):
    torch.manual_seed(5)
    result = mm.mds(torch.rand(30, 12), torch.rand(30, 12), head="sae-1", data="mini")
    table = result.table()
    assert [row["group"] for row in table] == ["all alive", "ImgD", "TextD", "CrossD"]
    assert sum(row["features"] for row in table[1:]) == table[0]["features"] == 12
    assert table.markdown().startswith("| group | features |")
    stored = json.loads(result.save(tmp_path / "mds.json").read_text())
    assert stored["head"] == "sae-1" and stored["data"] == "mini"
    assert stored["R"] == result.R.tolist() and stored["groups"][0]["indices"] == list(result.groups[0])
    assert stored["mu"] == result.mu and stored["sigma"] == result.sigma
    assert result.groups[0].head == "sae-1" and result.groups[0].info["sigma"] == result.sigma


def test_size_matched_controls():
    result = mm.mds(torch.rand(30, 40) * torch.rand(40), torch.rand(30, 40))
    imgd = result.groups[0]
    controls = size_matched(imgd, draws=5, alive=~result.dead, disjoint=True)
    assert all(len(c) == len(imgd) and not len(c & imgd) for c in controls)
    assert len({tuple(c) for c in controls}) > 1
    assert list(controls) == list(size_matched(imgd, draws=5, alive=~result.dead, disjoint=True))
    with pytest.raises(ShapeMismatch):
        size_matched(~imgd, disjoint=True)


@given(streams(signed=True), st.sampled_from(["relu", "abs", "paper"]))
@settings(max_examples=60, deadline=None)
def test_streamed_scores_equal_the_loop(stream, kind):
    image, text, _, bounds, sparse = stream
    result = fed(lambda: MDS(N_FEATURES, kind=kind), bounds, image, text, sparse=sparse, start=True).result()
    a, b = image.dense().double(), text.dense().double()
    if kind != "paper":
        a, b = (x.clamp_min(0) if kind == "relu" else x.abs() for x in (a, b))
    for k in range(N_FEATURES):
        ratios = [float(x / (x + y)) for x, y in zip(a[:, k], b[:, k], strict=True) if abs(x + y) > 1e-7]
        sums = float(a[:, k].sum()), float(b[:, k].sum())
        assert int(result.counts[k]) == len(ratios)
        close(result.R[k], sum(ratios) / len(ratios) if ratios else math.nan, 1e-4)
        assert int(result.image_counts[k]) == sum(x != 0 for x in a[:, k].tolist())
        assert int(result.text_counts[k]) == sum(x != 0 for x in b[:, k].tolist())
        if kind == "relu":
            close(result.ratio_of_means[k], sums[0] / sum(sums) if sum(sums) else math.nan)
            spread = statistics.stdev(ratios) / math.sqrt(len(ratios)) if len(ratios) > 1 else math.nan
            close(result.standard_error[k], spread, 1e-5)


@given(streams())
@settings(max_examples=40, deadline=None)
def test_the_shuffled_control_is_the_same_dense_and_sparse(stream):
    image, text, _, bounds, _ = stream
    one, other = (
        fed(lambda: MDS(N_FEATURES, seed=3), bounds, image, text, sparse=s, start=True).result()
        for s in (True, False)
    )
    close(one.shuffled_R, other.shuffled_R)
    whole = MDS(N_FEATURES, seed=3)
    whole.update(image, text)
    close(whole.result().shuffled_R, mm.mds(image.dense(), text.dense(), seed=3).shuffled_R)
