"""Streaming measures against loops written here: any split, any order of merging, dense or sparse."""

from __future__ import annotations

import math
import statistics

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch.nn.functional import cosine_similarity

import mmhooks as mm
from mmhooks.analysis.measures.bridges import Bridge
from mmhooks.analysis.measures.density import FeatureDensity, density
from mmhooks.analysis.measures.embed_sim import EmbedSim
from mmhooks.analysis.measures.mds import MDS
from mmhooks.analysis.measures.modality_gap import ModalityMeans, modality_gap
from mmhooks.analysis.measures.monosemanticity import MonoSemanticity, monosemanticity
from mmhooks.analysis.measures.samples import scattered
from mmhooks.analysis.measures.top_activating import TopSamples
from mmhooks.analysis.measures.win_rate import WinRate
from mmhooks.analysis.statistics.jackknife import Grouped
from mmhooks.data.sparse_rows import SparseRows
from mmhooks.errors import NotFinite, ShapeMismatch, WrongHead

N, FEATURES, D, K = 24, 7, 4, 3


@st.composite
def streams(draw, signed=False):
    """Sparse latents of both sides, embeddings, and a split of the rows into batches in some order of merging."""
    seed = draw(st.integers(0, 10_000))
    generator = torch.Generator().manual_seed(seed)
    levels = draw(st.sampled_from([3, 1000]))  # few levels: many ties
    sides = []
    for _ in range(2):
        values = torch.randint(-levels if signed else 0, levels, (N, K), generator=generator) / levels
        indices = torch.rand(N, FEATURES - 1, generator=generator).argsort(1)[
            :, :K
        ]  # the last feature is dead
        indices[values == 0] = draw(st.integers(0, FEATURES - 1))  # padding points anywhere
        sides.append(SparseRows(values, indices, FEATURES))
    vectors = torch.randn(N, D, generator=generator) + 0.5
    cuts = sorted(draw(st.sets(st.integers(1, N - 1), max_size=5)))
    bounds = list(zip([0, *cuts], [*cuts, N], strict=True))
    return sides[0], sides[1], vectors, draw(st.permutations(bounds)), draw(st.booleans())


def fed(make, bounds, *inputs, sparse, start=False):
    """The metric after all batches: each into a metric of its own, merged in the order given."""
    inputs = [x if sparse or not isinstance(x, SparseRows) else x.dense() for x in inputs]
    whole = make()
    for begin, end in bounds:
        part = make()
        part.update(*(x[begin:end] for x in inputs), **({"start": begin} if start else {}))
        whole.merge_state(part)
        whole._update_count += 1
    return whole


def close(a, b, tolerance=1e-6):
    a, b = (torch.as_tensor(x).double() for x in (a, b))
    torch.testing.assert_close(a, b, equal_nan=True, rtol=tolerance, atol=tolerance)


@given(streams(signed=True), st.sampled_from(["relu", "abs", "paper"]))
@settings(max_examples=60, deadline=None)
def test_mds(stream, kind):
    image, text, _, bounds, sparse = stream
    result = fed(lambda: MDS(FEATURES, kind=kind), bounds, image, text, sparse=sparse, start=True).result()
    a, b = image.dense().double(), text.dense().double()
    if kind != "paper":
        a, b = (x.clamp_min(0) if kind == "relu" else x.abs() for x in (a, b))
    for k in range(FEATURES):
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
        fed(lambda: MDS(FEATURES, seed=3), bounds, image, text, sparse=s, start=True).result()
        for s in (True, False)
    )
    close(one.shuffled_R, other.shuffled_R)
    whole = MDS(FEATURES, seed=3)
    whole.update(image, text)
    close(whole.result().shuffled_R, mm.mds(image.dense(), text.dense(), seed=3).shuffled_R)


def naive_top(latents, k, m):
    ranked = sorted(range(len(latents)), key=lambda i: (-float(latents[i, k]), i))
    return [i for i in ranked if latents[i, k] > 0][:m]


@given(streams(signed=True), st.integers(1, 6))
@settings(max_examples=80, deadline=None)
def test_top_samples(stream, m):
    image, _, vectors, bounds, sparse = stream
    dense = image.dense()
    metric = fed(
        lambda: TopSamples(FEATURES, m=m, width=D), bounds, image, vectors, sparse=sparse, start=True
    )
    result = metric.result()
    for k in range(FEATURES):
        expected = naive_top(dense, k, m)
        assert result.of(k).tolist() == expected
        assert result.values[k].tolist() == [float(dense[i, k]) for i in expected] + [0.0] * (
            m - len(expected)
        )
        assert torch.equal(metric.best[k, : len(expected), 2:].float(), vectors[expected])
    assert int(result.count[FEATURES - 1]) == 0 and (result.indices[FEATURES - 1] == -1).all()
    assert result.n_samples == N
    assert torch.equal(mm.top_activating(image, m=m).indices, mm.top_activating(dense, m=m).indices)


