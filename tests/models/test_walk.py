"""Every family is walked: its sites fire, read exactly and act where they should, the sums hold, and nothing is left."""

from __future__ import annotations

import copy

import pytest
import torch

import mmhooks as mm
from mmhooks.hooks.dispatch import registry

from .walk import CASES, hooked, modules_changed, run, table, written


def changed(t, *, hook):
    return 1.5 * t + 0.1


def opened(name):
    model = hooked(name)
    return model, CASES[name].inputs(model.model)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_sites_fire_read_and_act(name):
    model, inputs = opened(name)
    clean = run(model, inputs)
    with model.hooks(), model.caching("*") as cache:
        read = run(model, inputs)
    assert set(cache) == set(model.sites())
    assert all(torch.equal(read[tower], clean[tower]) for tower in clean)
    for site in model.sites():
        if ".blocks." in site and ".blocks.1." not in site:
            continue  # the same kind of layer again
        own = site.partition(".")[0]
        upstream = f"{own}.blocks.0.*"
        with model.hooks(fwd_hooks=[(site, changed)]), model.caching(upstream) as seen:
            edited = run(model, inputs)
        for tower, value in edited.items():
            assert torch.equal(value, clean[tower]) == (tower != own), (site, tower)
        if ".blocks." in site or site.endswith((".pooled", ".embed")):
            assert all(torch.equal(seen[s], cache[s]) for s in seen), site
    after = run(model, inputs)
    assert all(torch.equal(after[tower], clean[tower]) for tower in clean)
    assert not [*modules_changed(model.model)] and not len(registry)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_sums(name):
    model, inputs = opened(name)
    places = model.places.sites.canonical
    native = {m: path for path, m in model.model.named_modules()}
    # A projection that is a module: its own output; torch's attention: what it adds.
    outs = {
        s: native[places[s].tap.owner]
        for s in places
        if s.endswith("head_out") and hasattr(places[s].tap, "heads")
    }
    with model.caching(["*", *outs.values()]) as cache:
        run(model, inputs)
    for site in (s for s in cache if s.endswith("resid_mid")):
        block = site.removesuffix("resid_mid")
        assert torch.equal(cache[block + "resid_pre"] + cache[block + "attn_out"], cache[site])
        assert torch.equal(cache[site] + cache[block + "mlp_out"], cache[block + "resid_post"])
    for site in (s for s in cache if s.endswith("head_out")):
        block, owner = site.removesuffix("attn.head_out"), places[site].tap.owner
        bias = owner.bias if site in outs else owner.out_proj.bias
        want = cache[outs[site]] if site in outs else cache[block + "attn_out"]
        total = cache[site].sum(2) + (0 if bias is None else bias)
        torch.testing.assert_close(total, want, atol=1e-5, rtol=1e-5)
        z = torch.einsum("bhqk,bkhe->bqhe", cache[block + "attn.pattern"], cache[block + "attn.v"])
        torch.testing.assert_close(cache[block + "attn.z"], z, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_gradients_and_heads(name):
    model, inputs = opened(name)
    for tower, given in inputs.items():
        encode = getattr(model, f"encode_{tower}")
        site, first = f"{tower}.blocks.1.resid_post", "tokens" if tower == "text" else "patches"
        slopes = []
        kept = lambda g, *, hook, slopes=slopes: slopes.append(g)  # noqa: E731
        with model.hooks(bwd_hooks=[(f"{tower}.{first}", kept)]):
            encode(given)[:, :3].sum().backward()
        assert slopes[0].abs().sum() > 0
        if given.is_floating_point():
            pixels = given.clone().requires_grad_()
            encode(pixels)[:, :3].sum().backward()
            assert pixels.grad.abs().sum() > 0
        with torch.no_grad():
            clean, cache = encode(given), model.caching(site)
            with cache as seen:
                encode(given)
            place = model.places.sites.canonical[site]
            width = seen[site].shape[place.width]
            torch.manual_seed(0)
            model.attach(mm.TopKSAE(width, 2 * width, 4), at=site, name="sae")
            with model.caching(f"{site}.sae.latents", strict=False) as latents:
                assert torch.equal(encode(given), clean)
            active = int(latents[f"{site}.sae.latents"].flatten(0, -2).sum(0).argmax())
            with model.hooks(mm.Zero([active], at=f"{site}.sae.latents")):
                assert not torch.equal(encode(given), clean)
            model.detach()
            assert torch.equal(encode(given), clean)
    model.model.zero_grad()
    assert not [*modules_changed(model.model)] and not len(registry)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.real])
@torch.no_grad()
def test_real_widths(name):
    """On the meta device: no arithmetic, every site at its real shape."""
    case = CASES[name]
    model = mm.hook(case.real())
    config = model.model.config
    vision = getattr(config, "vision_config", config)
    side = getattr(vision, "crop_size", None) or vision.image_size
    frames = getattr(vision, "frames_per_clip", None) or getattr(vision, "num_frames", None)
    inputs = {"image": torch.empty(1, 3, side, side, device="meta")}
    if frames:
        inputs = {"video": torch.empty(1, frames, 3, side, side, device="meta")}
    if "text" in case.inputs(hooked(name).model):
        inputs["text"] = torch.zeros(1, 16, dtype=torch.long, device="meta")
    with model.caching("*") as cache:
        run(model, inputs)
    assert set(cache) == set(model.sites())
    assert {s.partition("blocks.1.")[2] for s in model.sites()} == {
        s.partition("blocks.1.")[2] for s in hooked(name).sites()
    }


def test_a_copy_has_sites_of_its_own():
    model, inputs = opened("SigLIP")
    twin = copy.deepcopy(model)
    with torch.no_grad(), twin.hooks(mm.Zero(at="image.embed")):
        assert not twin.encode_image(inputs["image"]).any()
        assert model.encode_image(inputs["image"]).any()


def test_the_page_shows_the_table_that_is_walked():
    assert written() == table(), "python -m tests.models.walk writes it"
