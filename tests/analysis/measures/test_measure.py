"""All measures in one pass over a store: equal to those of whole tables, in one process and in two."""

from __future__ import annotations

import json
import math
import os
import socket
import statistics

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import save_file
from torch.nn.functional import normalize
from typer.testing import CliRunner

import mmhooks as mm
from mmhooks.analysis.measures.all_measures import Measures, measure
from mmhooks.analysis.measures.cknna import CKNNA, cknna
from mmhooks.analysis.measures.density import density
from mmhooks.analysis.measures.embed_sim import EmbedSim
from mmhooks.analysis.measures.groups import differs_from_half
from mmhooks.analysis.measures.modality_gap import modality_gap
from mmhooks.analysis.measures.monosemanticity import monosemanticity
from mmhooks.analysis.measures.samples import one_per_family, random_pool
from mmhooks.analysis.measures.win_rate import WinRate
from mmhooks.analysis.statistics.hypothesis_tests import benjamini_hochberg, permutation_test
from mmhooks.analysis.statistics.jackknife import GROUPS
from mmhooks.analysis.statistics.two_way import family_groups
from mmhooks.cli import app
from mmhooks.data.sparse_rows import SparseRows
from mmhooks.errors import MMHooksError, NotFinite, ShapeMismatch, UnknownSite, WrongHead
from mmhooks.heads import NCL, TopKSAE
from mmhooks.hooks.features import FeatureSet
from mmhooks.report.measures_page import markdown

N, D, FEATURES, K = 230, 12, 40, 4


class Rows:
    """One site of a store in memory."""

    def __init__(self, table):
        self.table, self.is_sparse = table, isinstance(table, SparseRows)
        self.shape = tuple(table.shape)

    def __len__(self):
        return len(self.table)

    def __getitem__(self, which):
        return self.table[which]


class MemoryStore:
    def __init__(self, sites, data="made up"):
        self._sites, self.sites = {k: Rows(v) for k, v in sites.items()}, list(sites)
        self.manifest = {"data": {"fingerprint": data}}

    def __len__(self):
        return len(next(iter(self._sites.values())))

    def __getitem__(self, site):
        return self._sites[site]


