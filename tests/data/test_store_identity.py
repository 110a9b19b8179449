"""What counts as the same store: everything that decides a row, and nothing else."""

from __future__ import annotations

import copy
import json
import pickle
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import mmhooks as mm
from mmhooks.data.store.layout import manifest_bytes
from mmhooks.data.store.merge import merge
from mmhooks.data.store.writer import ShardWriter
from mmhooks.errors import NoDigest, StoreError
from mmhooks.heads import TopKSAE
from mmhooks.hooks.edits import Edit

sys.path.insert(0, str(Path(__file__).parent))
from data.tiny import bytes_of, folder_of_pairs, preprocess, tiny_clip

OPTIONS = {"batch_size": 4, "shard_rows": 8, "workers": 0, "progress": False}
N = 20
SITES = ["image.embed", "text.embed"]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MMHOOKS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return mm.data.pairs(folder_of_pairs(tmp_path_factory.mktemp("pairs") / "photos", N), progress=False)


def _hook(by):
    return lambda z, *, hook: z * by


EMBED = "image.embed"
DRAWN = torch.arange(9 * 24.0).view(9, 24)
EDITS = {
    "features": (mm.Zero(range(8), at=EMBED), mm.Zero(range(8, 16), at=EMBED)),
    "site": (mm.Zero([1], at="image.ln_post"), mm.Zero([1], at=EMBED)),
    "class": (mm.Clamp([1], value=0.5, at=EMBED), mm.Mean([1], mean=0.25, at=EMBED)),
    "strength": (mm.Steer([1], strength=1.0, at=EMBED), mm.Steer([1], strength=2.0, at=EMBED)),
    "direction": (mm.Steer(direction=torch.ones(24), at=EMBED), mm.Steer(direction=torch.arange(24.0), at=EMBED)),
    "value": (mm.Clamp([1], value=1.0, at=EMBED), mm.Clamp([1], value=2.0, at=EMBED)),
    "seed": (mm.Resample([1], source=DRAWN, seed=0, at=EMBED), mm.Resample([1], source=DRAWN, seed=1, at=EMBED)),
    "tokens": (mm.Zero([1], at="image.blocks.0.resid_post", tokens=0), mm.Zero([1], at="image.blocks.0.resid_post", tokens=1)),
    "patch": (mm.Patch(torch.ones(1, 24), at=EMBED), mm.Patch(torch.zeros(1, 24), at=EMBED)),
    "cache": (mm.Patch({EMBED: torch.ones(1, 24)}), mm.Patch({EMBED: torch.zeros(1, 24)})),
    "function": (_hook(2.0), _hook(3.0)),
}  # fmt: skip


def _context(model, edit):
    if isinstance(edit, Edit):
        return model.hooks(edit)
    return model.hooks(fwd_hooks=[(EMBED, edit)])


@pytest.mark.parametrize("broken_off", [False, True])
@pytest.mark.parametrize("kind", EDITS)
def test_rows_of_one_edit_are_never_those_of_another(pairs, tmp_path, monkeypatch, kind, broken_off):
    model, (first, second) = tiny_clip(), EDITS[kind]
    out = tmp_path / "acts"
    with _context(model, first):
        if broken_off:
            close = ShardWriter.close
            monkeypatch.setattr(ShardWriter, "close", lambda self, n: close(self, n) if n < 1 else 1 / 0)
            with pytest.raises(ZeroDivisionError):
                mm.extract(model, pairs, SITES, out, **OPTIONS)
            monkeypatch.undo()
        else:
            mm.extract(model, pairs, SITES, out, **OPTIONS)
    before = bytes_of(out)
    with _context(model, second), pytest.raises(StoreError, match=r"other settings: .*edits"):
        mm.extract(model, pairs, SITES, out, **OPTIONS)
    with pytest.raises(StoreError, match=r"other settings: .*edits"):  # nor of none
        mm.extract(model, pairs, SITES, out, **OPTIONS)
    assert bytes_of(out) == before
    with _context(
        model, copy.deepcopy(first) if kind != "function" else _hook(2.0)
    ):  # the same edit, made anew
        done = mm.extract(model, pairs, SITES, out, **OPTIONS)
    assert len(done) == N and done.verify() == []


