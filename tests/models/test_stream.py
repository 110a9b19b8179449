"""Streams: the rows of a store in the same order, without a disk; resumed, with any buffer, from any source."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mmhooks as mm
from mmhooks.errors import MMHooksError, NotFinite, UnknownSite
from mmhooks.models.stream import StreamState

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
from tiny import encoded, folder_of_pairs, text, tiny_clip

DATA = Path(__file__).parents[1] / "data"
N, SITES = 41, ["image.blocks.1.resid_post", "image.blocks.0.attn.z"]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MMHOOKS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))


@pytest.fixture(scope="module")
def model():
    return tiny_clip()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return mm.data.pairs(folder_of_pairs(tmp_path_factory.mktemp("pairs") / "photos", N), progress=False)


@pytest.fixture(scope="module")
def store(model, pairs, tmp_path_factory):
    out = tmp_path_factory.mktemp("stores") / "acts"
    return mm.extract(model, pairs, SITES, out, tokens="patch", batch_size=4, workers=0, progress=False)


def stream_of(model, pairs, **options):
    return mm.stream(
        model, pairs, SITES, **{"tokens": "patch", "batch_size": 4, "workers": 0, "buffer": 40, **options}
    )


@pytest.mark.parametrize("buffer", [24, 40, 10_000])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_rows_of_the_store_in_the_windows_order(model, pairs, store, buffer, workers):
    stream = stream_of(model, pairs, buffer=buffer, workers=workers)
    assert len(stream) == len(store) and stream.by_token and stream.sites == SITES
    for epoch in (0, 3):
        wanted = list(stream.windows.batches(store.pairs, 24, epoch))
        found = list(stream.batches(24, epoch=epoch))
        assert len(found) == len(wanted)
        for batch, rows in zip(found, wanted, strict=True):
            for site in SITES:
                assert torch.allclose(batch[site], store[site][rows], atol=1e-5)


def test_a_resumed_pass_goes_on_with_the_same_bits(model, pairs):
    stream = stream_of(model, pairs)
    whole = list(stream.batches(24, epoch=2))
    for stop in range(1, len(whole) + 1):
        reading = stream.batches(24, epoch=2)
        for _ in range(stop):
            next(reading)
        state = StreamState.from_json(stream.state.to_json())
        reading.close()
        rest = list(stream_of(model, pairs).batches(24, state=state))
        assert len(rest) == len(whole) - stop
        for a, b in zip(rest, whole[stop:], strict=True):
            assert all(torch.equal(a[site], b[site]) for site in SITES)


def test_texts_of_different_lengths(model, pairs):
    site = "text.blocks.0.resid_post"
    stream = mm.stream(model, pairs, site, tokens="text", buffer=100, batch_size=4, workers=0)
    assert stream.rows is None
    with pytest.raises(MMHooksError, match="not known before it ends"):
        len(stream)
    lengths = model.tokenizer(pairs.texts).argmax(1) + 1
    rows = torch.cat([b[site] for b in stream.batches(16)])
    assert len(rows) == int(lengths.sum())
    whole = list(stream.batches(16))
    reading = stream.batches(16)
    for _ in range(9):
        next(reading)
    rest = list(stream.batches(16, state=stream.state))
    assert all(torch.equal(a[site], b[site]) for a, b in zip(rest, whole[9:], strict=True))


def test_pairs_that_are_streamed_too(model, tmp_path):
    import datasets

    rows = {
        "image": [{"bytes": encoded(i), "path": None} for i in range(N)],
        "caption": [text(i) for i in range(N)],
    }
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).to_parquet(tmp_path / "0.parquet")
    source = mm.data.pair_stream(f"{tmp_path}/*.parquet")
    stream = stream_of(model, source)
    assert stream.rows is None and stream.windows.in_order
    whole = list(stream.batches(24))
    assert sum(len(b[SITES[0]]) for b in whole) == N * 4
    reading = stream.batches(24)
    for _ in range(4):
        next(reading)
    rest = list(stream_of(model, source).batches(24, state=stream.state))
    assert len(rest) == len(whole) - 4
    assert all(torch.equal(a[s], b[s]) for a, b in zip(rest, whole[4:], strict=True) for s in SITES)


def test_rows_by_pair_and_half_precision(model, pairs):
    stream = mm.stream(model, pairs, dtype="bf16", buffer=16, batch_size=4, workers=0)
    batches = list(stream.batches(8, drop_last=True))
    assert [len(b["image.embed"]) for b in batches] == [8] * 5
    assert batches[0]["text.embed"].dtype == torch.bfloat16 and not stream.by_token


def test_a_pair_whose_activations_are_not_finite_is_named(model, pairs):
    stream = stream_of(model, pairs)
    spoilt = pairs.ids[7]
    place = int((stream.windows.pair_order(N, 0) == 7).nonzero())

    def spoil(value, *, hook):
        spoil.seen += len(value)
        if spoil.seen > place:
            value = value.clone()
            value[len(value) - (spoil.seen - place), 3] = torch.inf
            spoil.seen = -(10**9)
        return value

    spoil.seen = 0
    with model.hooks(fwd_hooks=[(SITES[0], spoil)]):
        with pytest.raises(NotFinite, match=f"first of pair '{spoilt}'"):
            list(stream.batches(24))


def test_what_does_not_fit_is_refused(model, pairs):
    stream = stream_of(model, pairs)
    with pytest.raises(UnknownSite):
        next(stream.batches(24, sites="image.embed"))
    with pytest.raises(MMHooksError, match="a batch, got 40; take a larger buffer"):
        list(stream.batches(64))
    with pytest.raises(MMHooksError, match="size"):
        next(stream.batches(0))
    with pytest.raises(MMHooksError, match="buffer: expected at least 1 row"):
        stream_of(model, pairs, buffer=0)


def test_its_fingerprint_is_that_of_what_decides_its_rows(model, pairs):
    one = stream_of(model, pairs).fingerprint
    assert one == stream_of(model, pairs).fingerprint
    others = [
        stream_of(model, pairs, seed=1),
        stream_of(model, pairs, buffer=48),
        stream_of(model, pairs, tokens="cls"),
        stream_of(tiny_clip(seed=1), pairs),
        stream_of(model, pairs[:40]),
    ]
    assert len({one, *(other.fingerprint for other in others)}) == 6


# -- processes -----------------------------------------------------------------------------------------------


def environment():
    root = str(Path(mm.__file__).parent.parent)
    return os.environ | {"PYTHONPATH": os.pathsep.join([root, str(DATA)]), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_a_training_killed_twenty_times_ends_with_the_same_bits(tmp_path):
    command = [sys.executable, str(DATA / "kill_streams.py"), str(tmp_path), "20", "0"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rounds = json.loads(done.stdout)
    assert sum(r["kills"] for r in rounds) == 20
    assert all(r["same"] for r in rounds), rounds


TWO = """
import sys, torch
import mmhooks as mm
from tiny import tiny_clip
torch.set_num_threads(1)
pairs = mm.data.pairs(sys.argv[1], progress=False)
torch.distributed.init_process_group("gloo")
site = "image.blocks.1.resid_post"
stream = mm.stream(tiny_clip(), pairs, site, tokens="patch", batch_size=4, workers=0, buffer=40)
rank = torch.distributed.get_rank()
rows = [batch[site] for batch in stream.batches(24)]
torch.save({"rows": torch.cat(rows), "sizes": [len(r) for r in rows], "len": len(stream)}, f"{sys.argv[2]}/{rank}.pt")
try:
    mm.stream(tiny_clip(), pairs, "text.blocks.0.resid_post", tokens="text")
