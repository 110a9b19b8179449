"""Stores by token: the same numbers as a store by pair, read by pair, by grid, pooled, joined, merged and verified."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import pytest
import torch

import mmhooks as mm
from mmhooks.data.store.layout import SiteSpec
from mmhooks.data.store.lock import Lock
from mmhooks.data.store.merge import merge
from mmhooks.data.store.writer import ShardWriter, begin, finish
from mmhooks.errors import DataError, MMHooksError, OutOfRange, ShapeMismatch, StoreError
from mmhooks.heads import TopKSAE

sys.path.insert(0, str(Path(__file__).parent))
from tiny import bytes_of, folder_of_pairs, tiny_clip

OPTIONS = {"batch_size": 4, "shard_rows": 8, "workers": 0, "progress": False}
N, PATCHES, SITE, TEXT = 21, 4, "image.blocks.1.resid_post", "text.blocks.0.resid_post"
LATENTS = f"{SITE}.sae.latents"


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MMHOOKS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def model():
    model = tiny_clip()
    model.attach(TopKSAE(32, 64, k=4, normalize_input=False), at=[SITE, TEXT], name="sae")
    return model


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return mm.data.pairs(folder_of_pairs(tmp_path_factory.mktemp("pairs") / "photos", N), progress=False)


@pytest.fixture(scope="module")
def stores(model, pairs, tmp_path_factory):
    """The same extraction by pair and by token."""
    base = tmp_path_factory.mktemp("stores")
    by_pair = mm.extract(model, pairs, [SITE, LATENTS], base / "pairs", **OPTIONS)
    by_token = mm.extract(model, pairs, [SITE, LATENTS], base / "tokens", tokens="patch", **OPTIONS)
    return by_pair, by_token


def test_rows_are_the_patches_of_each_pair_in_order(stores, pairs):
    by_pair, store = stores
    whole = by_pair[SITE].tensor()[:, 1:]  # behind the class token
    assert len(store) == N * PATCHES and store.by_token and not by_pair.by_token
    assert torch.equal(store[SITE].tensor(), whole.flatten(0, 1))
    assert store.ids[:] == [key for key in pairs.ids for _ in range(PATCHES)]
    assert store.tokens.tolist() == list(range(PATCHES)) * N
    assert store.pairs.ids.to_pylist() == pairs.ids and len(store.pairs) == N
    assert store.verify() == [] and store.info["pairs"] == N and store.info["rows"] == N * PATCHES
    assert store[LATENTS].is_sparse
    assert torch.equal(store[LATENTS][:].dense(), by_pair[LATENTS].tensor()[:, 1:].flatten(0, 1))


def test_one_pair_one_grid_one_token(stores, pairs):
    by_pair, store = stores
    whole = by_pair[SITE].tensor()[:, 1:]
    for pair in (0, 7, -1, pairs.ids[9]):
        number = pairs.ids.index(pair) if isinstance(pair, str) else pair
        assert torch.equal(store.sequence(SITE, pair), whole[number])
        assert torch.equal(store.grid(SITE, pair), whole[number].view(2, 2, -1))
    dense = by_pair[LATENTS].tensor()[:, 1:]
    assert torch.equal(store.grid(LATENTS, 3), dense[3].view(2, 2, -1))
    assert torch.equal(store[SITE][5 * PATCHES + 2], whole[5, 2])
    for first, last in store.pairs.starts.unfold(0, 2, 1).tolist():
        assert len(set(store.ids[first:last])) == 1


@pytest.mark.parametrize("how", ["max", "mean", "any"])
def test_pooled_rows_are_those_of_the_dense_table(stores, how):
    by_pair, store = stores
    pooled = store.pool(how)
    assert len(pooled) == N and not pooled.by_token and pooled.ids == by_pair.ids
    for site in (SITE, LATENTS):
        table = by_pair[site].tensor()[:, 1:]
        table = table.dense() if hasattr(table, "dense") else table
        wanted = {"max": table.amax(1), "mean": table.mean(1), "any": (table != 0).any(1).float()}[how]
        assert torch.allclose(pooled[site].tensor(), wanted, atol=1e-6)
        picked = torch.tensor([3, 20, 0])
        assert torch.allclose(pooled[site][picked], wanted[picked], atol=1e-6)
        assert torch.allclose(torch.cat([c for _, c in pooled[site].chunks(5)]), wanted, atol=1e-6)


def test_texts_hold_as_many_rows_as_they_have_tokens(model, pairs, tmp_path):
    store = mm.extract(
        model, pairs, [TEXT, f"{TEXT}.sae.latents"], tmp_path / "acts", tokens="text", **OPTIONS
    )
    by_pair = mm.extract(model, pairs, [TEXT], tmp_path / "pairs", **OPTIONS)
    ids = model.tokenizer(pairs.texts)
    lengths = ids.argmax(1) + 1  # CLIP's end of text has the largest id
    assert store.pairs.counts.tolist() == lengths.tolist() and len(set(lengths.tolist())) > 1
    whole = by_pair[TEXT].tensor()
    for i in range(N):
        assert torch.equal(store.sequence(TEXT, i), whole[i, : lengths[i]])
    wanted = torch.stack([whole[i, : lengths[i]].amax(0) for i in range(N)])
    assert torch.equal(store.pool("max")[TEXT].tensor(), wanted)
    assert torch.equal(store.pool("mean")[TEXT][7], whole[7, : lengths[7]].mean(0))
    with pytest.raises(MMHooksError, match="expected a store of patches"):
        store.grid(TEXT, 0)


def test_mds_by_token_is_that_of_the_pooled_tables(model, pairs, stores, tmp_path):
    texts = mm.extract(model, pairs, [f"{TEXT}.sae.latents"], tmp_path / "acts", tokens="text", **OPTIONS)
    image, text = stores[1].pool("max"), texts.pool("max")
    both = image.join(text)
    found = mm.mds(both, image=LATENTS, text=f"{TEXT}.sae.latents")
    wanted = mm.mds(image[LATENTS].tensor(), text[f"{TEXT}.sae.latents"].tensor())
    assert torch.equal(found.R.nan_to_num(9), wanted.R.nan_to_num(9)) and not bool(found.R.isnan().all())


def test_measures_by_token_are_those_of_the_pooled_tables(model, pairs, stores, tmp_path):
    """EmbedSim, WinRate, MonoSemanticity and the others, in one pass over computed rows, as over tables in memory."""
    texts = mm.extract(model, pairs, [f"{TEXT}.sae.latents"], tmp_path / "acts", tokens="text", **OPTIONS)
    embeds = mm.extract(model, pairs, out=tmp_path / "embeds", **OPTIONS)
    both = stores[1].pool("max").join(texts.pool("max")).join(embeds)
    options = {
        "image": LATENTS,
        "text": f"{TEXT}.sae.latents",
        "m": 3,
        "pool": 15,
        "min_fires": 1,
        "progress": False,
    }
    found = mm.measure(both, **options)
    sites = {name: both[name][:] for name in both.sites}
    folder = tmp_path / "tables"
    specs = [SiteSpec(name, tuple(x.shape[1:]), "fp32") for name, x in sites.items()]
    plan = {key: embeds.manifest[key] for key in ("model", "data", "content")}
    plan |= {"sites": {spec.name: spec.to_json() for spec in specs}, "settings": {"shard_rows": N}}
    folder.mkdir()
    with Lock(folder):
        begin(folder, plan, {})
        writer = ShardWriter(folder)
        writer.add(pairs.ids, sites, {})
        writer.close(0)
        finish(folder)
    wanted = mm.measure(mm.Store(folder), **options)
    rows = [(r["measure"], r["side"], r["value"], r["n"]) for r in found.table()]
    assert {name for name, *_ in rows} >= {"MDS μ", "EmbedSim", "WinRate", "MonoSemanticity"}
    for (name, side, value, n), row in zip(rows, wanted.table(), strict=True):
        assert (name, side, n) == (row["measure"], row["side"], row["n"])
        assert value == pytest.approx(row["value"], rel=1e-5, abs=1e-6, nan_ok=True), name
    with pytest.raises(MMHooksError, match=r"rows are pairs.*pool its tokens first"):
        mm.measure(stores[1], **options)
    with pytest.raises(MMHooksError, match=r"rows are pairs.*pool its tokens first"):
        mm.mds(stores[1], image=LATENTS, text=SITE)


def test_views_keep_pairs_together(stores, pairs):
    _, store = stores
    some = store.select([pairs.ids[4], pairs.ids[1]])
    assert some.ids[:] == [pairs.ids[4]] * PATCHES + [pairs.ids[1]] * PATCHES
    assert torch.equal(some.grid(SITE, 1), store.grid(SITE, 1)) and len(some.pairs) == 2
    mixed = store.rows([9, 2, 3])
    assert mixed.tokens.tolist() == [1, 2, 3] and mixed.ids[:] == [pairs.ids[2], pairs.ids[0], pairs.ids[0]]
    with pytest.raises(ShapeMismatch, match="expected the 2 x 2 patches of pair 0, got 1"):
        mixed.grid(SITE, 0)
    for one in (store, some, mixed):
        copy = pickle.loads(pickle.dumps(one))
        assert torch.equal(copy.tokens, one.tokens) and torch.equal(copy[SITE][:2], one[SITE][:2])


def test_shuffled_batches_hold_every_token_once(stores):
    _, store = stores
    rows = torch.cat([b[SITE] for b in store.batches(16, sites=SITE, shuffle=True, seed=3)])
    assert rows.shape == (N * PATCHES, 32)
    assert torch.equal(rows.sum(1).sort().values, store[SITE].tensor().sum(1).sort().values)


def test_a_resumed_store_has_the_same_bytes(model, pairs, stores, tmp_path):
    import shutil

    _, store = stores
    out = tmp_path / "acts"
    shutil.copytree(store.folder, out)
    mm.extract(model, pairs, [SITE, LATENTS], tmp_path / "again", tokens="patch", **OPTIONS)
    assert bytes_of(tmp_path / "again") == bytes_of(store.folder)
    with pytest.raises(StoreError, match=r"settings\.tokens: 'patch' there, 'cls' here"):
        mm.extract(model, pairs, [SITE, LATENTS], out, tokens="cls", **OPTIONS)
    with pytest.raises(StoreError, match=r"settings\.tokens: 'patch' there, None here"):
        mm.extract(model, pairs, [SITE, LATENTS], out, **OPTIONS)


def test_datasets_opens_it(stores):
    import datasets

    _, store = stores
    found = datasets.load_from_disk(str(store.folder))
    assert found.num_rows == N * PATCHES and found[6]["token"] == 2
    assert torch.equal(torch.tensor(found[6][SITE]), store[SITE][6])


def test_merging(model, pairs, tmp_path):
    for name, part in (("a", pairs[:9]), ("b", pairs[9:])):
        mm.extract(model, part, [SITE], tmp_path / name, tokens="patch", **OPTIONS)
    whole = merge([tmp_path / "a", tmp_path / "b"], tmp_path / "whole")
    assert len(whole.pairs) == N and whole.verify() == [] and len(whole) == N * PATCHES
    mm.extract(model, pairs[9:], [SITE], tmp_path / "c", tokens="cls", **OPTIONS)
    with pytest.raises(StoreError, match=r"settings\.tokens: 'patch' there, 'cls' here"):
        merge([tmp_path / "a", tmp_path / "c"], tmp_path / "mixed")
    with pytest.raises(StoreError, match="the stores share pairs"):
        merge([tmp_path / "a", tmp_path / "a"], tmp_path / "twice")


def test_positions_slices_and_masks(model, pairs, stores, tmp_path):
    by_pair, _ = stores
    whole = by_pair[SITE].tensor()
    mask = torch.tensor([True, False, False, True, False])
    for name, tokens, chosen in (
        ("one", [0, 2], [0, 2]),
        ("some", slice(1, 3), [1, 2]),
        ("mask", mask, [0, 3]),
    ):
        store = mm.extract(model, pairs, [SITE], tmp_path / name, tokens=tokens, **OPTIONS)
        assert torch.equal(store[SITE].tensor(), whole[:, chosen].flatten(0, 1))
        assert store.tokens.tolist() == [0, 1] * N


def test_what_does_not_fit_is_refused(model, pairs, stores, tmp_path):
    by_pair, store = stores
    with pytest.raises(ShapeMismatch, match=r"as many tokens of each pair"):
        mm.extract(model, pairs, [SITE, "image.patches"], tmp_path / "a", tokens=slice(0, 99), **OPTIONS)
    with pytest.raises(ShapeMismatch, match="token dimension|site with tokens"):
        mm.extract(model, pairs, ["image.embed"], tmp_path / "b", tokens="patch", **OPTIONS)
    for read in (lambda: by_pair.tokens, lambda: by_pair.sequence(SITE, 0), lambda: by_pair.pool("max")):
        with pytest.raises(MMHooksError, match="expected a store by token"):
            read()
    with pytest.raises(OutOfRange, match="one of 21 pairs"):
        store.sequence(SITE, 21)
    with pytest.raises(DataError, match="one of 21 pairs, got 'nobody'"):
        store.sequence(SITE, "nobody")
    with pytest.raises(Exception, match="max"):
        store.pool("sum")
    with pytest.raises(DataError, match="one of them is by token"):
        store.join(mm.extract(model, pairs, "image.embed", tmp_path / "c", **OPTIONS))
