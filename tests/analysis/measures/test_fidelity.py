"""Fidelity: each number against its definition, and equal from tensors and from a store."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

import mmhooks as mm
from mmhooks.analysis.measures.cknna import cknna
from mmhooks.analysis.measures.fidelity import ChoiceMetric, FidelitySums
from mmhooks.data.store.layout import SiteSpec
from mmhooks.data.store.lock import Lock
from mmhooks.data.store.writer import ShardWriter, begin, finish
from mmhooks.errors import MMHooksError, NotFinite, ShapeMismatch
from mmhooks.heads import NCL, TopKSAE
from mmhooks.heads import reconstruction as core


def vectors(n: int, d: int, seed: int) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def sae() -> TopKSAE:
    return TopKSAE(16, 48, 5)


# -- CKNNA -------------------------------------------------------------------------------------------------------


def plain_cknna(one: Tensor, other: Tensor, k: int) -> float:
    """With the B x B matrices and their products, entry by entry where it matters."""
    b = len(one)
    kernels = [x.double() @ x.double().T for x in (one, other)]
    near = []
    for kernel in kernels:
        mask = torch.zeros(b, b, dtype=torch.double)
        for i in range(b):
            ranked = sorted((j for j in range(b) if j != i), key=lambda j, i=i: -float(kernel[i, j]))
            mask[i, ranked[:k]] = 1
        near.append(mask)

    def hsic(p: Tensor, q: Tensor) -> float:
        ones = torch.ones(b, dtype=torch.double)
        whole = torch.trace(p @ q) + (ones @ p @ ones) * (ones @ q @ ones) / ((b - 1) * (b - 2))
        return float(whole - 2 * (ones @ p @ q @ ones) / (b - 2)) / (b * (b - 3))

    both = near[0] * near[1]
    (p, q), (m, n) = kernels, near
    return hsic(both * p, both * q) / math.sqrt(hsic(m * p, m * p) * hsic(n * q, n * q))


@settings(deadline=None, max_examples=25)
@given(b=st.integers(8, 40), k=st.integers(1, 6), seed=st.integers(0, 99), mix=st.floats(0, 1))
def test_cknna_is_the_masked_hsic(b: int, k: int, seed: int, mix: float) -> None:
    one = normalize(vectors(b, 6, seed), dim=1)
    other = normalize(mix * one + (1 - mix) * vectors(b, 6, seed + 1), dim=1)
    got = cknna(one, other, k=k)
    if not math.isnan(got):  # a denominator at or below 0
        assert got == pytest.approx(plain_cknna(one, other, k), rel=1e-6, abs=1e-9)


def test_cknna_of_the_same_neighbourhoods_is_one_and_of_others_small() -> None:
    x = vectors(300, 16, 0)
    turn = torch.linalg.qr(vectors(16, 16, 1)).Q
    assert cknna(x, 2 * x @ turn) == pytest.approx(1, abs=1e-6)
    noise = [cknna(x, x + s * vectors(300, 16, 2)) for s in (0.1, 0.5, 2.0)]
    assert noise == sorted(noise, reverse=True) and noise[0] > 0.8
    assert abs(cknna(x, vectors(300, 16, 3))) < 0.05


def test_cknna_does_not_depend_on_the_size_of_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    from mmhooks.analysis.measures import cknna as module

    x, y = vectors(90, 8, 0), vectors(90, 8, 0) + 0.3 * vectors(90, 8, 1)
    whole = cknna(x, y)
    monkeypatch.setattr(module, "_MAX_PRODUCTS", 90 * 7)
    assert cknna(x, y) == pytest.approx(whole, rel=1e-9)


# -- choices -----------------------------------------------------------------------------------------------------


def test_choices_equal_a_loop_over_queries() -> None:
    x, back = vectors(40, 6, 0), vectors(40, 6, 0) + 0.5 * vectors(40, 6, 1)
    candidates, labels = vectors(9, 6, 2), torch.arange(9) % 4  # several candidates of a label
    right = torch.arange(40) % 4
    metric = ChoiceMetric(candidates, labels, scale=20.0, ks=(1, 3, 50))
    for part in torch.arange(40).split(7):
        metric.update(x[part], back[part], right[part])
    got = metric.result()
    hits, same, kl = {1: [0, 0], 3: [0, 0]}, 0, 0.0
    for i in range(40):
        scores = [[float(torch.cosine_similarity(v[i], c, dim=0)) for c in candidates] for v in (x, back)]
        for side, score in enumerate(scores):
            ranked = sorted(range(9), key=lambda j, score=score: -score[j])
            for k, found in hits.items():
                found[side] += any(int(labels[j]) == int(right[i]) for j in ranked[:k])
        p, q = (torch.tensor(s, dtype=torch.double).mul(20).softmax(0) for s in scores)
        same += int(p.argmax() == q.argmax())
        kl += float((p * (p / q).log()).sum()) / 40
    assert set(got.before) == {1, 3} and got.n == 40 and got.candidates == 9
    for k, (before, after) in hits.items():
        assert (got.before[k].value, got.after[k].value) == (before / 40, after / 40)
    assert got.agreement.value == same / 40
    assert got.kl.value == pytest.approx(kl, rel=1e-4) and got.kl.low < got.kl.value < got.kl.high


# -- the whole ---------------------------------------------------------------------------------------------------


def test_numbers_are_those_of_training_and_of_each_measure_by_itself(sae: TopKSAE) -> None:
    image, text = vectors(700, 16, 0) + 0.5, vectors(700, 16, 1)
    found = mm.fidelity(sae, image, text, gallery=200)
    for side, x in (("image", image), ("text", text)):
        one, own = core(sae, x), getattr(found, side)
        assert own.fvu.value == pytest.approx(one.fvu, rel=1e-6) and own.fvu.low < one.fvu < own.fvu.high
        assert own.cosine.value == pytest.approx(one.cosine, rel=1e-6)
        assert own.l0.value == one.l0 and own.sums.counts == one.counts
    both = core(sae, image, text)
    assert (found.dead, found.rare) == (both.dead, both.rare)
    assert found.fvu == pytest.approx((found.image.fvu.value + found.text.fvu.value) / 2)
    rows = torch.linspace(0, 699, 200).round().long()
    x, y = (normalize(v[rows], dim=1) for v in (image, text))
    f = sae.encode(x).detach()
    back = sae.decode(f).detach()
    assert found.gallery == 200
    assert found.image.cknna == pytest.approx(cknna(x, back), rel=1e-5)
    assert found.image.cknna_latents == pytest.approx(cknna(x, f), rel=1e-5)
    assert found.image.retrieval is not None
    for k in (1, 5, 10):
        assert found.image.retrieval.before[k] == mm.retrieval(x, y).image_to_text[k]
        assert found.image.retrieval.after[k] == mm.retrieval(back, y).image_to_text[k]


def test_a_perfect_head_keeps_everything() -> None:
    sae = TopKSAE(4, 8, 8, normalize_input=False)
    with torch.no_grad():
        sae.W_dec.copy_(torch.cat([torch.eye(4), -torch.eye(4)]))
        sae.W_enc.copy_(sae.W_dec)
    x, y = vectors(300, 4, 0), vectors(300, 4, 1)
    found = mm.fidelity(sae, x, y, classes=vectors(5, 4, 2), labels=torch.arange(300) % 5, others=[sae])
    for side in found.modalities:
        assert side.fvu.value == pytest.approx(0, abs=1e-10) and side.cknna == pytest.approx(1, abs=1e-5)
        for kept in (side.retrieval, side.zero_shot):
            assert kept is not None and kept.before == kept.after
            assert kept.agreement.value == 1 and kept.kl.value == pytest.approx(0, abs=1e-5)
    assert found.stability[0].mean.value == pytest.approx(1, abs=1e-6)


def test_batches_change_no_value(sae: TopKSAE) -> None:
    x, y = vectors(300, 16, 0), vectors(300, 16, 1)
    small, large = (mm.fidelity(sae, x, y, batch=b) for b in (7, 100))
    for one, other in zip(small.modalities, large.modalities, strict=True):
        # The head computes in single precision, whose last bits depend on how many rows a product has.
        assert one.fvu.value == pytest.approx(other.fvu.value, rel=1e-6)
        assert one.sums.counts == other.sums.counts and one.retrieval == other.retrieval


def test_the_interval_covers_what_resampling_gives(sae: TopKSAE) -> None:
    """Against a bootstrap over rows, whose width the jackknife over batches must be near."""
    x = vectors(2000, 16, 0) * torch.rand(2000, 1, generator=torch.Generator().manual_seed(1))
    sae.normalize_input = False
    found = mm.fidelity(sae, x).image.fvu
    back = sae(x).detach()
    generator, drawn = torch.Generator().manual_seed(2), []
    for _ in range(300):
        rows = torch.randint(2000, (2000,), generator=generator)
        drawn.append(
            float((x[rows] - back[rows]).square().sum() / (x[rows] - x[rows].mean(0)).square().sum())
        )
    width = float(torch.tensor(drawn).quantile(0.975) - torch.tensor(drawn).quantile(0.025))
    assert 0.5 * width < found.high - found.low < 2.2 * width


def test_a_store_gives_the_numbers_of_its_tensors(sae: TopKSAE, tmp_path: Path) -> None:
    values = {"image.embed": vectors(90, 16, 0), "text.embed": vectors(90, 16, 1)}
    store = written(tmp_path / "acts", values)
    labels, classes = torch.arange(90) % 3, vectors(3, 16, 2)
    direct = mm.fidelity(sae, *values.values(), classes=classes, labels=labels)
    for data in (store, tmp_path / "acts", str(tmp_path / "acts")):
        assert mm.fidelity(sae, data, classes=classes, labels=labels).to_json() == direct.to_json()
    one = mm.fidelity(sae, store, sites=["text.embed"])
    assert one.text is None and one.fvu == pytest.approx(direct.text.fvu.value, rel=1e-9)


def written(folder: Path, values: dict[str, Tensor]) -> mm.Store:
    """A store of these sites, in shards of 40 rows."""
    specs = {name: SiteSpec(name, tuple(v.shape[1:]), "fp32") for name, v in values.items()}
    folder.mkdir()
    plan = {"model": {"name": "m", "weights": "w"}, "data": {"name": "d", "fingerprint": "d", "pairs": None},
            "sites": {name: spec.to_json() for name, spec in specs.items()}, "settings": {"shard_rows": 40}}  # fmt: skip
    n = len(next(iter(values.values())))
    with Lock(folder):
        begin(folder, plan, {"torch": "x"})
        writer = ShardWriter(folder)
        for number, start in enumerate(range(0, n, 40)):
            end = min(start + 40, n)
            writer.add([str(i) for i in range(start, end)], {k: v[start:end] for k, v in values.items()}, {})
            writer.close(number)
        finish(folder)
    return mm.Store(folder)


def test_a_head_without_decoder_has_counts_and_neighbourhoods_only(tmp_path: Path) -> None:
    found = mm.fidelity(NCL(16, 48), vectors(100, 16, 0), vectors(100, 16, 1))
    assert math.isnan(found.fvu) and math.isnan(found.image.cknna) and found.image.retrieval is None
    assert found.l0 > 0 and not math.isnan(found.image.cknna_latents) and not found.choices_kept()
    saved = json.loads(found.save(tmp_path / "f.json").read_text())
    assert saved["image"]["fvu"]["value"] is None and saved["image"]["retrieval"] is None


def test_results_as_tables_as_json_and_as_a_figure(sae: TopKSAE, tmp_path: Path) -> None:
    from matplotlib.patches import Rectangle

    from mmhooks.report.fidelity_figure import fidelity_figure

    found = mm.fidelity(sae, vectors(100, 16, 0), vectors(100, 16, 1), others=[TopKSAE(16, 48, 5, seed=1)])
    assert [row["modality"] for row in found.table()] == ["image", "text"]
    assert len(found.choices_kept()) == 6 and {row["task"] for row in found.choices_kept()} == {"retrieval"}
    saved = json.loads(found.save(tmp_path / "f.json").read_text())
    assert saved["kind"] == "FidelityResult" and saved["text"]["fvu"]["n"] == 100
    assert saved["image"]["retrieval"]["after"]["1"]["n"] == 100 and len(saved["stability"]) == 1
    histogram = saved["image"]["density_histogram"]
    assert sum(histogram["features"]) == sum(c > 0 for c in saved["image"]["counts"])
    figure = fidelity_figure(found)
    figure.savefig(tmp_path / "f.png")
    heights = [sum(p.get_height() for p in patches) for patches in figure.axes[0].containers]
    assert heights == [sum(c > 0 for c in m.sums.counts) for m in found.modalities]
    bars = [p.get_height() for p in figure.axes[1].patches if isinstance(p, Rectangle)]
    assert bars == [row[when] for when in ("before", "after") for row in found.choices_kept()]


def test_bad_input_says_what_was_given(sae: TopKSAE) -> None:
    x, y = vectors(20, 16, 0), vectors(20, 16, 1)
    with pytest.raises(ShapeMismatch, match="20 and 19 rows"):
        mm.fidelity(sae, x, y[:-1])
    with pytest.raises(ShapeMismatch, match="expected vectors of width 16"):
        mm.fidelity(sae, x[:, :8])
    with pytest.raises(NotFinite, match="row 3"):
        mm.fidelity(sae, x, y.index_fill(0, torch.tensor([3]), math.nan))
    with pytest.raises(MMHooksError, match="zero-shot: expected both"):
        mm.fidelity(sae, x, classes=y[:3])
    with pytest.raises(ShapeMismatch, match=r"3 classes for each of 20 rows, got 20 labels from 0 to 3"):
        mm.fidelity(sae, x, classes=y[:3], labels=torch.arange(20) % 4)
    with pytest.raises(ShapeMismatch, match="at least 11 for k = 10"):
        cknna(x[:9], y[:9])
    with pytest.raises(ShapeMismatch, match="the 2 queries, got 2 and 3"):
        ChoiceMetric(y, torch.arange(20), scale=1.0, ks=(1,)).update(x[:2], x[:2], torch.arange(3))


def test_the_sums_add_up_over_metrics(sae: TopKSAE) -> None:
    """What processes that share the batches would do."""
    x = normalize(vectors(50, 16, 0), dim=1)
    f = sae.encode(x).detach()
    parts = [FidelitySums(16, 48, sync_on_compute=False) for _ in range(2)]
    for part, rows in zip(parts, (slice(0, 20), slice(20, 50)), strict=True):
        part.update(x[rows], f[rows], sae.decode(f[rows]).detach())
    parts[0].merge_state(parts[1])
    assert parts[0].compute().fvu == pytest.approx(core(sae, x).fvu, rel=1e-6)
