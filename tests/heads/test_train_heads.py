"""Several heads in one pass: each ends with the bits that it would have alone, from tables and from streams."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import mmhooks as mm
from mmhooks.data.windows import Windows
from mmhooks.errors import MMHooksError, NotFinite
from mmhooks.heads import NCL, BatchTopKSAE, HeadJob, TopKSAE, train_head, train_heads
from mmhooks.heads.training.sae_objective import SAEObjective

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
from tiny import folder_of_pairs, tiny_clip

SITE, OTHER = "image.blocks.1.resid_post", "image.blocks.0.mlp_out"
QUICK = {"batch_size": 24, "progress": False}


class Crash(Exception):
    pass


class CrashingSAE(SAEObjective):
    """Stops the run at a given step, as a killed process would."""

    at = 10**9

    def loss(self, head, image, text, dead):
        self.at -= 1
        if self.at < 0:
            raise Crash
        return super().loss(head, image, text, dead)


def same(a, b) -> bool:
    return all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MMHOOKS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def model():
    return tiny_clip()


@pytest.fixture(scope="module")
def drawings(tmp_path_factory):
    return mm.data.pairs(folder_of_pairs(tmp_path_factory.mktemp("pairs") / "photos", 41), progress=False)


@pytest.fixture(scope="module")
def store(model, drawings, tmp_path_factory):
    out = tmp_path_factory.mktemp("stores") / "acts"
    return mm.extract(
        model, drawings, [SITE, OTHER], out, tokens="patch", batch_size=4, workers=0, progress=False
    )


def stream_of(model, drawings, **options):
    options = {"tokens": "patch", "batch_size": 4, "workers": 0, "buffer": 40} | options
    return mm.stream(model, drawings, [SITE, OTHER], **options)


def some_heads():
    return [TopKSAE(32, 48, 3), TopKSAE(32, 64, 5, seed=1), BatchTopKSAE(32, 48, 4)]


def test_together_as_alone(pairs, held_out):
    heads = [TopKSAE(16, 48, 5), TopKSAE(16, 32, 2, seed=3), BatchTopKSAE(16, 48, 4), NCL(16, 24)]
    alone = [TopKSAE(16, 48, 5), TopKSAE(16, 32, 2, seed=3), BatchTopKSAE(16, 48, 4), NCL(16, 24)]
    shared = {"epochs": 4, "batch_size": 90, "progress": False}
    lrs = [1e-3, 4e-3, None, None]
    jobs = [HeadJob(head, lr=lr, valid=held_out) for head, lr in zip(heads, lrs, strict=True)]
    found = train_heads(jobs, *pairs, **shared)
    for head, lr, result, job in zip(alone, lrs, found, jobs, strict=True):
        wanted = train_head(head, *pairs, lr=lr, valid=held_out, **shared)
        assert same(wanted.head, result.head) and wanted.history == result.history
        assert result.head is job.head and wanted.steps == result.steps


def test_each_head_has_its_sites(store):
    heads = [TopKSAE(32, 48, 3), TopKSAE(32, 48, 3)]
    train_heads([HeadJob(heads[0], (SITE,)), HeadJob(heads[1], (OTHER,))], store, epochs=2, **QUICK)
    for head, site in zip(heads, (SITE, OTHER), strict=True):
        wanted = train_head(TopKSAE(32, 48, 3), store, sites=(site,), epochs=2, **QUICK)
        assert same(head, wanted.head)
    assert not same(*heads)


def test_from_the_stream_and_from_the_store_in_the_same_order(model, drawings, store):
    """The store holds the stream's numbers: written from the same forward passes, in the order of the pairs."""
    stream = stream_of(model, drawings)
    one, other = TopKSAE(32, 48, 3), TopKSAE(32, 48, 3)
    train_head(one, stream, sites=(SITE,), epochs=3, **QUICK)
    objective = SAEObjective()
    # What is computed over all rows is, of a stream, computed over the first batches: here these are all rows too.
    rows = torch.cat([b[SITE] for b in stream.batches(24, drop_last=True)])
    objective.measure = lambda image, text: SAEObjective.measure(
        objective, rows / rows.norm(dim=1, keepdim=True), None
    )
    objective.start = lambda head, image, text: SAEObjective.start(
        objective, head, rows / rows.norm(dim=1, keepdim=True), None
    )
    train_head(other, store, sites=(SITE,), epochs=3, windows=stream.windows, objective=objective, **QUICK)
    assert same(one, other)


