"""Races, missing rows, merges that break off, replaced and damaged files: an error of ours or the right rows."""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path

import pytest
import torch

import mmhooks as mm
from mmhooks.data.store import merge as merging
from mmhooks.data.store.layout import SiteSpec, manifest_bytes, read_manifest
from mmhooks.data.store.lock import Lock
from mmhooks.data.store.merge import merge
from mmhooks.data.store.writer import ShardWriter, begin, finish
from mmhooks.errors import MMHooksError, StoreError

sys.path.insert(0, str(Path(__file__).parent))
from data.tiny import bytes_of

D, SHARD = 8, 10
SPECS = [SiteSpec("image.embed", (D,), "fp32"), SiteSpec("image.sae.latents", (96,), "fp32", sparse=4)]


def write(folder: Path, n: int = 25, first: int = 0, seed: int = 0, pairs: int | None = -1) -> mm.Store:
    rng = torch.Generator().manual_seed(seed)
    plan = {
        "model": {"name": "m", "weights": "w"},
        "sites": {spec.name: spec.to_json() for spec in SPECS},
        "data": {"name": "d", "fingerprint": f"{first}", "pairs": n if pairs == -1 else pairs},
        "settings": {"shard_rows": SHARD},
        "content": {},
    }
    folder.mkdir(parents=True)
    with Lock(folder):
        begin(folder, plan, {})
        writer = ShardWriter(folder)
        for number, start in enumerate(range(0, n, SHARD)):
            rows = min(SHARD, n - start)
            columns = {
                "image.embed": torch.rand(rows, D, generator=rng),
                "image.sae.latents.values": torch.rand(rows, 4, generator=rng),
                "image.sae.latents.indices": torch.rand(rows, 96, generator=rng).argsort(1)[:, :4],
            }
            writer.add([f"p{first + start + i}" for i in range(rows)], columns, {})
            writer.close(number)
        finish(folder)
    return mm.Store(folder)