@given(streams(), st.sampled_from(["primary", "difference", "paper"]))
@settings(max_examples=40, deadline=None)
def test_embed_sim(stream, kind):
    image, _, vectors, bounds, sparse = stream
    make = lambda: EmbedSim(FEATURES, D, m=5, kind=kind, seed=2)  # noqa: E731
    result = fed(make, bounds, image, vectors, sparse=sparse, start=True).result()
    whole = mm.embed_sim(image.dense(), vectors, m=5, kind=kind, seed=2)
    close(result.s_minus, whole.s_minus)
    close(result.s_plus, whole.s_plus)
    assert torch.equal(result.counts, whole.counts)
    if kind != "paper":  # the paper's own draws come from the pool, in its order
        close(result.values, whole.values, 1e-4)
    dense = image.dense()
    for k in range(FEATURES):
        top = naive_top(dense, k, 5)
        pairs = [(i, j) for i in top for j in top if i < j]
        cosines = [float(cosine_similarity(vectors[i], vectors[j], dim=0)) for i, j in pairs]
        close(result.s_plus[k], sum(cosines) / len(cosines) if cosines else math.nan, 1e-5)


@given(streams())
@settings(max_examples=40, deadline=None)
def test_win_rate(stream):
    image, _, vectors, bounds, sparse = stream
    result = fed(
        lambda: WinRate(FEATURES, D, m=5), bounds, image, vectors, sparse=sparse, start=True
    ).result()
    close(result.values, mm.win_rate(image.dense(), vectors, m=5).values)


def test_the_pool_is_a_uniform_draw_whatever_the_order():
    torch.manual_seed(0)
    latents, vectors = torch.rand(500, 3), torch.randn(500, 2)
    pools = []
    for order in (torch.arange(10), torch.randperm(10)):
        metric = WinRate(3, 2, m=2, pool=50)
        for i in order.tolist():
            metric.update(latents[50 * i : 50 * i + 50], vectors[50 * i : 50 * i + 50], start=50 * i)
        pools.append(metric.pool)
    assert torch.equal(*pools)
    numbers = pools[0][:, 1].long()
    assert len(numbers.unique()) == 50
    close(pools[0][:, 2:], torch.nn.functional.normalize(vectors[numbers], dim=1))
    keys = scattered(torch.arange(100_000), 0)
    assert float(keys.mean()) == pytest.approx(0.5, abs=0.005) and len(keys.unique()) == 100_000
    assert not torch.equal(keys, scattered(torch.arange(100_000), 1))


def naive_ms(latents, vectors):
    found = []
    for a in latents.double().T:
        if float(a.max()) == float(a.min()):
            found.append(math.nan)
            continue
        a = (a - a.min()) / (a.max() - a.min())
        above = below = 0.0
        for i in range(len(a)):
            for j in range(i):
                weight = float(a[i] * a[j])
                above += weight * float(cosine_similarity(vectors[i].double(), vectors[j].double(), dim=0))
                below += weight
        found.append(above / below if below > 1e-9 else math.nan)
    return torch.tensor(found, dtype=torch.float64)


@given(streams(signed=True))
@settings(max_examples=30, deadline=None)
def test_monosemanticity(stream):
    image, _, vectors, bounds, sparse = stream
    metric = fed(lambda: MonoSemanticity(FEATURES, D), bounds, image, vectors, sparse=sparse)
    close(metric.result().values, naive_ms(image.dense(), vectors), 1e-4)


def test_monosemanticity_keeps_its_digits_far_from_zero():
    torch.manual_seed(1)
    latents, vectors = torch.rand(30, 4), torch.randn(30, 3)
    moved = latents + torch.tensor([0.0, 10.0, -50.0, 0.0])
    close(monosemanticity(moved, vectors).values, naive_ms(moved, vectors), 1e-4)
    assert monosemanticity(torch.ones(9, 2), torch.randn(9, 3)).values.isnan().all()


@given(streams(signed=True))
@settings(max_examples=40, deadline=None)
def test_density_and_l0(stream):
    image, _, _, bounds, sparse = stream
    result = fed(lambda: FeatureDensity(FEATURES), bounds, image, sparse=sparse).result()
    table = image.dense().tolist()
    for k in range(FEATURES):
        assert float(result.values[k]) == pytest.approx(sum(row[k] != 0 for row in table) / N)
    l0 = [sum(x != 0 for x in row) for row in table]
    assert result.l0.value == pytest.approx(sum(l0) / N) and result.l0.n == N
    assert result.dead == pytest.approx(
        sum(all(row[k] == 0 for row in table) for k in range(FEATURES)) / FEATURES
    )
    edges, counts = result.histogram()
    alive = [v for v in result.values.tolist() if v > 0]
    for i, count in enumerate(counts):
        last = i == len(counts) - 1
        assert count == sum(
            edges[i] * (1 - 1e-9) <= v < edges[i + 1] * (1 - 1e-9) or (last and v > 0.999) for v in alive
        )
    assert sum(counts) == len(alive)


