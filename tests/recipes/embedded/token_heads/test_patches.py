"""mini/patch-sae: who trains, who chooses, what is rebuilt, and the whole recipe at tiny size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from embedded.token_heads import patches
from embedded.token_heads.candidates import Candidate, Plan, fvu, pair_of_rows, rows_of, train_all

import mmhooks as mm
from mmhooks.data.families import drawing_family
from mmhooks.heads.training.sae_objective import SAEObjective


@pytest.fixture(scope="module")
def model() -> mm.HookedCLIP:
    return mm.load("mini")


def test_families_that_are_held_out_occur_nowhere_else() -> None:
    pairs = mm.data.pairs("mini")
    parts = patches.drawings(pairs)
    train, choosing, held_out = ({drawing_family(text) for text in part.texts} for part in parts)
    assert sum(map(len, parts)) == len(pairs) and {*parts.train.splits} == {"train"}
    assert choosing <= train and not held_out & train
    assert "train" not in {*parts.choosing.splits, *parts.held_out.splits}


def test_patches_are_rebuilt_and_the_class_token_stays(model: mm.HookedCLIP) -> None:
    site, head = "image.blocks.2.resid_post", mm.TopKSAE(192, 64, 8)
    pixels = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        with model.caching(site) as before:
            model.encode_image(pixels)
        act = patches.rebuilt(model, site, head)
        with model.hooks(fwd_hooks=[(site, act)]), model.caching(site) as after:
            model.encode_image(pixels)
        norm = before[site][:, 1:].norm(dim=-1, keepdim=True)
        want = norm * head.decode(head.encode(before[site][:, 1:] / norm))
    assert torch.equal(after[site][:, 0], before[site][:, 0])
    torch.testing.assert_close(after[site][:, 1:], want, atol=1e-4, rtol=1e-4)


def test_all_candidates_are_trained_as_each_alone(model: mm.HookedCLIP, tmp_path: Path) -> None:
    sites = ["image.blocks.1.resid_post", "image.blocks.3.resid_post"]
    pairs = mm.data.pairs("mini", limit=16)
    store = mm.extract(model, pairs, sites, tmp_path / "acts", tokens="patch", dtype="fp16", progress=False)
    wanted, plan = [Candidate(sites[0], 32, 4), Candidate(sites[1], 48, 8)], Plan(epochs=2, batch_size=128)
    heads = train_all(store, wanted, plan, name="sae", progress=False)
    alone = mm.TopKSAE(192, 48, 8, name="sae", seed=0)
    mm.train_head(
        alone, store, sites=[sites[1]], epochs=2, batch_size=128, lr=plan.lr, progress=False,
        objective=SAEObjective(dead_after=plan.dead_after),
    )  # fmt: skip
    assert torch.equal(heads[wanted[1]].W_dec, alone.W_dec)
    rows, owner = rows_of(store, sites[1]), pair_of_rows(store)
    assert owner.tolist() == [i for i in range(16) for _ in range(64)]
    found, back = fvu(alone, rows, owner), alone(rows).detach()
    by_hand = (rows - back).square().sum() / (rows - rows.mean(0)).square().sum()
    assert found.value == pytest.approx(float(by_hand), rel=1e-4)
    assert found.low < found.value < found.high


def test_the_recipe_at_tiny_size(tmp_path: Path) -> None:
    out = tmp_path / "head"
    patches.main(acts=tmp_path / "acts", features=64, epochs=1, limit=48, scenes=48, best=4, out=out)
    head = mm.load_head(out)
    card = head.info
    assert (head.d_in, head.n_features, head.k) == (192, 64, 16) and card["tokens"] == "patch"
    rows = [row for row in card["candidates"] if row["k"] == 16]
    assert [row["site"] for row in rows] == [f"image.blocks.{layer}.resid_post" for layer in range(6)]
    assert card["site"] == max(rows, key=lambda row: row["saved"])["site"]
    last = rows[-1]  # nothing reads the last block's patches
    assert last["rebuilt"] == last["mean"] == last["model"]
    assert card["held_out"]["l0"] <= 16 and 0 < card["held_out"]["fvu"]["value"] < 1
    assert {"hits", "matched", "elsewhere", "chance"} <= {*card["pointing"]["scenes"]}