def test_threads_that_race_for_a_folder_are_one_writer(tmp_path):
    held, refused, together, start = [0], [0], [0], threading.Barrier(16)

    def work() -> None:
        start.wait()
        for _ in range(30):
            try:
                with Lock(tmp_path):
                    held[0] += 1
                    together[0] = max(together[0], held[0])
                    held[0] -= 1
            except StoreError:
                refused[0] += 1

    threads = [threading.Thread(target=work) for _ in range(16)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert together[0] == 1 and not (tmp_path / ".lock").exists()


def test_a_folder_by_another_name_is_the_same_folder(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").symlink_to("a")
    with (
        Lock(tmp_path / "a"),
        pytest.raises(StoreError, match="already being written by this process"),
        Lock(tmp_path / "b"),
    ):
        pass


@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff", b'{"pid": 1}', b"null", b"[" * 100_000])
def test_damaged_lock_files_are_taken_over(tmp_path, content):
    (tmp_path / ".lock").write_bytes(content)
    with Lock(tmp_path):
        pass


@pytest.mark.parametrize("pairs", [25, None])
@pytest.mark.parametrize("spoilt", ["journal gone", "line cut out", "line damaged", "shard gone"])
def test_a_store_that_lacks_rows_is_not_finished(tmp_path, monkeypatch, pairs, spoilt):
    out = tmp_path / "acts"
    from mmhooks.data.store import writer as module

    def broken(folder: Path, **_: object) -> None:
        journal = folder / ".journal-00000.jsonl"
        lines = journal.read_bytes().splitlines(keepends=True)
        if spoilt == "journal gone":
            journal.write_bytes(lines[-1])
        elif spoilt == "line cut out":
            journal.write_bytes(lines[0] + lines[2])
        elif spoilt == "line damaged":
            journal.write_bytes(lines[0] + lines[1].replace(b'"rows": 10', b'"rows": 11') + lines[2])
        else:
            (folder / "data-00001.arrow").unlink()
        module.finish(folder)

    monkeypatch.setitem(globals(), "finish", broken)
    with pytest.raises(StoreError, match=r"is not complete: [12] shards are missing.*the same call"):
        write(out, pairs=pairs)
    with pytest.raises(StoreError, match="unfinished"):
        mm.Store(out)


def test_a_manifest_that_says_complete_without_all_rows_is_refused(tmp_path):
    store = write(tmp_path / "acts")
    manifest = read_manifest(store.folder)
    for change in (
        {"shards": manifest["shards"][:-1]},
        {"shards": manifest["shards"][:-1], "pairs": 20},
        {"pairs": 26},
    ):
        (store.folder / "manifest.json").write_bytes(manifest_bytes({**manifest, **change}))
        with pytest.raises(StoreError, match="rows are missing"):
            mm.Store(store.folder)


# -- merge -------------------------------------------------------------------------------------------------


def test_a_merge_is_checked_before_anything_is_written(tmp_path):
    write(tmp_path / "a"), write(tmp_path / "b", first=20)
    with pytest.raises(StoreError, match="share pairs: 5 ids occur more than once"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("call", range(12))
def test_a_merge_that_breaks_off_anywhere_can_be_repeated(tmp_path, monkeypatch, call):
    write(tmp_path / "a"), write(tmp_path / "b", first=25)
    places, calls = [tmp_path / "a", tmp_path / "b"], [0]
    whole = bytes_of(merge(places, tmp_path / "whole").folder)

    def breaking(function):
        def broken(*args, **kwargs):
            calls[0] += 1
            if calls[0] > call:
                raise KeyboardInterrupt
            return function(*args, **kwargs)

        return broken

    monkeypatch.setattr(os, "link", breaking(os.link))
    monkeypatch.setattr(merging, "write_bytes", breaking(merging.write_bytes))
    monkeypatch.setattr(Path, "replace", breaking(Path.replace))
    try:
        merge(places, tmp_path / "out")
    except KeyboardInterrupt:
        pass
    monkeypatch.undo()
    assert bytes_of(merge(places, tmp_path / "out").folder) == whole


def test_merging_links_into_a_link(tmp_path):
    a = write(tmp_path / "a")
    (tmp_path / "links").mkdir()
    for file in a.folder.iterdir():
        (tmp_path / "links" / file.name).symlink_to(Path("..") / "a" / file.name)
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to("real")
    merged = merge([tmp_path / "links"], tmp_path / "out")
    assert torch.equal(merged["image.embed"][:], a["image.embed"][:]) and merged.verify() == []
    assert not any(p.is_symlink() for p in (tmp_path / "real").iterdir())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x").touch()
    with pytest.raises(StoreError, match="is not empty"):
        merge([tmp_path / "a"], tmp_path / "other")
    assert (tmp_path / "other" / "x").exists()


# -- reading -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", ["image.embed", "image.sae.latents"])
def test_a_store_replaced_under_a_reader_never_mixes(tmp_path, site):
    import shutil

    store = write(tmp_path / "acts", seed=1)
    other = write(tmp_path / "other", seed=2)
    _ = store[site][0]
    for file in other.folder.iterdir():
        shutil.copyfile(file, store.folder / f".{file.name}.new")
        (store.folder / f".{file.name}.new").replace(store.folder / file.name)
    with pytest.raises(StoreError, match="replaced since it was opened"):
        store[site][20]
    assert len(mm.Store(store.folder)[site][:]) == 25


@pytest.mark.parametrize("what", ["index", "offset", "utf8"])
def test_ids_and_indices_that_lead_astray_are_found_when_they_are_asked_for(tmp_path, what):
    from mmhooks.data.store.shard import Shard

    store = write(tmp_path / "acts", n=10)
    entry, path = store.manifest["shards"][0], tmp_path / "acts" / "data-00000.arrow"
    data = bytearray(path.read_bytes())
    shard = Shard(path, entry, [c for s in SPECS for c in s.columns()])
    begin = entry["head"]["bytes"]
    if what == "index":
        data[shard._columns["image.sae.latents.indices"][1] + 1] = 0x7F
    elif what == "offset":
        data[begin + 8 : begin + 12] = (2**30).to_bytes(4, "little")
    else:
        data[data.index(b"p0p1", begin)] = 0xFF
    path.write_bytes(data)
    damaged = mm.Store(tmp_path / "acts")
    with pytest.raises(StoreError, match="damaged"):
        _ = damaged["image.sae.latents"][3] if what == "index" else damaged.ids[3]
    with pytest.raises(StoreError, match=r"is damaged: data-00000\.arrow: altered"):
        mm.Store(tmp_path / "acts", verify=True)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sites", {"image.embed": {"shape": [-1], "dtype": "fp32"}}),
        ("sites", {"image.embed": {"shape": [8], "dtype": "int9"}}),
        ("sites", []),
        ("shards", [{"file": "../../etc/passwd", "rows": 25, "bytes": 1, "sha256": "a" * 64}]),
        ("shards", [{"file": "data-00000.arrow", "rows": "25", "bytes": 1, "sha256": "a" * 64}]),
        ("shards", {}),
        ("settings", {"shard_rows": 0}),
        ("data", None),
        ("model", []),
        ("complete", "yes"),
        ("format", "1"),
    ],
)
def test_manifests_that_cannot_be_are_refused_whatever_their_checksum(tmp_path, name, value):
    store = write(tmp_path / "acts")
    manifest = read_manifest(store.folder)
    (store.folder / "manifest.json").write_bytes(manifest_bytes({**manifest, name: value}))
    with pytest.raises(
        StoreError, match=r"manifest\.json.* expected .* to be .*, got .*restore it from a copy"
    ):
        mm.Store(store.folder)


def test_a_manifest_that_is_no_file_or_too_deep(tmp_path):
    (tmp_path / "a" / "manifest.json").mkdir(parents=True)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "manifest.json").write_text("[" * 100_000)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "manifest.json").write_text(json.dumps({"checksum": 1, "x": None}))
    for place in ("a", "b", "c"):
        with pytest.raises(MMHooksError, match=r"manifest\.json"):
            mm.Store(tmp_path / place)
