"""Reading a store: what comes back is what was written, however it is asked for."""

from __future__ import annotations

import json
import threading

import numpy as np
import pytest
import torch

import mmhooks as mm
from mmhooks.data.sparse_rows import SparseRows
from mmhooks.data.store.layout import SiteSpec
from mmhooks.data.store.lock import Lock
from mmhooks.data.store.merge import merge
from mmhooks.data.store.shard import Shard
from mmhooks.data.store.writer import ShardWriter, begin, finish
from mmhooks.errors import DataError, MMHooksError, NotFinite, ShapeMismatch, StoreError, UnknownSite
from mmhooks.heads import NCL, TopKSAE

SPECS = (
    SiteSpec("image.embed", (8,), "fp32"),
    SiteSpec("text.embed", (8,), "fp16"),
    SiteSpec("image.blocks.0.resid_post", (3, 4), "bf16"),
    SiteSpec("image.embed.sae.latents", (40,), "fp32", sparse=4, head="topk-x"),
)


def plan_of(specs=SPECS, shard_rows=10, name="made up", **model):
    return {
        "model": {"name": "m", "weights": "w", **model},
        "sites": {spec.name: spec.to_json() for spec in specs},
        "data": {"name": name, "fingerprint": name, "pairs": None},
        "settings": {"shard_rows": shard_rows},
    }


def values_of(n, specs=SPECS, seed=0):
    rng = torch.Generator().manual_seed(seed)
    values = {}
    for spec in specs:
        for column in spec.columns():
            if column.dtype.startswith("int"):
                drawn = torch.rand(n, spec.shape[0], generator=rng)
                values[column.name] = drawn.argsort(1)[:, : spec.sparse]  # distinct in a row
            else:
                values[column.name] = torch.rand(n, *column.shape, generator=rng) + 0.1
    return values


def write(folder, n=25, specs=SPECS, shard_rows=10, first=0, values=None, **names):
    """A store of ``n`` rows, as an extraction writes it; returns it with what was put in."""
    values = values or values_of(n, specs, seed=first)
    folder.mkdir(parents=True, exist_ok=True)
    with Lock(folder):
        begin(folder, plan_of(specs, shard_rows, **names), {"torch": "x"})
        writer = ShardWriter(folder)
        for number, start in enumerate(range(0, n, shard_rows)):
            for a in range(start, min(start + shard_rows, n), 4):  # several batches a shard
                b = min(a + 4, start + shard_rows, n)
                ids = [f"p{first + i}" for i in range(a, b)]
                writer.add(ids, {k: v[a:b] for k, v in values.items()}, {})
            writer.close(number)
        finish(folder)
    return mm.Store(folder), values


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return write(tmp_path_factory.mktemp("store") / "acts")


def dense(rows):
    return rows.dense() if isinstance(rows, SparseRows) else rows