def test_heads_from_a_stream_end_as_alone(model, drawings):
    together, alone = some_heads(), some_heads()
    results = train_heads(together, stream_of(model, drawings), sites=(SITE,), epochs=2, **QUICK)
    for head, result in zip(alone, results, strict=True):
        wanted = train_head(head, stream_of(model, drawings), sites=(SITE,), epochs=2, **QUICK)
        assert same(head, result.head) and wanted.history == result.history
    assert results[0].steps == 2 * (41 * 4 // 24)


@pytest.mark.parametrize("crash_at", [0, 1, 5, 7, 11])
def test_a_broken_run_over_a_stream_ends_with_the_same_bits(model, drawings, tmp_path, crash_at):
    def jobs(at=10**9):
        made = []
        for i, head in enumerate(some_heads()):
            objective = CrashingSAE()
            objective.at = at if i == 1 else 10**9  # the first head is a step ahead when the second stops
            made.append(HeadJob(head, objective=objective, checkpoint=tmp_path / f"{i}.safetensors"))
        return made

    options = {"sites": (SITE,), "epochs": 2, "checkpoint_every": 2, **QUICK}
    with pytest.raises(Crash):
        train_heads(jobs(crash_at), stream_of(model, drawings), **options)
    resumed = train_heads(jobs(), stream_of(model, drawings), **options)
    whole = train_heads(some_heads(), stream_of(model, drawings), sites=(SITE,), epochs=2, **QUICK)
    for a, b in zip(resumed, whole, strict=True):
        assert same(a.head, b.head) and a.history == b.history
    with pytest.raises(MMHooksError, match="started from other images"):
        train_heads(jobs(), stream_of(model, drawings, seed=1), **options)


def test_heads_whose_checkpoints_are_at_different_steps(model, drawings, tmp_path):
    """A run killed between two checkpoint files: the head that is behind catches up, the other waits."""
    import shutil

    options = {"sites": (SITE,), "epochs": 2, "checkpoint_every": 2, **QUICK}

    def jobs(at=10**9):
        made = [
            HeadJob(head, objective=CrashingSAE(), checkpoint=tmp_path / f"{i}.safetensors")
            for i, head in enumerate(some_heads())
        ]
        made[0].objective.at = at
        return made

    with pytest.raises(Crash):
        train_heads(jobs(3), stream_of(model, drawings), **options)
    shutil.copy(tmp_path / "0.safetensors", tmp_path / "early")
    with pytest.raises(Crash):
        train_heads(jobs(3), stream_of(model, drawings), **options)
    shutil.move(tmp_path / "early", tmp_path / "0.safetensors")
    resumed = train_heads(jobs(), stream_of(model, drawings), **options)
    whole = train_heads(some_heads(), stream_of(model, drawings), sites=(SITE,), epochs=2, **QUICK)
    assert all(same(a.head, b.head) for a, b in zip(resumed, whole, strict=True))


def test_steps_of_a_stream_that_does_not_know_its_length(model, drawings):
    site = "text.blocks.0.resid_post"
    stream = mm.stream(model, drawings, site, tokens="text", buffer=200, batch_size=4, workers=0)
    with pytest.raises(MMHooksError, match=r"does not know how many rows it has: expected steps="):
        train_head(TopKSAE(32, 48, 3), stream, sites=(site,), **QUICK)
    result = train_head(TopKSAE(32, 48, 3), stream, sites=(site,), steps=30, **QUICK)
    assert result.steps == 30 and result.epochs == 1
    with pytest.raises(MMHooksError, match="knows how many rows it has: expected epochs="):
        train_head(TopKSAE(32, 48, 3), stream_of(model, drawings), sites=(SITE,), steps=5, **QUICK)
    with pytest.raises(MMHooksError, match="expected epochs="):
        train_head(TopKSAE(4, 8, 2), torch.randn(50, 4), steps=5, **QUICK)


def test_rows_that_are_not_finite_are_refused_from_a_stream(model, drawings):
    def spoil(value, *, hook):
        return value * 0

    with model.hooks(fwd_hooks=[(SITE, spoil)]):
        stream = stream_of(model, drawings, key="zeros")
        with pytest.raises(NotFinite, match="all zero"):
            train_head(TopKSAE(32, 48, 3), stream, sites=(SITE,), epochs=1, **QUICK)


def test_what_does_not_fit_together_is_refused(pairs, model, drawings):
    head = TopKSAE(16, 48, 5)
    with pytest.raises(MMHooksError, match="at least one head"):
        train_heads([], *pairs, **QUICK)
    with pytest.raises(MMHooksError, match="every head once"):
        train_heads([head, head], *pairs, **QUICK)
    with pytest.raises(MMHooksError, match="a checkpoint of its own"):
        train_heads(
            [HeadJob(head, checkpoint="a"), HeadJob(TopKSAE(16, 48, 5), checkpoint="a")], *pairs, **QUICK
        )
    with pytest.raises(MMHooksError, match=r"batches of \[256, 512\] rows: expected batch_size="):
        train_heads([head, NCL(16, 24)], *pairs, progress=False)
    with pytest.raises(MMHooksError, match="windows of its own"):
        train_head(TopKSAE(32, 8, 2), stream_of(model, drawings), windows=Windows(3), sites=(SITE,), **QUICK)
