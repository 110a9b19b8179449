"""Every type of vision-language model is walked: three towers fire, read exactly, act downstream, add up, take heads."""

from __future__ import annotations

import pytest
import torch

import mmhooks as mm
from mmhooks.hooks.dispatch import registry

from .tiny_vlms import NEW, VLMS, generated, inputs, logits, real
from .walk import hooked_vlm, modules_changed

# Sites that the rest of the model does not read: behind the tower's layer before the last; the tower's last norm.
UNREAD = {
    "llava": ("image.blocks.2.", "image.ln_post"),
    "llava_next": ("image.blocks.2.", "image.ln_post"),
    "llava_onevision": ("image.ln_post",),
}


@pytest.fixture(params=VLMS)
def model(request):
    return hooked_vlm(request.param)


def changed(t, *, hook):
    return 1.5 * t + 0.1


def unread(model):
    return UNREAD.get(model.model.config.model_type, ())


@torch.no_grad()
def test_sites_fire_read_and_act(model):
    assert isinstance(model, mm.HookedVLM)
    clean, alone, seen = logits(model), generated(model), real(model)
    with model.hooks(), model.caching("*") as cache:
        assert torch.equal(logits(model), clean)
    assert set(cache) == set(model.sites())
    with model.hooks(), model.caching("*") as steps:
        assert all(torch.equal(a, b) for a, b in zip(generated(model), alone, strict=True))
    assert set(steps) == set(cache) and steps.steps == [*range(NEW)]
    for site in model.sites():
        if site.startswith(("lm.blocks.0.", "lm.blocks.2.", "image.blocks.0.")):
            continue  # the same kind of layer again
        if "," in model.name and ".attn." not in site:
            continue  # a variant in its attention
        tower = site.partition(".")[0]
        upstream = {"image": "image.patches", "projector": "image.*", "lm": "[ip]*"}[tower]
        watched = [upstream, *([f"{tower}.blocks.0.*"] if ".blocks." in site else [])]
        watched = [w for w in watched if w != site]
        with model.hooks(fwd_hooks=[(site, changed)]), model.caching(watched or "lm.logits") as before:
            edited = logits(model)
        acts = not site.startswith(unread(model))
        assert (not torch.equal(edited[seen], clean[seen])) == acts, site
        assert all(torch.equal(before[s], cache[s]) for s in before if watched), site
    assert torch.equal(logits(model), clean)
    assert not [*modules_changed(model.model)] and not len(registry)


@pytest.mark.parametrize("name", ["LLaVA 1.5", "LLaVA 1.5, eager", "PaliGemma"])
@torch.no_grad()
def test_edits_act_while_decoding(name):
    """At one of two packed queries too: the prompt is left alone, so the first new token is the same."""
    model = hooked_vlm(name)
    clean = generated(model)[1]
    for site in model.sites("lm.blocks.1.*"):
        with model.hooks(mm.Steer(direction=0.5, at=site, steps=range(1, NEW))):
            out = generated(model)[1]
        assert torch.equal(out[:, 0], clean[:, 0]) and not torch.equal(out, clean), site


def sums(model, cache, outs):
    places, seen = model.places.sites.canonical, real(model)
    for site in (s for s in cache if s.endswith("resid_mid")):
        block = site.removesuffix("resid_mid")
        assert torch.equal(cache[block + "resid_pre"] + cache[block + "attn_out"], cache[site])
        assert torch.equal(cache[site] + cache[block + "mlp_out"], cache[block + "resid_post"])
        bias = places[block + "attn.head_out"].tap.owner.bias
        total = cache[block + "attn.head_out"].sum(2) + (0 if bias is None else bias)
        torch.testing.assert_close(total, cache[outs[block]], atol=1e-5, rtol=1e-5)
        pattern, values = cache[block + "attn.pattern"], cache[block + "attn.v"]
        values = values.repeat_interleave(pattern.shape[1] // values.shape[2], 2)
        z = torch.einsum("bhqk,bkhe->bqhe", pattern.to(values), values)
        # What attention does at padding is the kernel's own affair: sdpa and eager differ there.
        rows = seen if block.startswith("lm") and z.shape[1] == seen.shape[1] else ...
        torch.testing.assert_close(cache[block + "attn.z"][rows], z[rows], atol=1e-5, rtol=1e-5)
        if block.startswith("lm"):
            act = places[block + "resid_post"].tap.owner.mlp.act_fn
            assert torch.equal(
                act(cache[block + "mlp.gate"]) * cache[block + "mlp.pre"], cache[block + "mlp.post"]
            )


@torch.no_grad()
def test_sums_at_the_prompt_and_while_decoding(model):
    native = {module: path for path, module in model.model.named_modules()}
    canonical = model.places.sites.canonical
    outs = {
        s.removesuffix("attn.head_out"): native[canonical[s].tap.owner]
        for s in model.sites("*.attn.head_out")
    }
    with model.caching(["*", *outs.values()]) as cache:
        logits(model)
    sums(model, cache, outs)
    with model.caching(["lm.blocks.*", *(path for block, path in outs.items() if block[0] == "l")]) as cache:
        generated(model)
    sums(model, cache.at(0), outs)
    sums(model, cache.at(3), outs)


def test_gradients_and_heads(model):
    given, slopes = inputs(model.model), []
    with model.hooks(bwd_hooks=[("lm.tokens", lambda g, *, hook: slopes.append(g))]):
        given["pixel_values"].requires_grad_()
        model.forward(**given).logits[:, -1, :3].sum().backward()
    assert slopes[0].abs().sum() > 0 and given["pixel_values"].grad.abs().sum() > 0
    model.model.zero_grad()
    for site, width in (
        ("lm.blocks.1.resid_post", 32),
        ("image.blocks.0.resid_post", 32),
        ("lm.blocks.1.mlp.post", 48),
    ):
        take_a_head(model, site, width)
    assert not [*modules_changed(model.model)] and not len(registry)


@torch.no_grad()
def take_a_head(model, site, width):
    """Attached it changes no bit, of a generation either; masked it acts; detached it is gone."""
    clean, alone, seen = logits(model), generated(model), real(model)
    torch.manual_seed(0)
    model.attach(mm.TopKSAE(width, 2 * width, 4), at=site, name="sae")
    latents = f"{site}.sae.latents"
    with model.caching(latents) as cache:
        assert all(torch.equal(a, b) for a, b in zip(generated(model), alone, strict=True))
    first = cache.at(0)[latents] if site.startswith("lm") else cache[latents]
    active = int(first.flatten(0, -2).sum(0).argmax())
    with model.hooks(mm.Zero([active], at=latents)):
        assert not torch.equal(logits(model)[seen], clean[seen])
    model.detach()
    assert torch.equal(logits(model), clean)