def made(seed=0):
    """Embeddings of pairs, a head, and its latents of both sides."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(N, D, generator=generator)
    image = shared + torch.randn(N, D, generator=generator) + 0.5
    text = shared + torch.randn(N, D, generator=generator) - 0.5
    sae = TopKSAE(D, FEATURES, K, seed=seed)
    latents = {}
    with torch.no_grad():
        for side, x in (("image", image), ("text", text)):
            latents[side] = SparseRows(*sae.encode_topk(sae.prepare(x)), FEATURES)
    sites = {
        "image.embed": image,
        "text.embed": text,
        "image.embed.sae.latents": latents["image"],
        "text.embed.sae.latents": latents["text"],
        "image.judge": torch.randn(N, 5, generator=generator),
    }
    return MemoryStore(sites), sae, latents


@pytest.fixture(scope="module")
def whole():
    store, sae, latents = made()
    return store, sae, latents, measure(store, head=sae, m=5, pool=60, progress=False)


def close(a, b, tolerance=1e-6):
    torch.testing.assert_close(
        torch.as_tensor(a).double(),
        torch.as_tensor(b).double(),
        equal_nan=True,
        rtol=tolerance,
        atol=tolerance,
    )


def test_equals_the_measures_of_whole_tables(whole):
    store, sae, latents, result = whole
    a, b = (latents[side].dense() for side in ("image", "text"))
    direct = mm.mds(a, b)
    close(result.mds.R, direct.R)
    close(result.mds.standard_error, direct.standard_error)
    assert result.mds.groups == tuple(FeatureSet(g.mask, FEATURES, head=sae.id) for g in direct.groups)
    assert result.mds.head == result.head == sae.id and result.data == result.mds.data == "made up"
    assert result.mds_over_samples.value == pytest.approx(result.mds.mu)
    assert result.mds_over_samples.low < result.mds.mu < result.mds_over_samples.high
    for side, table in (("image", a), ("text", b)):
        vectors = store[f"{side}.embed"].table
        assert torch.equal(result.top[side].indices, mm.top_activating(table, 5).indices)
        sim = mm.embed_sim(table, vectors, m=5)
        close(result.embed_sim[side].values, sim.values, 1e-5)
        close(result.embed_sim[side].paper, sim.paper, 1e-4)  # the same random samples of each feature
        assert result.embed_sim[side].excluded == sim.excluded
        close(result.win_rate[side].values, mm.win_rate(table, vectors, m=5, pool=60).values)
        close(result.monosemanticity[side].values, monosemanticity(table, vectors).values, 1e-5)
        close(result.density[side].values, density(table).values)
        assert result.density[side].l0 == density(table).l0
    gap = modality_gap(store["image.embed"].table, store["text.embed"].table)
    close(result.gap.gap.value, gap.gap.value)
    assert result.gap.gap.low < gap.gap.value < result.gap.gap.high
    close(result.gap.pair_cosine.value, gap.pair_cosine.value)
    together = a.T.double() @ b.double() / N
    unit = normalize(sae.W_dec.detach().double(), dim=1)
    close(result.bridge.own, (together * (unit @ unit.T)).diagonal(), 1e-5)
    assert result.cknna["image embeddings – text embeddings"].value == pytest.approx(
        cknna(store["image.embed"].table, store["text.embed"].table)
    )
    assert result.cknna["text embeddings – text latents"].value == pytest.approx(
        cknna(store["text.embed"].table, b)
    )
    assert len(result.cknna) == 4 and not result.skipped


def test_functions_take_a_store(whole):
    store, sae, latents, result = whole
    a, b = (latents[side].dense() for side in ("image", "text"))
    for found in (mm.mds(store, head=sae), mm.mds(store)):
        close(found.R, mm.mds(a, b).R)
    assert mm.mds(store).head == "image.embed.sae.latents" and mm.mds(store, head=sae).head == sae.id
    sites = {f"{side}": f"{side}.embed.sae.latents" for side in ("image", "text")}
    stored = measure(store, head=sae, **sites, m=5, pool=60, progress=False)
    close(stored.mds.R, result.mds.R)
    close(stored.bridge.own, result.bridge.own)
    close(mm.mds(store, image="image.embed", text="text.embed", kind="abs").R,
          mm.mds(store["image.embed"].table, store["text.embed"].table, kind="abs").R)  # fmt: skip
    judge = store["image.judge"].table
    close(mm.embed_sim(store, "image.judge", head=sae, m=5).values, mm.embed_sim(a, judge, m=5).values, 1e-4)
    close(mm.embed_sim(store, judge, m=5, pool=50).values, mm.embed_sim(a, judge, m=5, pool=50).values, 1e-4)
    close(mm.win_rate(store, head=sae, side="text", m=5).values,
          mm.win_rate(b, store["text.embed"].table, m=5).values)  # fmt: skip
    close(mm.monosemanticity(store, judge, head=sae).values, mm.monosemanticity(a, judge).values, 1e-5)
    assert torch.equal(
        mm.top_activating(store, 3, head=sae, side="text").indices, mm.top_activating(b, 3).indices
    )
    close(density(store, head=sae, side="text").values, density(b).values)
    close(modality_gap(store).gap.value, result.gap.gap.value)


def test_a_dense_head_and_another_judge():
    store, _, _ = made()
    ncl = NCL(D, FEATURES)
    with torch.no_grad():
        a, b = (ncl.encode(ncl.prepare(store[f"{s}.embed"].table)) for s in ("image", "text"))
    judge = store["image.judge"].table
    result = measure(store, head=ncl, embeddings={"image": "image.judge"}, m=5, progress=False)
    close(result.mds.R, mm.mds(a, b).R)
    close(result.embed_sim["image"].values, mm.embed_sim(a, judge, m=5).values, 1e-4)
    close(result.monosemanticity["image"].values, monosemanticity(a, judge).values, 1e-4)
    assert result.judges == {"image": "image.judge", "text": "text.embed"}
    assert result.bridge is None and "decoder" in result.skipped["bridges"]


def test_missing_inputs_are_reported(whole):
    store, sae, latents, _ = whole
    bare = MemoryStore({f"{s}.embed.sae.latents": latents[s] for s in ("image", "text")})
    result = measure(bare, m=5, progress=False)
    assert not result.embed_sim and result.gap is None and result.bridge is None
    assert len(result.skipped) == 5 and "image.embed" in " ".join(result.skipped.values())
    close(result.mds.R, mm.mds(latents["image"].dense(), latents["text"].dense()).R)
    assert "Skipped" in result.tables()
    with pytest.raises(UnknownSite, match=r"image\.embed"):
        measure(bare, head=sae, progress=False)
    with pytest.raises(UnknownSite, match="or give head="):
        mm.mds(MemoryStore({"image.embed": torch.rand(5, 3), "text.embed": torch.rand(5, 3)}))
    with pytest.raises(
        ShapeMismatch, match="vectors of width 12, as head 'sae' reads, got vectors of width 5"
    ):
        mm.mds(store, head=sae, image="image.judge")
    with pytest.raises(WrongHead, match="latents of head topk-.* with 20 features, got those of .* with 40"):
        mm.mds(store, head=TopKSAE(D, 20, K), image="image.embed.sae.latents")
    with pytest.raises(MMHooksError, match="expected a head over a store"):
        mm.mds(store, head="mini/sae")
    with pytest.raises(ShapeMismatch, match="got 7 for 230 pairs"):
        mm.embed_sim(store, torch.rand(7, 3))
    with pytest.raises(ShapeMismatch, match="one vector per row"):
        mm.mds(MemoryStore({"image.a.latents": torch.rand(5, 3, 2), "text.a.latents": torch.rand(5, 3)}))
    two = MemoryStore({"image.a.latents": torch.rand(5, 3), "image.b.latents": torch.rand(5, 3)})
    with pytest.raises(MMHooksError, match=r"image\.a\.latents, image\.b\.latents: choose one"):
        mm.mds(two)
    with pytest.raises(MMHooksError, match="got side"):
        measure(store, embeddings={"side": "image.judge"}, progress=False)
    broken = {s: store[f"{s}.embed"].table.clone() for s in ("image", "text")}
    broken["text"][117, 3] = math.nan
    with pytest.raises(NotFinite):
        measure(MemoryStore({f"{s}.embed": x for s, x in broken.items()}), head=sae, progress=False)
    with pytest.raises(NotFinite, match="rows 117"):
        measure(MemoryStore({f"{s}.a.latents": x for s, x in broken.items()}), progress=False)


def similarities(store, sae, rank=None):
    """EmbedSim and WinRate as metrics, over all batches or those of one of two processes."""
    metrics = EmbedSim(FEATURES, D, m=5, pool=60, seed=1), WinRate(FEATURES, D, m=5, pool=60)
    for number in range(0 if rank is None else rank, 23, 1 if rank is None else 2):
        x = store["image.embed"].table[10 * number : 10 * number + 10]
        with torch.no_grad():
            latents = SparseRows(*sae.encode_topk(sae.prepare(x)), FEATURES)
        for metric in metrics:
            metric.update(latents, x, start=10 * number)
    return metrics


def _rank(rank, port, path):
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    store, sae, _ = made()
    result = measure(store, head=sae, m=5, pool=60, progress=False)
    streamed = [metric.result().to_json() for metric in similarities(store, sae, rank)]
    (path / f"{rank}.json").write_text(json.dumps([result.to_json(), streamed]))
    torch.distributed.destroy_process_group()


def numbers_of(value, path=""):
    """Every number of a JSON value, with its place."""
    if isinstance(value, dict):
        for key, v in value.items():
            if key != "seconds":
                yield from numbers_of(v, f"{path}.{key}")
    elif isinstance(value, list):
        for i, v in enumerate(value):
            yield from numbers_of(v, f"{path}[{i}]")
    else:
        yield path, value


@pytest.mark.slow
def test_two_processes_give_the_measures_of_one(whole, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    mp.start_processes(_rank, (port, tmp_path), nprocs=2, start_method="spawn")
    streamed = [metric.result().to_json() for metric in similarities(*whole[:2])]
    expected = dict(numbers_of(json.loads(json.dumps([whole[3].to_json(), streamed]))))
    for rank in range(2):
        found = dict(numbers_of(json.loads((tmp_path / f"{rank}.json").read_text())))
        assert found.keys() == expected.keys()
        for place, value in expected.items():
            if isinstance(value, float):
                assert found[place] == pytest.approx(value, rel=1e-6, abs=1e-6), place
            else:
                assert found[place] == value, place


def test_written_down(whole, tmp_path):
    from mmhooks.report.measures_page import write_measures

    result = whole[3]
    paths = write_measures(result, tmp_path / "out")
    assert sorted(p.name for p in paths) == [
        "density.png",
        "groups.png",
        "mds.png",
        "measures.json",
        "measures.md",
    ]
    stored = json.loads((tmp_path / "out/measures.json").read_text())
    assert stored["kind"] == "Measures" and stored["n_pairs"] == N
    assert stored["embed_sim"]["text"]["values"][0] == pytest.approx(
        float(result.embed_sim["text"].values[0])
    )
    text = (tmp_path / "out/measures.md").read_text()
    for title in result.tables():
        assert f"## {title}" in text
    names = {row["measure"] for row in result.table()}
    assert names >= {"MDS μ", "L0", "EmbedSim", "WinRate", "MonoSemanticity", "modality gap"}
    assert all(row["n"] > 0 for row in result.table())
    evil = Measures(**{**result.__dict__, "data": "<script>|x", "skipped": {"a": "<b>|c"}})
    assert "<script>" not in markdown(evil) and "<b>" not in markdown(evil)


def test_command(tmp_path):
    from mmhooks.data.store.layout import SiteSpec
    from mmhooks.data.store.lock import Lock
    from mmhooks.data.store.writer import ShardWriter, begin, finish

    store, sae, latents = made()
    specs = [SiteSpec(f"{s}.embed", (D,), "fp32") for s in ("image", "text")]
    folder = tmp_path / "acts"
    folder.mkdir()
    plan = {
        "model": {"name": "m", "weights": "w"},
        "sites": {spec.name: spec.to_json() for spec in specs},
        "data": {"name": "made", "fingerprint": "f00", "pairs": None},
        "settings": {"shard_rows": 100},
    }
    with Lock(folder):
        begin(folder, plan, {"torch": "x"})
        writer = ShardWriter(folder)
        for number, start in enumerate(range(0, N, 100)):
            rows = slice(start, min(start + 100, N))
            values = {spec.name: store[spec.name].table[rows] for spec in specs}
            writer.add([f"p{i}" for i in range(rows.start, rows.stop)], values, {})
            writer.close(number)
        finish(folder)
    sae.save(tmp_path / "head")
    save_file({"v": store["image.judge"].table}, tmp_path / "v.safetensors")
    command = ["measure", str(folder), "--head", str(tmp_path / "head"), "--m", "5", "--no-progress",
               "--image-vectors", str(tmp_path / "v.safetensors")]  # fmt: skip
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "| MDS μ | both |" in done.output
    stored = json.loads((tmp_path / "acts-measures/measures.json").read_text())
    assert stored["data"] == "f00" and stored["judges"]["image"] == "given vectors"
    close(
        stored["mds"]["ratio_of_means"],
        mm.mds(latents["image"].dense(), latents["text"].dense()).ratio_of_means,
    )
    wrong = CliRunner().invoke(app, [*command[:-1], "nowhere.safetensors"])
    assert wrong.exit_code == 1 and "got nowhere.safetensors, which is not a file" in wrong.output


def test_cknna_is_the_mean_over_batches():
    torch.manual_seed(5)
    one = torch.randn(6, 30, 4)
    other = one + torch.randn(6, 30, 4)
    parts = CKNNA(k=5), CKNNA(k=5)
    for i in range(6):
        parts[i % 2].update(one[i], other[i])
    parts[0].merge_state(parts[1])
    found, values = parts[0].result(), [cknna(a, b, k=5) for a, b in zip(one, other, strict=True)]
    assert found.n == 6 and found.value == pytest.approx(sum(values) / 6)
    error = statistics.stdev(values) / math.sqrt(6)
    assert found.high - found.value == pytest.approx(2.5706 * error, rel=1e-3)
    empty = CKNNA(k=5)
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert math.isnan(empty.result().value)
    with pytest.raises(ShapeMismatch):
        empty.update(torch.randn(4, 3), torch.randn(4, 3))


def test_dominance_is_tested_feature_by_feature():
    torch.manual_seed(0)
    image, text = torch.rand(200, 60), torch.rand(200, 60)
    image[:, :20] *= 1.5
    image[:, 59] = text[:, 59] = 0
    image[3:, 58] = text[:, 58] = 0  # three pairs, all pictures: 2^-2 is the least that they can say
    result = mm.mds(image, text)
    tests = differs_from_half(result)
    assert tests.tested == 59 and math.isnan(float(tests.p[59])) and float(tests.p[58]) == 0.25
    assert tests.significant[:20].all() and int(tests.significant[20:].sum()) <= 2
    from scipy.stats import ttest_1samp

    ratios = (image[:, 30] / (image[:, 30] + text[:, 30])).double().numpy()
    assert float(tests.p[30]) == pytest.approx(float(ttest_1samp(ratios, 0.5).pvalue), rel=1e-4)


def test_benjamini_hochberg_is_its_definition():
    torch.manual_seed(1)
    p = torch.rand(40).double() ** 2
    p[5] = math.nan
    q = benjamini_hochberg(p)
    known = sorted(x for x in p.tolist() if not math.isnan(x))
    for value, adjusted in zip(p.tolist(), q.tolist(), strict=True):
        if math.isnan(value):
            assert math.isnan(adjusted)
            continue
        above = [min(1.0, x * len(known) / (i + 1)) for i, x in enumerate(known) if x >= value]
        assert adjusted == pytest.approx(min(above))
    null = torch.stack([benjamini_hochberg(torch.rand(50)) for _ in range(200)])
    assert float((null.min(1).values < 0.05).float().mean()) < 0.1


def test_permutation_of_groups():
    torch.manual_seed(2)
    values = torch.randn(50)
    values[:10] += 3
    one, other = FeatureSet(range(10), 50, name="a"), FeatureSet(range(10, 50), 50, name="b")
    found = permutation_test(values, one, other, draws=999)
    assert found.p == pytest.approx(2 / 1000) and found.plus == ("a", 10) and found.draws == 999
    difference = float(values[:10].mean() - values[10:].mean())
    assert found.difference == pytest.approx(difference, rel=1e-5)
    small = FeatureSet([20, 21, 22], 50), FeatureSet([23, 24], 50)  # few: every split is looked at
    exact = permutation_test(values, *small)
    from itertools import combinations

    pool = values[20:25].double().tolist()
    splits = [
        sum(pool[i] for i in c) / 3 - sum(pool[i] for i in range(5) if i not in c) / 2
        for c in combinations(range(5), 3)
    ]
    seen = exact.difference
    tails = [sum(s >= seen - 1e-9 for s in splits), sum(s <= seen + 1e-9 for s in splits)]
    assert exact.draws == 10 and exact.p == pytest.approx(min(1, 2 * min(tails) / 10))
    with pytest.raises(WrongHead, match="share 10 features"):
        permutation_test(values, one, one)
    for few in (FeatureSet([], 50), FeatureSet([49], 50)):  # of one feature, nothing can be permuted
        found = permutation_test(values, one, few)
        assert math.isnan(found.p) and found.draws == 0


def test_families_count_once_and_widen_the_intervals(whole):
    """Lists, values and control as of embed_sim with families; errors as of recomputing without each group."""
    store, sae, _, plain = whole
    families = torch.arange(N) // 2
    result = measure(store, head=sae, m=5, pool=60, families=families, progress=False)
    groups = family_groups(families)
    for side in ("image", "text"):
        table = sae.encode(sae.prepare(store[f"{side}.embed"][:]))
        top = result.top[side].indices
        assert torch.equal(top, mm.top_activating(table, 5, families=families).indices)
        for row in top.tolist():
            listed = [families[i] for i in row if i >= 0]
            assert len({int(f) for f in listed}) == len(listed)
        vectors = normalize(store[f"{side}.embed"][:], dim=1)
        expected = mm.embed_sim(table, vectors, m=5, pool=60, families=families)
        found = result.embed_sim[side]
        assert torch.allclose(found.values, expected.values, equal_nan=True, atol=1e-5)
        assert found.estimate.high - found.estimate.low > expected.estimate.high - expected.estimate.low
        means = []
        pool = one_per_family(families, N, 0)
        pool = pool[random_pool(len(pool), 60, 0)]
        for g in range(GROUPS):  # by hand, from the whole table
            keep = groups != g
            lists = mm.top_activating(table * keep[:, None], 5, families=families)
            s_plus = [
                float((vectors[r] @ vectors[r].T).fill_diagonal_(0).sum()) / (len(r) * (len(r) - 1))
                for r in (lists.of(k) for k in range(FEATURES))
                if len(r) >= 2
            ]
            rest = vectors[pool[keep[pool]]]
            s_minus = float((rest @ rest.T).fill_diagonal_(0).sum()) / (len(rest) * (len(rest) - 1))
            means.append((statistics.fmean(s_plus) - s_minus) / abs(s_minus))
        error = math.sqrt(statistics.pvariance(means) * (GROUPS - 1))
        assert result.family_errors[f"EmbedSim {side}"] == pytest.approx(error, rel=1e-3)
    assert result.settings["families"] == N // 2 and not plain.family_errors
    with pytest.raises(ShapeMismatch, match=f"families: expected one label for each of {N} samples, got 3"):
        measure(store, head=sae, families=torch.arange(3), progress=False)


def test_zeros_that_are_kept_fill_the_lists_of_alive_features(whole):
    store, sae, _, plain = whole
    result = measure(store, head=sae, m=20, pool=60, zeros="keep", progress=False)
    alive = result.mds.alive
    for side in ("image", "text"):
        table = sae.encode(sae.prepare(store[f"{side}.embed"][:]))
        assert result.top[side].count[alive].eq(20).all() and result.top[side].count[~alive].eq(0).all()
        for k in alive.nonzero().flatten().tolist():
            active = (table[:, k] > 0).sum().clamp_max(20)
            rows = result.top[side].of(k)
            assert (table[rows[:active], k] > 0).all() and (table[rows[active:], k] <= 0).all()
            assert len(rows.unique()) == 20
