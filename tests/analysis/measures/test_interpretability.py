"""EmbedSim, WinRate, MonoSemanticity and their relatives against loops written here."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch.nn.functional import cosine_similarity

import mmhooks as mm
from mmhooks.analysis.measures.density import density
from mmhooks.analysis.measures.modality_gap import modality_gap
from mmhooks.analysis.measures.monosemanticity import (
    monosemanticity,
    textual_monosemanticity,
    visual_monosemanticity,
)
from mmhooks.analysis.measures.samples import random_samples
from mmhooks.errors import NotFinite, ShapeMismatch, WrongHead
from mmhooks.hooks.features import FeatureSet

N, FEATURES, D, M = 40, 6, 5, 4


@pytest.fixture
def data():
    torch.manual_seed(0)
    latents = torch.relu(torch.randn(N, FEATURES) - 0.5)
    latents[:, 2] = 0  # dead
    latents[:, 3] = 0
    latents[7, 3] = 1.0  # one sample: no pair
    latents[:, 4] = 0
    latents[[3, 9, 11], 4] = torch.tensor([1.0, 3.0, 2.0])  # fewer than m
    return latents, torch.randn(N, D) + 0.7


def cos(x, i, j):
    return float(cosine_similarity(x[i].double(), x[j].double(), dim=0))


def naive_top(latents, k, m):
    ranked = sorted(range(len(latents)), key=lambda i: -float(latents[i, k]))
    return [i for i in ranked[:m] if latents[i, k] > 0]


def naive_pool(x):
    pairs = [cos(x, i, j) for i in range(len(x)) for j in range(len(x)) if i != j]
    return sum(pairs) / len(pairs)


def mean(values):
    values = list(values)
    return sum(values) / len(values) if values else math.nan


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
    with pytest.raises(ShapeMismatch, match="m must be at least 1"):
        mm.top_activating(latents, m=0)


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


def test_paper_forms_equal_the_loops(data):
    latents, x = data
    eps = 0.4
    sim = mm.embed_sim(latents, x, m=M, kind="paper", eps=eps, seed=3)
    win = mm.win_rate(latents, x, m=M, kind="paper", seed=3)
    random = random_samples(N, M, range(FEATURES), 3)
    excluded = compared = 0
    for k in range(FEATURES):
        top, other = naive_top(latents, k, M), random[k].tolist()
        assert len(set(other)) == M
        ratios, wins = [], []
        for a in range(len(top)):
            for b in range(a + 1, len(top)):
                plus, minus = cos(x, top[a], top[b]), cos(x, other[a], other[b])
                wins.append(plus > minus)
                compared += 1
                if abs(minus) < eps:
                    excluded += 1
                else:
                    ratios.append((plus - minus) / minus)
        assert float(sim.values[k]) == pytest.approx(mean(ratios), abs=1e-4, nan_ok=True)
        assert float(win.values[k]) == pytest.approx(mean(wins), abs=1e-6, nan_ok=True)
    assert (sim.excluded, sim.pairs_compared) == (excluded, compared) and 0 < excluded < compared


def test_win_rate_expectation_equals_the_loop(data):
    latents, x = data
    result = mm.win_rate(latents, x, m=M)
    pool = [cos(x, i, j) for i in range(N) for j in range(i + 1, N)]
    for k in range(FEATURES):
        top = naive_top(latents, k, M)
        # A top pair is itself in the pool: no win over itself, and rounding must not make it one.
        wins = [sum(cos(x, i, j) > p + 1e-7 for p in pool) / len(pool) for i in top for j in top if i < j]
        assert float(result.values[k]) == pytest.approx(mean(wins), abs=1.5 / len(pool), nan_ok=True)


def test_random_features_have_no_similarity_above_chance():
    generator = torch.Generator().manual_seed(5)
    latents = torch.rand(600, 300, generator=generator)
    x = torch.randn(600, 8, generator=generator) + 0.5
    sim, win = mm.embed_sim(latents, x), mm.win_rate(latents, x)
    assert sim.estimate.low < 0 < sim.estimate.high and win.estimate.low < 0.5 < win.estimate.high
    # Features that are directions of the embedding find alike samples.
    directed = torch.relu(x @ torch.randn(8, 300, generator=generator))
    assert mm.embed_sim(directed, x).estimate.low > 0.3 and mm.win_rate(directed, x).estimate.low > 0.7


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


def test_bad_input_is_named(data):
    latents, x = data
    with pytest.raises(ShapeMismatch, match="latents of 40 samples but embeddings of 39"):
        mm.embed_sim(latents, x[:-1])
    bad = x.clone()
    bad[4, 1] = math.nan
    with pytest.raises(NotFinite, match=r"embeddings: 1 of 200 .*rows 4 and columns 1"):
        mm.win_rate(latents, bad)
    with pytest.raises(ShapeMismatch, match="m = 1"):
        mm.embed_sim(latents, x, m=1)
    with pytest.raises(NotFinite, match="latents"):
        mm.top_activating(latents / 0)


def test_group_contrasts_and_their_random_control():
    torch.manual_seed(6)
    latents = torch.rand(60, 100)
    x = torch.randn(60, 4)
    sim = mm.embed_sim(latents, x, m=5, kind="difference")
    order = sim.values.argsort(descending=True)
    imgd, textd = FeatureSet(order[:20], 100, name="ImgD"), FeatureSet(order[-10:], 100, name="TextD")
    visual = visual_monosemanticity(sim, imgd, textd)
    expected = float(sim.values[imgd.indices].mean() - sim.values[textd.indices].mean())
    assert visual.estimate.value == pytest.approx(expected, abs=1e-6)
    assert visual.estimate.low < expected < visual.estimate.high and visual.estimate.n == 30
    textual = textual_monosemanticity(sim, imgd, textd)
    assert textual.estimate.value == pytest.approx(-expected, abs=1e-6)
    assert visual.beats_control and visual.control.low < 0 < visual.control.high and visual.control.n == 200
    mixed = FeatureSet(range(20), 100), FeatureSet(range(20, 30), 100)
    assert not visual_monosemanticity(sim, *mixed).beats_control
    assert visual.table()[0]["contrast"] == "ImgD − TextD"
    with pytest.raises(WrongHead):
        visual_monosemanticity(sim, FeatureSet([1], 50), textd)
    empty = visual_monosemanticity(sim, FeatureSet([], 100, name="ImgD"), textd)
    assert math.isnan(empty.estimate.value) and empty.control.n == 0


def test_monosemanticity_equals_the_loop(data):
    latents, x = data
    latents = latents - 0.3  # min-max scaling takes the offset out again
    result = monosemanticity(latents, x)
    for k in range(FEATURES):
        z = latents[:, k].double()
        if z.max() == z.min():
            assert result.values[k].isnan()
            continue
        a = ((z - z.min()) / (z.max() - z.min())).tolist()
        pairs = [(a[i] * a[j], cos(x, i, j)) for i in range(N) for j in range(i + 1, N)]
        weight = sum(w for w, _ in pairs)
        expected = sum(w * c for w, c in pairs) / weight if weight > 1e-9 else math.nan
        assert float(result.values[k]) == pytest.approx(expected, abs=1e-5, nan_ok=True), k


def test_density_and_gap(data):
    latents, x = data
    d = density(latents)
    assert d.values.tolist() == [sum(float(v) != 0 for v in latents[:, k]) / N for k in range(FEATURES)]
    assert d.dead == pytest.approx(1 / FEATURES)
    assert d.l0.value == pytest.approx(mean(sum(float(v) != 0 for v in row) for row in latents))
    y = torch.randn(N, D) * 3
    unit = [v / v.norm(dim=1, keepdim=True) for v in (x, y)]
    gap = modality_gap(x, y)
    expected = float((unit[0].mean(0) - unit[1].mean(0)).norm())
    assert gap.gap.value == pytest.approx(expected, abs=1e-6) and gap.gap.low < gap.gap.high
    assert gap.pair_cosine.value == pytest.approx(mean(cos_pair(x, y)), abs=1e-6)


def cos_pair(x, y):
    return [float(cosine_similarity(a, b, dim=0)) for a, b in zip(x, y, strict=True)]


def test_results_are_written_as_json(data, tmp_path):
    latents, x = data
    for result in (
        mm.embed_sim(latents, x, m=M),
        mm.win_rate(latents, x, m=M),
        mm.top_activating(latents, m=M),
    ):
        stored = json.loads(result.save(tmp_path / "r.json").read_text())
        assert (
            stored["kind"] in (type(result).__name__, getattr(result, "kind", ""))
            and result.table().markdown()
        )
    stored = json.loads(mm.embed_sim(latents, x, m=M).save(tmp_path / "r.json").read_text())
    assert stored["values"][2] is None and stored["estimate"]["n"] == 4