def test_l0_interval_is_that_of_the_samples():
    torch.manual_seed(2)
    latents = (torch.rand(400, 12) < torch.rand(400, 1)).float()
    l0 = (latents != 0).sum(1).double()
    found = density(latents).l0
    half = 1.96 * float(l0.std()) / 20
    assert found.low == pytest.approx(float(l0.mean()) - half, abs=0.15 * half)
    assert found.high == pytest.approx(float(l0.mean()) + half, abs=0.15 * half)


@given(streams())
@settings(max_examples=30, deadline=None)
def test_modality_means(stream):
    _, _, vectors, bounds, _ = stream
    other = vectors.roll(1, 0) - 1.2
    metric = fed(lambda: ModalityMeans(D), bounds, vectors, other, sparse=True)
    whole = modality_gap(vectors, other)
    close(metric.result().gap.value, whole.gap.value)
    cosines = [float(cosine_similarity(a, b, dim=0)) for a, b in zip(vectors, other, strict=True)]
    close(metric.result().pair_cosine.value, sum(cosines) / N)


@given(streams(signed=True))
@settings(max_examples=30, deadline=None)
def test_bridge(stream):
    image, text, _, bounds, sparse = stream
    metric = fed(lambda: Bridge(FEATURES), bounds, image, text, sparse=sparse)
    a, b = image.dense().tolist(), text.dense().tolist()
    decoder = torch.randn(FEATURES, D, generator=torch.Generator().manual_seed(0))
    result = metric.result(decoder)
    scores = {}
    for i in range(FEATURES):
        for j in range(FEATURES):
            together = sum(a[r][i] * b[r][j] for r in range(N)) / N
            close(metric.compute()["together"][i, j], together, 1e-5)
            scores[i, j] = together * float(
                cosine_similarity(decoder[i].double(), decoder[j].double(), dim=0)
            )
    for i in range(FEATURES):
        close(result.own[i], scores[i, i], 1e-5)
        best = max(scores[i, j] for j in range(FEATURES) if j != i)
        close(result.partner_score[i], max(best, 0), 1e-5)
        assert int(result.partner[i]) == -1 or scores[i, int(result.partner[i])] == pytest.approx(
            best, abs=1e-5
        )
    mass = sum(max(s, 0) for s in scores.values())
    outside = sum(max(s, 0) for (i, j), s in scores.items() if i != j)
    close(result.off_diagonal, outside / mass if mass else 0.0, 1e-4)
    assert [p[2] for p in result.strongest] == sorted((p[2] for p in result.strongest), reverse=True)
    with pytest.raises(WrongHead, match="decoder of 6 rows for 7"):
        metric.result(decoder[:6])
    with pytest.raises(ShapeMismatch, match=r"20000 features takes 3\.2 GB"):
        Bridge(20_000)


def test_jackknife_intervals_are_as_wide_as_the_spread_of_repeated_samples():
    torch.manual_seed(3)

    def sample():
        image = torch.randn(600, 3) + torch.tensor([1.0, 0.0, 0.0])
        return image, torch.randn(600, 3) - torch.tensor([1.0, 0.0, 0.0])

    def numbers(image, text):
        parts = Grouped(lambda **kw: ModalityMeans(3, **kw))
        for number in range(20):
            rows = slice(30 * number, 30 * number + 30)
            parts.update(image[rows], text[rows], number=number)
        return parts.estimate(lambda metric: float(metric.compute()["gap"]), 600)

    estimates = [numbers(*sample()) for _ in range(60)]
    values = torch.tensor([e.value for e in estimates])
    halves = torch.tensor([(e.high - e.low) / 2 for e in estimates])
    assert float(halves.mean()) == pytest.approx(2.093 * float(values.std()), rel=0.25)
    truth = numbers(*(torch.cat(x) for x in zip(*(sample() for _ in range(40)), strict=True)))
    covered = sum(e.low <= values.mean() <= e.high for e in estimates) / len(estimates)
    assert covered >= 0.85 and truth.n == 600
    image, text = sample()
    assert numbers(image, text).value == pytest.approx(modality_gap(image, text).gap.value, abs=1e-6)


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
        with pytest.raises(ShapeMismatch, match="features 5 to 5, but there are 5"):
            metric.update(*(x[:1] if isinstance(x, torch.Tensor) else outside for x in inputs))
        with pytest.raises(ShapeMismatch, match="of 6 features, expected 5"):
            wide = SparseRows(good.values, good.indices, 6)
            metric.update(*(x if isinstance(x, torch.Tensor) else wide for x in inputs))
        assert all(torch.equal(before[name], value) for name, value in metric.metric_state.items())
    with pytest.raises(ShapeMismatch, match="needs the embeddings"):
        metrics["sim"][0].update(good)
    with pytest.raises(ShapeMismatch, match=r"vectors of shape \(4, 3\), expected 0"):
        metrics["top"][0].update(good, vectors)
    with pytest.raises(NotFinite):
        metrics["ms"][0].update(good, vectors * math.nan)
    with pytest.raises(ShapeMismatch, match=r"embeddings of shape \(4, 2\), expected 3 numbers"):
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