class Turned:
    def __init__(self, by):
        self.by = by

    def __call__(self, image):
        return preprocess(image.rotate(self.by))


def _cut(to):
    return lambda text: text[:to]


def _with_tokenizer(clean):
    model = tiny_clip()
    model.tokenizer = copy.copy(model.tokenizer)
    model.tokenizer.clean_fn = clean
    return model


def _with_preprocess(preprocess):
    model = tiny_clip()
    model.preprocess = preprocess
    return model


def _changed(change):
    model = tiny_clip()
    change(model.model)
    return model


def _headed(**options):
    model, seed = tiny_clip(), options.pop("seed", 0)
    torch.manual_seed(seed)
    head = TopKSAE(24, 96, k=options.pop("k", 8))
    with torch.no_grad():
        head.W_dec[0, 0] += options.pop("nudge", 0.0)
    model.attach(head, at=EMBED, **options)
    return model


MODELS = {
    "callable object": (lambda: _with_preprocess(Turned(0)), lambda: _with_preprocess(Turned(90)), "preprocess"),
    "lambda": (lambda: _with_preprocess(lambda i: preprocess(i)), lambda: _with_preprocess(lambda i: -preprocess(i)), "prep"),
    "cleaning": (lambda: _with_tokenizer(_cut(3)), lambda: _with_tokenizer(_cut(1)), "tokenizer"),
    "weights": (lambda: tiny_clip(0), lambda: tiny_clip(1), "model.weights"),
    "structure": (tiny_clip, lambda: _changed(lambda m: setattr(m.visual, "ln_post", nn.Identity())), "model.weights"),
    "their hook": (tiny_clip, lambda: _changed(lambda m: m.visual.register_forward_hook(lambda *a: a[2] * 2)), "model.weights"),
    "head below half precision": (_headed, lambda: _headed(nudge=1e-6), "heads"),
    "head's k": (_headed, lambda: _headed(k=4), "head"),
    "error term": (_headed, lambda: _headed(error_term=False), "heads"),
}  # fmt: skip


@pytest.mark.parametrize("kind", MODELS)
def test_rows_of_one_model_are_never_those_of_another(pairs, tmp_path, kind):
    first, second, part = MODELS[kind]
    sites = ["*.embed", "*.sae.*"] if "head" in part else SITES
    store = mm.extract(first(), pairs, sites, tmp_path / "acts", **OPTIONS)
    with pytest.raises(StoreError, match=rf"other settings: .*{part}"):
        mm.extract(second(), pairs, sites, tmp_path / "acts", **OPTIONS)
    again = mm.extract(first(), pairs, sites, tmp_path / "acts", **OPTIONS)  # an equal model is the same
    assert again.manifest == store.manifest


def test_what_cannot_be_told_apart_is_refused_or_named(pairs, tmp_path):
    lock = threading.Lock()
    model = _with_preprocess(lambda image: (lock.locked(), preprocess(image))[1])
    with pytest.raises(NoDigest, match=r"preprocess.*\.lock .*pass key="):
        mm.extract(model, pairs, SITES, tmp_path / "acts", **OPTIONS)
    assert not (tmp_path / "acts").exists()
    mm.extract(model, pairs, SITES, tmp_path / "acts", key="locked", **OPTIONS)
    mm.extract(model, pairs, SITES, tmp_path / "acts", key="locked", **OPTIONS)
    with pytest.raises(StoreError, match="content.preprocess"):
        mm.extract(model, pairs, SITES, tmp_path / "acts", key="another", **OPTIONS)


def test_caches_and_the_edits_of_other_models_are_no_part_of_it(pairs, tmp_path):
    model, other = tiny_clip(), tiny_clip(1)
    store = mm.extract(model, pairs, SITES, tmp_path / "acts", **OPTIONS)
    with model.caching("image.*"), other.hooks(mm.Zero([1], at=EMBED), strict=False):
        assert mm.extract(model, pairs, SITES, tmp_path / "acts", **OPTIONS).manifest == store.manifest