def expected(values, site):
    """The whole table of a site as it was put in, in the precision it is kept in."""
    spec = next(s for s in SPECS if s.name == site)
    if spec.sparse is None:
        return values[site].to(
            {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[spec.dtype]
        )
    table = torch.zeros(len(values[f"{site}.values"]), spec.shape[0])
    return table.scatter(1, values[f"{site}.indices"], values[f"{site}.values"])


SITES = [spec.name for spec in SPECS]


@pytest.mark.parametrize("site", SITES)
def test_rows_come_back_as_they_were_written(made, site):
    store, values = made
    rows, want = store[site], expected(values, site)
    assert len(rows) == 25 and rows.shape == tuple(want.shape) and rows.dtype == want.dtype
    assert rows.is_sparse == (site == SITES[3])
    assert torch.equal(dense(rows.tensor()), want)
    assert torch.equal(dense(rows[7:21]), want[7:21]) and torch.equal(dense(rows[3:3]), want[3:3])
    assert torch.equal(dense(rows[20:2:-3]), want[list(range(20, 2, -3))])
    index = torch.tensor([24, 0, 10, 9, -1, 10])
    assert torch.equal(dense(rows[index]), want[index])
    mask = torch.arange(25) % 3 == 0
    assert torch.equal(dense(rows[mask]), want[mask])
    row = rows[12]
    assert torch.equal(row.dense()[0] if isinstance(row, SparseRows) else row, want[12])


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("size", [1, 4, 7, 100])
def test_chunks_stay_inside_shards_and_cover_all(made, site, size):
    store, values = made
    seen = 0
    for first, chunk in store[site].chunks(size):
        assert first == seen and 0 < len(chunk) <= size
        assert first // 10 == (first + len(chunk) - 1) // 10
        assert torch.equal(dense(chunk), expected(values, site)[first : first + len(chunk)])
        seen += len(chunk)
    assert seen == 25


def test_chunks_of_several_sites_belong_together(made):
    store, values = made
    for first, chunk in store.chunks(6):
        assert set(chunk) == set(SITES)
        for site, rows in chunk.items():
            assert torch.equal(dense(rows), expected(values, site)[first : first + len(rows)])


def test_reading_copies_nothing_and_writing_never_reaches_the_file(made):
    store, values = made
    a, b = store["image.embed"][0:4], store["image.embed"][2:6]
    assert a[2:].data_ptr() == b.data_ptr()
    part = store["image.embed"][10:12]
    part.zero_()
    assert torch.equal(mm.Store(store.folder)["image.embed"][10:12], values["image.embed"][10:12])
    store["image.embed"].release(10, 12)
    assert store.verify() == []


@pytest.mark.parametrize("index", [25, -26, [0, 25], torch.tensor([-26])])
def test_rows_outside_raise(made, index):
    with pytest.raises(IndexError, match="of 25"):
        made[0]["image.embed"][index]


def test_a_mask_of_another_length(made):
    with pytest.raises(ShapeMismatch, match=r"\(3,\) for 25 rows"):
        made[0]["image.embed"][torch.ones(3, dtype=torch.bool)]


def test_unknown_site_names_near_ones(made):
    with pytest.raises(UnknownSite, match=r"this store.*image\.embed"):
        made[0]["image.embedd"]


# -- batches -------------------------------------------------------------------------------------------------


def test_batches_in_order(made):
    store, values = made
    batches = list(store.batches(8))
    assert [len(b["image.embed"]) for b in batches] == [8, 8, 8, 1]
    for site in SITES:
        assert torch.equal(torch.cat([dense(b[site]) for b in batches]), expected(values, site))
    assert [len(b["image.embed"]) for b in store.batches(8, drop_last=True)] == [8, 8, 8]


@pytest.mark.parametrize("window", [1, 11, 10**6])
def test_shuffled_batches_hold_every_pair_once_with_all_of_its_sites(made, window):
    store, values = made
    where = {tuple(row.tolist()): i for i, row in enumerate(values["image.embed"])}
    seen = []
    for batch in store.batches(4, shuffle=True, seed=1, epoch=2, window=window):
        rows = [where[tuple(row.tolist())] for row in batch["image.embed"]]
        seen += rows
        for site in SITES:
            assert torch.equal(dense(batch[site]), expected(values, site)[rows])
    assert sorted(seen) == list(range(25))


def test_shuffling_follows_from_seed_and_epoch(made):
    store, _ = made

    def order(**options):
        return torch.cat(
            [b["image.embed"] for b in store.batches(4, sites="image.embed", shuffle=True, **options)]
        )

    assert torch.equal(order(seed=1, epoch=2), order(seed=1, epoch=2))
    assert not torch.equal(order(seed=1, epoch=2), order(seed=1, epoch=3))
    assert not torch.equal(order(seed=1, epoch=2), order(seed=2, epoch=2))


def test_a_batch_may_be_kept_and_written_into(made):
    store, values = made
    kept = []
    for batch in store.batches(5, sites=["image.embed"]):
        batch["image.embed"] += 1
        kept.append(batch["image.embed"])
    assert torch.equal(torch.cat(kept), values["image.embed"] + 1)
    assert torch.equal(store["image.embed"].tensor(), values["image.embed"])


# -- ids, views ----------------------------------------------------------------------------------------------


def test_ids_are_strings_in_row_order(made):
    store, _ = made
    want = [f"p{i}" for i in range(25)]
    assert store.ids == want and list(store.ids) == want and store.ids[-1] == "p24"
    assert store.ids[3:6] == want[3:6] and store.ids[::5] == want[::5] and "p7" in store.ids
    assert store.ids != want[:-1] and len(store.ids) == len(store) == 25
    with pytest.raises(IndexError):
        store.ids[25]


def test_select_by_id(made):
    store, values = made
    chosen = store.select(["p20", "p3", "p11"])
    assert len(chosen) == 3 and chosen.ids == ["p20", "p3", "p11"]
    for site in SITES:
        assert torch.equal(dense(chosen[site].tensor()), expected(values, site)[[20, 3, 11]])
        assert torch.equal(dense(chosen[site][1:]), expected(values, site)[[3, 11]])
    again = chosen.select(["p11"])
    assert torch.equal(again["image.embed"].tensor(), values["image.embed"][[11]])
    assert sum(len(b["image.embed"]) for b in chosen.batches(2, shuffle=True)) == 3
    with pytest.raises(DataError, match=r"2 of 3 ids are not in .*\(25 rows\), the first is 'nobody'"):
        store.select(["p1", "nobody", "noone"])
    with pytest.raises(DataError, match="at least one of 0..24"):
        store.rows([25])


@pytest.mark.parametrize(
    "form",
    [
        np.array,
        torch.tensor,
        list,
        tuple,
        lambda m: np.array(m, dtype=object),
        lambda m: list(np.array(m)),
    ],
)
def test_rows_by_a_mask_of_any_kind(made, form):
    store, values = made
    mask = [i in (3, 11, 20) for i in range(25)]
    for chosen in (store.rows(form(mask)), store.rows(form([3, 11, 20])), store.rows([-22, np.int8(11), 20])):
        assert chosen.ids == ["p3", "p11", "p20"]
        for site in SITES:
            assert torch.equal(dense(chosen[site].tensor()), expected(values, site)[[3, 11, 20]])
    for site in SITES:
        for index in (form(mask), form([3, 11, 20]), [3, -14, 20]):
            assert torch.equal(dense(store[site][index]), expected(values, site)[[3, 11, 20]])
        assert torch.equal(dense(store[site][np.int64(-2)]), dense(store[site][23]))
    assert store.ids[form(mask)] == ["p3", "p11", "p20"] and store.ids[np.int64(-1)] == "p24"
    assert store.rows(slice(1, 9, 3)).ids == ["p1", "p4", "p7"]


@pytest.mark.parametrize("rows", [
    np.ones(25), torch.ones(25), [0.5], [True, 2], np.ones(24, bool), True, np.True_, "p3", None, [26], [-26], [], {1: 2},
])  # fmt: skip
def test_rows_that_are_refused(made, rows):
    store, _ = made
    with pytest.raises(DataError, match="rows of a store of 25 pairs"):
        store.rows(rows)
    if not isinstance(rows, list) or rows:
        with pytest.raises((ShapeMismatch, IndexError), match="rows"):
            _ = store["image.embed"][rows]
        with pytest.raises((ShapeMismatch, IndexError), match="ids"):
            _ = store.ids[rows]


@pytest.mark.parametrize(
    "ids", [[3], np.array([1, 2]), [True] * 25, torch.ones(25, dtype=torch.bool), "p3", 3, [None], [b"p3"]]
)
def test_ids_that_are_none(made, ids):
    with pytest.raises(DataError, match=r"list of strings, got .*store\.rows"):
        made[0].select(ids)


def test_join_brings_both_sides_of_a_pair_together(tmp_path):
    images, a = write(tmp_path / "a", 25, SPECS[:1])
    order = torch.randperm(25, generator=torch.Generator().manual_seed(1))
    texts, b = write(tmp_path / "b", 25, SPECS[1:2], shard_rows=6)
    both = images.join(texts)
    assert both.sites == ["image.embed", "text.embed"] and len(both) == 25
    assert torch.equal(both["text.embed"].tensor(), b["text.embed"].half())
    mixed = images.join(texts.rows(order))  # ids in another order
    assert mixed.ids == images.ids
    assert torch.equal(mixed["text.embed"].tensor(), b["text.embed"].half())
    assert torch.equal(mixed["image.embed"].tensor(), a["image.embed"])
    for first, chunk in both.chunks(8):  # cut at the shards of both
        assert torch.equal(
            chunk["text.embed"], b["text.embed"].half()[first : first + len(chunk["text.embed"])]
        )
    few = texts.select(["p7", "p2"])
    with pytest.raises(DataError, match=r"25 and 2 pairs; partial=True"):
        images.join(few)
    part = images.join(few, partial=True)
    assert part.ids == ["p2", "p7"] and torch.equal(part["image.embed"].tensor(), a["image.embed"][[2, 7]])
    with pytest.raises(DataError, match=r"both stores have image\.embed"):
        images.join(images)
    far, _ = write(tmp_path / "c", 25, SPECS[1:2], first=100)
    with pytest.raises(DataError, match=r"25 of 25 ids are not in the first store"):
        images.join(far)
    with pytest.raises(DataError, match="got none of 25 ids"):
        images.join(far, partial=True)


@pytest.mark.parametrize("head", [TopKSAE(8, 64, k=4, seed=3), TopKSAE(8, 16, k=8), NCL(8, 32, hidden=16)])
def test_a_head_is_applied_to_stored_rows(made, head):
    store, values = made
    view = store.apply(head, at=["image.embed"])
    rows = view[f"image.embed.{head.name}.latents"]
    with torch.no_grad():
        want = head.encode(head.prepare(values["image.embed"]))
    assert rows.shape == (25, head.n_features) and rows.is_sparse == (head.n_features == 64)
    assert torch.allclose(dense(rows.tensor()), want, atol=1e-6)
    chunks = [dense(chunk) for _, chunk in rows.chunks(7)]
    assert torch.allclose(torch.cat(chunks), want, atol=1e-6)
    assert torch.allclose(dense(rows[torch.tensor([9, 3])]), want[[9, 3]], atol=1e-6)
    assert store.sites == SITES  # the store itself is what it was


def test_a_head_of_another_width(made):
    with pytest.raises(ShapeMismatch, match=r"width 5, got rows of shape \(8,\) at 'image\.embed'"):
        made[0].apply(TopKSAE(5, 16, k=2), at="image.embed")


def test_datasets_opens_it(made):
    import datasets

    store, values = made
    found = datasets.load_from_disk(str(store.folder))
    assert len(found) == 25 and found["id"][:] == list(store.ids)
    table = found.with_format("numpy")
    assert np.array_equal(table["image.embed"][:], values["image.embed"].numpy())
    assert np.array_equal(table["text.embed"][:], values["text.embed"].half().numpy())
    bits = torch.from_numpy(np.stack(table["image.blocks.0.resid_post"][:]).astype(np.uint16))
    assert torch.equal(bits.view(torch.bfloat16), values["image.blocks.0.resid_post"].bfloat16())
    assert np.array_equal(
        table["image.embed.sae.latents.indices"][:], values["image.embed.sae.latents.indices"].numpy()
    )


def test_two_threads_read_at_once(made):
    store, values = made
    faults = []

    def read():
        for _ in range(20):
            whole = torch.cat([b["image.embed"] for b in store.batches(3)])
            if not torch.equal(whole, values["image.embed"]):
                faults.append(1)

    threads = [threading.Thread(target=read) for _ in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not faults


# -- writing -------------------------------------------------------------------------------------------------


def test_the_same_content_gives_the_same_bytes(tmp_path):
    a, _ = write(tmp_path / "a")
    b, _ = write(tmp_path / "b")
    names = sorted(p.name for p in a.folder.iterdir())
    assert names == [
        "data-00000.arrow", "data-00001.arrow", "data-00002.arrow", "dataset_info.json", "manifest.json", "state.json",
    ]  # fmt: skip
    for name in names:
        assert (a.folder / name).read_bytes() == (b.folder / name).read_bytes()


def writer_for(tmp_path, specs=SPECS[:1]):
    (tmp_path / "w").mkdir()
    begin(tmp_path / "w", plan_of(specs), {})
    return ShardWriter(tmp_path / "w")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_names_the_pair(tmp_path, bad):
    writer = writer_for(tmp_path)
    value = torch.ones(3, 8)
    value[1, 4] = bad
    with pytest.raises(NotFinite, match=r"image\.embed: NaN or infinity in 1 of 3 rows.*pair 'b'"):
        writer.add(["a", "b", "c"], {"image.embed": value}, {})


def test_what_fp16_cannot_hold_is_said(tmp_path):
    writer = writer_for(tmp_path, SPECS[1:2])
    with pytest.raises(NotFinite, match=r"pair 'a': values up to 1e\+05 do not fit fp16.*use fp32 or bf16"):
        writer.add(["a"], {"text.embed": torch.full((1, 8), 1e5)}, {})


def test_rows_of_another_shape(tmp_path):
    writer = writer_for(tmp_path)
    with pytest.raises(ShapeMismatch, match=r"rows of shape \(8,\), got \(9,\)"):
        writer.add(["a"], {"image.embed": torch.ones(1, 9)}, {})
    with pytest.raises(ShapeMismatch, match="one row for each of 1 pairs, got 2 rows"):
        writer.add(["a"], {"image.embed": torch.ones(2, 8)}, {})


def test_merge(tmp_path):
    a, x = write(tmp_path / "a", 25)
    b, y = write(tmp_path / "b", 13, first=25, name="more")
    both = merge([a.folder, b.folder], tmp_path / "both")
    assert both.ids == [f"p{i}" for i in range(38)] and both.verify() == []
    for site in SITES:
        want = torch.cat([expected(x, site), expected(y, site)])
        assert torch.equal(dense(both[site].tensor()), want)
    assert both.manifest["data"]["name"] == "made up + more" and both.manifest["data"]["pairs"] == 38
    with pytest.raises(StoreError, match="not empty"):
        merge([a.folder], tmp_path / "both")
    with pytest.raises(StoreError, match=r"share pairs: 25 ids occur more than once, the first is 'p0'"):
        merge([a.folder, a.folder], tmp_path / "twice")
    assert not (tmp_path / "twice").exists()
    other, _ = write(tmp_path / "other", 5, SPECS[:2], first=90)
    with pytest.raises(StoreError, match=r"cannot be merged with .*sites\."):
        merge([a.folder, other.folder], tmp_path / "no")
    elsewhere, _ = write(tmp_path / "elsewhere", 5, first=90, weights="v")
    with pytest.raises(StoreError, match=r"model\.weights: 'w' there, 'v' here"):
        merge([a.folder, elsewhere.folder], tmp_path / "no")


def test_info_says_what_is_there(made):
    info = made[0].info
    assert info["pairs"] == 25 and info["shards"] == 3 and info["complete"]
    assert info["sites"]["image.embed.sae.latents"]["kept as"] == "4 of 40 entries"
    with pytest.raises(MMHooksError, match="view"):
        _ = made[0].select(["p1"]).info


# -- faults --------------------------------------------------------------------------------------------------


def kinds(store):
    return {(fault.file, fault.kind) for fault in store.verify()}


def test_a_flipped_byte_anywhere_is_found(tmp_path):
    store, _ = write(tmp_path / "acts", 12)
    rng = np.random.default_rng(0)
    for path in sorted(store.folder.iterdir()):
        data = bytearray(path.read_bytes())
        for place in rng.integers(0, len(data), 5):
            flipped = bytearray(data)
            flipped[place] ^= 1 << int(rng.integers(8))
            path.write_bytes(flipped)
            assert kinds(store) == {(path.name, "altered")}, place
        path.write_bytes(data)
    assert store.verify() == []


def test_truncated_missing_and_surplus_files_are_all_found_at_once(tmp_path):
    store, values = write(tmp_path / "acts")
    shard = store.folder / "data-00000.arrow"
    shard.write_bytes(shard.read_bytes()[:-64])
    (store.folder / "data-00002.arrow").unlink()
    (store.folder / "data-00009.arrow").write_bytes(b"x")
    assert kinds(store) == {
        ("data-00000.arrow", "truncated"), ("data-00002.arrow", "missing"), ("data-00009.arrow", "surplus"),
    }  # fmt: skip
    fresh = mm.Store(store.folder)
    with pytest.raises(
        StoreError, match=r"data-00000\.arrow: expected \d+ bytes by the manifest, got \d+.*store verify"
    ):
        fresh["image.embed"][0]
    with pytest.raises(StoreError, match=r"data-00002\.arrow is missing"):
        fresh["image.embed"][24]
    assert torch.equal(fresh["image.embed"][10:20], values["image.embed"][10:20])  # the rest is there


def test_a_shard_that_is_no_arrow_file_any_more(tmp_path):
    store, _ = write(tmp_path / "acts", 5)
    path = store.folder / "data-00000.arrow"
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(StoreError, match="no longer an Arrow stream"):
        _ = mm.Store(store.folder)["image.embed"][0]


def test_a_shard_of_other_columns(tmp_path):
    store, _ = write(tmp_path / "acts", 5)
    entry = store.manifest["shards"][0]
    with pytest.raises(StoreError, match=r"data-00000\.arrow: expected 5 rows of .* got 5 rows of"):
        Shard(store.folder / entry["file"], entry, SPECS[0].columns())


def test_no_store_there(tmp_path):
    with pytest.raises(StoreError, match=r"no activation store in .*manifest\.json is missing"):
        mm.Store(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff\xfe"])
def test_a_damaged_manifest(tmp_path, content):
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(StoreError, match="is damaged"):
        mm.Store(tmp_path)


def test_a_later_format(tmp_path):
    store, _ = write(tmp_path / "acts", 5)
    path = store.folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 9}))
    with pytest.raises(StoreError, match="expected a format up to 3, got 9"):
        mm.Store(store.folder)


def test_a_store_larger_than_memory_is_read_ahead_and_given_back(made, monkeypatch):
    from mmhooks.data.store import store as module

    store, values = made
    monkeypatch.setattr(module, "LARGE", 0)
    seen = [b["image.embed"] for b in store.batches(4, shuffle=True, window=3)]
    assert torch.equal(torch.cat(seen).sort(dim=0).values, values["image.embed"].sort(dim=0).values)