except mm.errors.MMHooksError as fault:
    assert "every pair has as many" in str(fault)
else:
    raise AssertionError("ragged tokens were let in")
"""


@pytest.mark.slow
def test_two_processes_deal_every_row_once(pairs, store, tmp_path):
    """Each deals half of every batch; together they hold the rows of the largest even number of pairs."""
    script = tmp_path / "two.py"
    script.write_text(TWO)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    folder = str(Path(pairs.name)) if Path(pairs.name).exists() else None
    assert folder is not None
    done = subprocess.run(
        [*command, str(script), folder, str(tmp_path)], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert found[0]["sizes"] == found[1]["sizes"] and set(found[0]["sizes"][:-1]) == {12}
    assert found[0]["len"] == 40 * 4
    rows = torch.cat([part["rows"] for part in found]).mul(1e3).round()
    known = store[SITES[0]].tensor().mul(1e3).round()
    assert len(rows) == 160
    assert {tuple(row.tolist()) for row in rows} <= {tuple(row.tolist()) for row in known}
    assert len({tuple(row.tolist()) for row in rows}) >= 150  # images of one colour have equal patches


TRAINED = """
import sys, torch
import mmhooks as mm
from mmhooks.heads.training.processes import Processes
from mmhooks.heads.training.sae_objective import SAEObjective
from tiny import tiny_clip
torch.set_num_threads(1)
pairs = mm.data.pairs(sys.argv[1], progress=False)
head, objective, site = mm.TopKSAE(32, 48, k=3), SAEObjective(), "image.blocks.1.resid_post"
Processes(head)
stream = mm.stream(tiny_clip(), pairs, site, tokens="patch", batch_size=4, workers=0, buffer=40)
result = mm.train_head(head, stream, sites=[site], epochs=2, batch_size=24, objective=objective, progress=False)
rank = torch.distributed.get_rank()
torch.save({"head": head.state_dict(), "variance": objective.variance, "steps": result.steps}, f"{sys.argv[2]}/t{rank}.pt")
"""


@pytest.mark.slow
def test_two_processes_train_one_head_over_a_stream(pairs, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(TRAINED)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(script),
    ]
    done = subprocess.run(
        [*command, pairs.name, str(tmp_path)],
        env=environment() | {"ACCELERATE_USE_CPU": "true"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (torch.load(tmp_path / f"t{rank}.pt") for rank in range(2))
    assert one["variance"] == two["variance"] and one["steps"] == two["steps"] == 2 * (160 // 24)
    assert all(torch.equal(value, two["head"][name]) for name, value in one["head"].items())