def test_an_unfinished_store_is_not_finished_by_other_versions(pairs, tmp_path, monkeypatch):
    from mmhooks.models import extract as module

    model, out = tiny_clip(), tmp_path / "acts"
    finish = module.finish
    monkeypatch.setattr(module, "finish", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        mm.extract(model, pairs, SITES, out, **OPTIONS)
    monkeypatch.setattr(module, "finish", finish)
    now = module.versions()
    monkeypatch.setattr(module, "versions", lambda: {**now, "torch": "0.1"})
    with pytest.raises(StoreError, match=r"other versions \(torch: .*mixture"):
        mm.extract(model, pairs, SITES, out, **OPTIONS)
    monkeypatch.setattr(module, "versions", lambda: now)
    mm.extract(model, pairs, SITES, out, **OPTIONS)
    monkeypatch.setattr(module, "versions", lambda: {**now, "torch": "0.1"})
    assert len(mm.extract(model, pairs, SITES, out, **OPTIONS)) == N  # a finished one says its versions


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_runs_in_evaluation_mode_and_has_its_modes_back(pairs, tmp_path, fails):
    model = tiny_clip()
    model.model.visual.patch_dropout = nn.Dropout(0.5)
    model = mm.HookedCLIP(model.model, model.tokenizer, model.preprocess, name="tiny")
    still = mm.extract(model, pairs, SITES, tmp_path / "eval", **OPTIONS)[EMBED].tensor()
    model.model.train()
    model.model.visual.ln_post.eval()
    modes = [m.training for m in model.model.modules()]
    state = copy.deepcopy(model.model.state_dict())
    if fails:
        model.preprocess = lambda image: 1 / 0
        with pytest.raises(ZeroDivisionError):
            mm.extract(model, pairs, SITES, tmp_path / "train", **OPTIONS)
    else:
        rows = mm.extract(model, pairs, SITES, tmp_path / "train", **OPTIONS)[EMBED].tensor()
        assert torch.equal(rows, still)
    assert [m.training for m in model.model.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in model.model.state_dict().items())


def test_stores_of_the_first_format_open_and_are_not_gone_on_with(pairs, tmp_path):
    model, out = tiny_clip(), tmp_path / "acts"
    mm.extract(model, pairs, SITES, out, **OPTIONS)
    manifest = json.loads((out / "manifest.json").read_text())
    del manifest["checksum"], manifest["content"]
    manifest["format"] = 1
    for entry in manifest["shards"]:
        del entry["head"]
    (out / "manifest.json").write_bytes(manifest_bytes(manifest))
    assert len(mm.Store(out)[EMBED][:]) == N
    with pytest.raises(StoreError, match="format 1, .*mm.Store still opens it: choose another folder"):
        mm.extract(model, pairs, SITES, out, **OPTIONS)


def test_stores_with_other_edits_are_not_merged(pairs, tmp_path):
    model = tiny_clip()
    half = [mm.extract(model, pairs[:8], SITES, tmp_path / "a", **OPTIONS)]
    with model.hooks(mm.Zero([1], at=EMBED)):
        half.append(mm.extract(model, pairs[8:], SITES, tmp_path / "b", **OPTIONS))
    with pytest.raises(StoreError, match="cannot be merged with"):
        merge([s.folder for s in half], tmp_path / "whole")
    assert not (tmp_path / "whole").exists()


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))], ids=["copy", "pickle"]
)
def test_a_store_that_was_read_can_be_copied(pairs, tmp_path, monkeypatch, copied):
    model = _headed()
    monkeypatch.chdir(tmp_path)
    store = mm.extract(model, pairs, ["*.embed", "*.sae.latents"], "acts", **OPTIONS)
    whole = store.select(store.ids[3:9])
    for one in (store, whole, store.apply(TopKSAE(24, 96, k=8), at=EMBED, name="other")):
        rows, ids = [one[site][1:4] for site in one.sites], list(one.ids)
        other = copied(one)
        (tmp_path / "elsewhere").mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / "elsewhere")
        assert list(other.ids) == ids
        for site, mine in zip(one.sites, rows, strict=True):
            theirs = other[site][1:4]
            assert torch.equal(theirs if isinstance(theirs, torch.Tensor) else theirs.dense(),
                               mine if isinstance(mine, torch.Tensor) else mine.dense())  # fmt: skip
