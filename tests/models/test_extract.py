"""Extraction: what is stored is what the model gives, from every source, and nothing that is written is lost."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import mmhooks as mm
from mmhooks.data.store import shard as shard_file
from mmhooks.data.store.background import Background
from mmhooks.data.store.check import verify
from mmhooks.data.store.lock import Lock
from mmhooks.data.store.writer import ShardWriter
from mmhooks.errors import DataError, MMHooksError, NotFinite, ShapeMismatch, StoreError, UnknownSite
from mmhooks.heads import NCL, TopKSAE

# As the scripts there import it: a store says whose code prepared its images.
sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
from tiny import bytes_of, encoded, folder_of_pairs, preprocess, text, tiny_clip

DATA = Path(__file__).parents[1] / "data"
OPTIONS = {"batch_size": 4, "shard_rows": 8, "workers": 0, "progress": False}
N = 41


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MMHOOKS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))


@pytest.fixture(scope="module")
def model():
    return tiny_clip()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return folder_of_pairs(tmp_path_factory.mktemp("pairs") / "photos", N)


@pytest.fixture(scope="module")
def pairs(place):
    return mm.data.pairs(place, progress=False)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """The same pairs as two Parquet files with picture bytes."""
    import datasets

    place = tmp_path_factory.mktemp("table")
    for part, rows in enumerate((range(20), range(20, N))):
        rows = {
            "image": [{"bytes": encoded(i), "path": None} for i in rows],
            "caption": [text(i) for i in rows],
        }
        found = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
        found.to_parquet(place / f"{part}.parquet")
    return place


@torch.no_grad()
def by_hand(model, pairs, sites):
    """Site values of all pairs, batch by batch as the extraction takes them."""
    parts = []
    for first in range(0, len(pairs), 8):
        for a in range(first, min(first + 8, len(pairs)), 4):
            rows = range(a, min(a + 4, first + 8, len(pairs)))
            images = torch.stack([preprocess(pairs.image(i)) for i in rows])
            texts = model.tokenizer([pairs.texts[i] for i in rows])
            parts.append(model.run_with_cache(images, texts, sites=sites)[1])
    return {site: torch.cat([part[site] for part in parts]) for site in parts[0]}


SITES = [
    "*.embed",
    "image.blocks.1.resid_post",
    "text.blocks.0.attn.pattern",
    "visual.transformer.resblocks.0.ln_1",
]


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("workers", [0, 2])
def test_the_store_holds_what_the_model_gives(model, pairs, tmp_path, dtype, workers):
    store = mm.extract(model, pairs, SITES, tmp_path / "acts", dtype=dtype, **OPTIONS | {"workers": workers})
    want = by_hand(model, pairs, SITES)
    assert store.ids == pairs.ids and set(store.sites) == set(want) and len(store.sites) == 5
    assert store.sites[:2] == ["image.embed", "text.embed"]  # as they were asked for
    kind = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    for site, value in want.items():
        assert torch.equal(store[site].tensor(), value.to(kind)), site
    assert store.verify() == []
    about = store.manifest
    assert about["model"]["name"] == "tiny" and about["data"]["fingerprint"] == pairs.fingerprint
    assert about["versions"]["torch"] == version("torch")
    assert about["pairs"] == N and [s["rows"] for s in about["shards"]] == [8, 8, 8, 8, 8, 1]


def test_latents_of_heads(pairs, tmp_path):
    model = tiny_clip()
    sae, ncl = TopKSAE(24, 96, k=8), NCL(24, 32, hidden=16)
    model.attach(sae, at=["image.embed", "text.embed"])
    model.attach(ncl, at="image.embed")
    sites = ["*.latents", "image.embed.sae.pre"]
    store = mm.extract(model, pairs, sites, tmp_path / "acts", **OPTIONS)
    want = by_hand(model, pairs, sites)
    for side in ("image", "text"):
        rows = store[f"{side}.embed.sae.latents"]
        assert (
            rows.is_sparse
            and rows.shape == (N, 96)
            and store.manifest["sites"][rows.spec.name]["head"] == sae.id
        )
        assert torch.equal(rows.tensor().dense(), want[rows.spec.name])
        values = rows.tensor().values
        assert torch.equal(values, values.sort(dim=1, descending=True).values)
    assert not store["image.embed.ncl.latents"].is_sparse and not store["image.embed.sae.pre"].is_sparse
    assert torch.equal(store["image.embed.ncl.latents"].tensor(), want["image.embed.ncl.latents"])
    whole = mm.extract(model, pairs, sites, tmp_path / "dense", sparse=False, **OPTIONS)
    assert torch.equal(whole["text.embed.sae.latents"].tensor(), want["text.embed.sae.latents"])


def test_latents_stored_equal_latents_applied(pairs, tmp_path):
    model = tiny_clip()
    sae = TopKSAE(24, 96, k=8)
    model.attach(sae, at="image.embed")
    store = mm.extract(model, pairs, ["image.embed", "image.embed.sae.latents"], tmp_path / "acts", **OPTIONS)
    plain = mm.extract(model, pairs, "image.embed", tmp_path / "plain", **OPTIONS)
    applied = plain.apply(sae, at="image.embed")["image.embed.sae.latents"]
    assert torch.allclose(
        applied.tensor().dense(), store["image.embed.sae.latents"].tensor().dense(), atol=1e-6
    )


def test_edits_that_are_open_act_and_are_noted(pairs, tmp_path):
    model = tiny_clip()
    sae = TopKSAE(24, 96, k=8)
    model.attach(sae, at="image.embed")
    out, sites = tmp_path / "acts", ["image.embed.sae.latents"]
    with model.hooks(mm.Zero(range(48))):
        store = mm.extract(model, pairs, sites, out, **OPTIONS)
    latents = store["image.embed.sae.latents"].tensor().dense()
    assert not latents[:, :48].any() and latents[:, 48:].any()
    assert store.manifest["model"]["edits"]
    with pytest.raises(StoreError, match=r"model\.edits"):
        mm.extract(model, pairs, sites, out, **OPTIONS)
    with (
        model.hooks(mm.Clamp(range(48), min=1.0)),
        pytest.raises(ShapeMismatch, match="promises 8.*sparse=False"),
    ):
        mm.extract(model, pairs, sites, tmp_path / "more", **OPTIONS)


def test_only_the_towers_that_are_asked_run(pairs, tmp_path):
    model = tiny_clip()
    model.preprocess = None
    store = mm.extract(model, pairs, "text.embed", tmp_path / "acts", **OPTIONS)
    assert len(store) == N
    with pytest.raises(MMHooksError, match=r"image tower need the model's preprocess.*mm\.hook"):
        mm.extract(model, pairs, "image.embed", tmp_path / "no", **OPTIONS)


def test_mini_is_extracted(tmp_path, monkeypatch):
    monkeypatch.delenv("MMHOOKS_CACHE")
    model = mm.load("mini")
    model.attach(mm.load_head("mini/sae"), at=["image.embed", "text.embed"])
    pairs = mm.data.pairs("mini", limit=20)
    store = mm.extract(model, pairs, ["*.embed", "*.sae.latents"], tmp_path / "acts", progress=False)
    assert len(store) == 20 and store["image.embed.sae.latents"].is_sparse
    image, text = (store[f"{side}.embed.sae.latents"].tensor().dense() for side in ("image", "text"))
    assert mm.mds(image, text).n_pairs == 20


def test_sites_that_cannot_be_kept(model, pairs, tmp_path):
    with pytest.raises(UnknownSite, match=r"image\.embed"):
        mm.extract(model, pairs, "image.embd", tmp_path / "acts", **OPTIONS)
    with pytest.raises(MMHooksError, match="no site to extract"):
        mm.extract(model, pairs, [], tmp_path / "acts", **OPTIONS)
    with pytest.raises(MMHooksError, match="batch_size and shard_rows must be at least 1, got 0"):
        mm.extract(model, pairs, "*.embed", tmp_path / "acts", batch_size=0)
    assert not (tmp_path / "acts").exists()


# -- sources -------------------------------------------------------------------------------------------------


def tar_of(place, rows):
    with tarfile.open(place, "w") as tar:
        for i in rows:
            for end, data in (("png", encoded(i)), ("txt", text(i).encode())):
                entry = tarfile.TarInfo(f"{i:09d}.{end}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    place = tmp_path_factory.mktemp("tars")
    tar_of(place / "0000.tar", range(20))
    tar_of(place / "0001.tar", range(20, N))
    return place


@pytest.fixture(scope="module")
def reference(model, pairs, tmp_path_factory):
    return mm.extract(model, pairs, out=tmp_path_factory.mktemp("reference") / "acts", **OPTIONS)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "kind", ["parquet folder", "parquet glob", "one parquet", "tar glob", "tar folder", "saved"]
)
def test_every_source_gives_the_same_rows(model, reference, table, tars, tmp_path, kind, streaming):
    source = {
        "parquet folder": table, "parquet glob": table / "*.parquet", "one parquet": table / "0.parquet",
        "tar glob": tars / "*.tar", "tar folder": tars, "saved": tmp_path / "saved",
    }[kind]  # fmt: skip
    if kind == "saved":
        import datasets

        datasets.load_dataset("parquet", data_files=str(table / "*.parquet"), split="train").save_to_disk(
            source
        )
    if streaming:
        found = mm.data.pair_stream(source)
        assert not hasattr(found, "__len__") and next(iter(found)).text == text(0)
    else:
        found = mm.data.pairs(source, progress=False)
    store = mm.extract(model, found, out=tmp_path / "acts", **OPTIONS)
    n = 20 if kind == "one parquet" else N
    assert len(store) == n and store.verify() == []
    assert len(set(store.ids)) == n
    for site in store.sites:
        assert torch.equal(store[site].tensor(), reference[site][:n])


def test_a_stream_with_a_limit(model, table, reference, tmp_path):
    stream = mm.data.pair_stream(table, limit=13)
    store = mm.extract(model, stream, out=tmp_path / "acts", **OPTIONS)
    assert torch.allclose(store["image.embed"].tensor(), reference["image.embed"][:13], atol=1e-5)
    assert store.manifest["data"]["pairs"] is None and store.manifest["settings"]["ranks"] == 1


def test_bad_rows_of_a_stream(model, reference, tmp_path):
    import datasets

    bad = {3: b"no picture", 9: b"", 17: encoded(17)[:60]}
    rows = {
        "image": [{"bytes": bad.get(i, encoded(i)), "path": None} for i in range(24)],
        "caption": ["" if i == 20 else text(i) for i in range(24)],
        "id": [f"no{i}" for i in range(24)],
    }
    rows["image"][8:16] = [{"bytes": b"x", "path": None}] * 8  # a shard of nothing else
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).to_parquet(
        tmp_path / "bad.parquet"
    )
    with pytest.raises(DataError, match=r'bad\.parquet, no3: its image cannot be read.*on_error="skip"'):
        mm.extract(model, mm.data.pair_stream(tmp_path / "bad.parquet"), out=tmp_path / "no", **OPTIONS)
    stream = mm.data.pair_stream(tmp_path / "bad.parquet", on_error="skip")
    for workers in (0, 2):
        out = tmp_path / f"acts{workers}"
        store = mm.extract(model, stream, out=out, **OPTIONS | {"workers": workers})
        left_out = {3, *range(8, 16), 17, 20}
        assert store.ids == [f"no{i}" for i in range(24) if i not in left_out] and store.verify() == []
        assert set(store.manifest["skipped"]) == {f"no{i}" for i in left_out}
        assert store.manifest["skipped"]["no20"] == "its text is empty"
        kept = [i for i in range(24) if i not in left_out]
        assert torch.allclose(store["image.embed"].tensor(), reference["image.embed"][kept], atol=1e-5)
    nothing = tmp_path / "nothing.parquet"
    rows = {"image": [{"bytes": b"x", "path": None}] * 3, "caption": ["a"] * 3}
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).to_parquet(nothing)
    with pytest.raises(StoreError, match="no rows: every pair of its source was skipped"):
        mm.extract(model, mm.data.pair_stream(nothing, on_error="skip"), out=tmp_path / "none", **OPTIONS)


def test_a_picture_that_went_away_is_named_and_what_was_done_stays(model, place, tmp_path):
    mine = tmp_path / "photos"
    shutil.copytree(place, mine)
    pairs = mm.data.pairs(mine, progress=False)
    (mine / "020.png").unlink()
    for workers in (0, 2):
        out = tmp_path / f"acts{workers}"
        with pytest.raises(DataError, match=r"pair '020\.png'") as caught:
            mm.extract(model, pairs, out=out, **OPTIONS | {"workers": workers})
        assert "Traceback" not in str(caught.value)
        with pytest.raises(StoreError, match=r"is unfinished.*Repeat the mm\.extract call"):
            mm.Store(out)
    shutil.copy(place / "020.png", mine / "020.png")
    for workers in (0, 2):
        store = mm.extract(model, pairs, out=tmp_path / f"acts{workers}", **OPTIONS)
        assert len(store) == N and store.verify() == []


# -- going on, and what is refused -----------------------------------------------------------------------------


def test_a_finished_store_is_opened_without_running_the_model(model, pairs, tmp_path, monkeypatch):
    mm.extract(model, pairs, out=tmp_path / "acts", **OPTIONS)
    before = bytes_of(tmp_path / "acts")
    calls, run = [], mm.HookedCLIP.forward

    def counted(self, *, images, texts):
        calls.append(len(images))
        return run(self, images, texts)

    monkeypatch.setattr(mm.HookedCLIP, "forward", counted)
    assert len(mm.extract(model, pairs, out=tmp_path / "acts", **OPTIONS)) == N
    assert calls == [1]  # the blank pair that tells shapes
    assert bytes_of(tmp_path / "acts") == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dtype": "fp16"}, r"sites\.image\.embed\.dtype: 'fp32' there, 'fp16' here"),
        ({"batch_size": 2}, r"settings\.batch_size: 4 there, 2 here"),
        ({"shard_rows": 16}, r"settings\.shard_rows: 8 there, 16 here"),
        ({"sites": ["image.embed"]}, r"sites\.text\.embed"),
    ],
)
def test_other_settings_are_refused(model, pairs, tmp_path, change, said):
    mm.extract(model, pairs, out=tmp_path / "acts", **OPTIONS)
    before = bytes_of(tmp_path / "acts")
    with pytest.raises(StoreError, match=f"other settings: .*{said}"):
        mm.extract(model, pairs, out=tmp_path / "acts", **OPTIONS | change)
    assert bytes_of(tmp_path / "acts") == before


def test_another_model_head_or_data_set_is_refused(model, pairs, tmp_path):
    out = tmp_path / "acts"
    mm.extract(model, pairs, out=out, **OPTIONS)
    with pytest.raises(StoreError, match=r"model\.weights: '\w+' there, '\w+' here"):
        mm.extract(tiny_clip(seed=1), pairs, out=out, **OPTIONS)
    with pytest.raises(StoreError, match=r"data\.fingerprint.*data\.pairs: 41 there, 9 here"):
        mm.extract(model, pairs[:9], out=out, **OPTIONS)
    headed = tiny_clip()
    headed.attach(TopKSAE(24, 96, k=8, seed=0), at="image.embed")
    mm.extract(headed, pairs, "image.embed.sae", tmp_path / "head", **OPTIONS)
    headed.detach()
    headed.attach(TopKSAE(24, 96, k=8, seed=1), at="image.embed")
    with pytest.raises(StoreError, match=r"latents\.head: 'topk-\w+' there"):
        mm.extract(headed, pairs, "image.embed.sae", tmp_path / "head", **OPTIONS)


def test_a_folder_of_other_files_is_left_alone(model, pairs, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(StoreError, match=r"expected an empty folder or a store, got one with thesis\.tex"):
        mm.extract(model, pairs, out=tmp_path, **OPTIONS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["thesis.tex"]


def test_nan_stops_with_the_pairs_id_and_goes_on_after(model, pairs, tmp_path, monkeypatch):
    unbroken = mm.extract(model, pairs, out=tmp_path / "whole", **OPTIONS)
    calls, add = [], ShardWriter.add

    def spoil(
        self, ids, columns, skipped, counts
    ):  # by nothing that the store's identity knows of: a hook would be part of it
        calls.append(1)
        if len(calls) == 5:
            columns["text.embed"] = columns["text.embed"].clone()
            columns["text.embed"][2] = torch.nan
        add(self, ids, columns, skipped, counts)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "add", spoil)
        with pytest.raises(NotFinite, match=r"text\.embed: NaN or infinity in 1 of 4 rows.*pair '018\.png'"):
            mm.extract(model, pairs, out=tmp_path / "acts", **OPTIONS)
    assert len(list((tmp_path / "acts").glob("*.arrow"))) == 2
    mm.extract(model, pairs, out=tmp_path / "acts", **OPTIONS)
    assert bytes_of(tmp_path / "acts") == bytes_of(unbroken.folder)


def test_a_second_writer_is_refused(model, pairs, tmp_path):
    out = tmp_path / "acts"
    out.mkdir()
    with Lock(out), pytest.raises(StoreError, match="already being written by this process"):
        mm.extract(model, pairs, out=out, **OPTIONS)
    holder = "import sys; from mmhooks.data.store.lock import Lock; from pathlib import Path\n"
    holder += "with Lock(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", holder, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(StoreError, match=rf"written by process {other.pid} on .*; wait for it"):
            mm.extract(model, pairs, out=out, **OPTIONS)
        other.kill()  # as a node that dies: nothing is tidied
    assert (out / ".lock").exists()
    assert len(mm.extract(model, pairs, out=out, **OPTIONS)) == N  # what it left is taken over
    assert not (out / ".lock").exists()


def test_a_lock_of_another_machine_is_respected(model, pairs, tmp_path):
    (tmp_path / "acts").mkdir()
    (tmp_path / "acts" / ".lock").write_text(json.dumps({"pid": 7, "host": "node-17"}))
    with pytest.raises(StoreError, match=r"process 7 on node-17.*if that process has ended, delete"):
        mm.extract(model, pairs, out=tmp_path / "acts", **OPTIONS)


def test_a_full_disk_keeps_finished_shards(model, pairs, tmp_path, monkeypatch):
    whole = mm.extract(model, pairs, out=tmp_path / "whole", **OPTIONS)
    real, calls = os.fsync, []

    def full(handle):
        calls.append(1)
        if len(calls) == 12:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(shard_file.os, "fsync", full)
    with pytest.raises(
        StoreError, match=r"the disk is full.*[1-5] finished shards with \d+ pairs are kept.*repeat the call"
    ):
        mm.extract(model, pairs, out=tmp_path / "acts", **OPTIONS)
    monkeypatch.undo()
    assert not list((tmp_path / "acts").glob(".*.part"))
    faults = [fault.kind for fault in verify(tmp_path / "acts")]
    assert faults == ["unfinished"]
    mm.extract(model, pairs, out=tmp_path / "acts", **OPTIONS)
    assert bytes_of(tmp_path / "acts") == bytes_of(whole.folder)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting a tmpfs needs root")
@pytest.mark.parametrize(
    ("size", "message"),
    [
        # Room for the values but not for the files around them, and not even for the values.
        ("64k", r"the disk is full.*shards with \d+ pairs are kept"),
        ("48k", r"expected room for .* GiB of rows that are still to be written, got .* GiB free"),
    ],
)
def test_a_full_tmpfs(model, pairs, tmp_path, size, message):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs here: {mounted.stderr.decode().strip()}")
    try:
        with pytest.raises(StoreError, match=message):
            mm.extract(model, pairs, "image.blocks.*.resid_post", disk / "acts", **OPTIONS)
        subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
        store = mm.extract(model, pairs, "image.blocks.*.resid_post", disk / "acts", **OPTIONS)
        assert len(store) == N and store.verify() == []
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_what_the_writer_raises_reaches_the_caller_and_items_are_dropped():
    done = []

    def act(item):
        if item == 3:
            raise StoreError("three")
        done.append(item)

    with pytest.raises(StoreError, match="three"), Background(act, depth=1) as background:
        for item in range(100):
            background.put(item)
    assert done == [0, 1, 2]
    with pytest.raises(KeyError), Background(done.append, depth=1):
        raise KeyError
    with Background(done.append) as background:
        background.put(9)
    assert done[-1] == 9


# -- processes -----------------------------------------------------------------------------------------------


def environment():
    here = str(DATA)
    root = str(Path(mm.__file__).parent.parent)
    return os.environ | {"PYTHONPATH": os.pathsep.join([root, here]), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_killed_at_thirty_random_moments(tmp_path):
    script = DATA / "kill_extractions.py"
    command = [sys.executable, str(script), str(tmp_path), "30", "0"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rounds = json.loads(done.stdout)
    assert len(rounds) == 30 and all(r["kills"] >= 1 for r in rounds)
    assert all(r["same"] for r in rounds), [r for r in rounds if not r["same"]]
    assert len({r["shards"] for r in rounds}) >= 5, "the moments did not reach into the run"


@pytest.mark.slow
def test_two_processes_write_the_store_of_one(model, pairs, place, table, tmp_path):
    script = DATA / "two_processes.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(script), str(place), str(table), str(tmp_path / "two")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the two have: the last bits of a product depend on it
    try:
        one = mm.extract(model, pairs, out=tmp_path / "one", **OPTIONS)
    finally:
        torch.set_num_threads(threads)
    assert bytes_of(tmp_path / "two" / "pairs") == bytes_of(one.folder)
    stream = mm.Store(tmp_path / "two" / "stream")
    assert stream.verify() == [] and stream.manifest["settings"]["ranks"] == 2
    rows = {tuple(row.tolist()) for row in stream["image.embed"].tensor().mul(1e4).round()}
    assert rows == {tuple(row.tolist()) for row in one["image.embed"].tensor().mul(1e4).round()}
    with pytest.raises(StoreError, match=r"settings\.ranks: 2 there, 1 here"):
        mm.extract(
            model, mm.data.pair_stream(f"{table}/*.parquet"), out=tmp_path / "two" / "stream", **OPTIONS
        )
