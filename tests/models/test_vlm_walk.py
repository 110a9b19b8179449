"""Every type of vision-language model is walked: three towers fire, read exactly, act downstream, add up, take heads."""

from __future__ import annotations

import functools
from contextlib import contextmanager

import jaxtyping
import pytest
import torch

import mmhooks as mm
from mmhooks.hooks.dispatch import registry
from mmhooks.hooks.sites import match

from .tiny_vlms import NEW, REAL, VLMS, generated, inputs, logits, real
from .walk import hooked_vlm, modules_changed

# Sites that the rest of the model does not read: behind the tower's layer before the last; the tower's last norm.
UNREAD = {
    "llava": ("image.blocks.2.", "image.ln_post"),
    "llava_next": ("image.blocks.2.", "image.ln_post"),
    "llava_onevision": ("image.ln_post",),
}


HEADS = {"lm.blocks.1.resid_post": 32, "image.blocks.0.resid_post": 32, "lm.blocks.1.mlp.post": 48}


@pytest.fixture(params=VLMS)
def model(request):
    return hooked_vlm(request.param)


@functools.cache
@torch.no_grad()
def unhooked(name):
    """Logits of a forward, and tokens and logits of a generation, outside any context."""
    return logits(hooked_vlm(name)), generated(hooked_vlm(name))


@functools.cache
@torch.no_grad()
def recorded(name):
    """What :func:`unhooked` gives while everything is read, the two caches, and the output projection of each layer."""
    model = hooked_vlm(name)
    native = {module: path for path, module in model.model.named_modules()}
    canonical = model.places.sites.canonical
    outs = {
        site.removesuffix("attn.head_out"): native[canonical[site].tap.owner]
        for site in model.sites("*.attn.head_out")
    }
    with model.hooks(), model.caching(["*", *outs.values()]) as once:
        forward = logits(model)
    with model.hooks(), model.caching(["*", *outs.values()]) as steps:
        generation = generated(model)
    return (forward, generation), once, steps, outs


@contextmanager
def types_unchecked():
    """No run-time type checks, which take most of the time of many small runs; :func:`recorded` reads all sites with them."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)


def changed(t, *, hook):
    return 1.5 * t + 0.1


def unread(model):
    return UNREAD.get(model.model.config.model_type, ())


def upstream(site):
    """Patterns of sites that an edit of ``site`` must leave alone."""
    tower = site.partition(".")[0]
    found = [{"image": "image.patches", "projector": "image.*", "lm": "[ip]*"}[tower]]
    found += [f"{tower}.blocks.0.*"] if ".blocks." in site else []
    return [one for one in found if one != site]


def chosen_sites(model):
    """One layer of each tower, and what is outside layers; of a variant in its attention, that alone."""
    found = [s for s in model.sites() if ".blocks." not in s or ".blocks.1." in s]
    return [s for s in found if "," not in model.name or ".attn." in s]


@torch.no_grad()
def test_sites_fire_read_and_act(model):
    """Each site is changed in a run of its own, inside one context, which is much cheaper to open than one each."""
    assert isinstance(model, mm.HookedVLM)
    (clean, alone), seen = unhooked(model.name), real(model)
    (forward, generation), cache, steps, outs = recorded(model.name)
    assert torch.equal(forward, clean)
    assert all(torch.equal(a, b) for a, b in zip(generation, alone, strict=True))
    assert set(cache) == set(steps) == {*model.sites(), *outs.values()} and steps.steps == [*range(NEW)]
    sites, current = chosen_sites(model), [""]

    def change(t, *, hook):
        return changed(t, hook=hook) if hook.name == current[0] else None

    watched = ["image.*", "projector.*", "lm.blocks.0.*"]
    hooks = model.hooks(fwd_hooks=[(site, change) for site in sites])
    with types_unchecked(), hooks, model.caching(watched, strict=False) as after:
        for site in sites:
            current[0] = site
            edited = logits(model)
            acts = not site.startswith(unread(model))
            assert (not torch.equal(edited[seen], clean[seen])) == acts, site
            for pattern in upstream(site):
                held = match(pattern, after)
                assert held and all(torch.equal(after[s], cache[s]) for s in held if s != site), site
    assert torch.equal(logits(model), clean)
    assert not [*modules_changed(model.model)] and not len(registry)


@torch.no_grad()
def test_a_site_alone():
    """With no other site's hooks around it."""
    model = hooked_vlm("LLaVA 1.5")
    clean, seen = unhooked("LLaVA 1.5")[0], real(model)
    for site in chosen_sites(model):
        with types_unchecked(), model.hooks(fwd_hooks=[(site, changed)]):
            acts = not torch.equal(logits(model)[seen], clean[seen])
        assert acts != site.startswith(unread(model)), site
    assert torch.equal(logits(model), clean)


@pytest.mark.parametrize("name", ["LLaVA 1.5", "LLaVA 1.5, eager", "PaliGemma"])
@torch.no_grad()
def test_edits_act_while_decoding(name):
    """At one of two packed queries too: the prompt is left alone, so the first new token is the same."""
    model = hooked_vlm(name)
    clean = generated(model, max_new_tokens=2, min_new_tokens=2)[1]
    for site in model.sites("lm.blocks.1.*" if name == "LLaVA 1.5" else "lm.blocks.1.attn.*"):
        # The same vector added to every key leaves where a query looks as it is.
        edit = mm.Zero if site.endswith(".k") else functools.partial(mm.Steer, direction=0.5)
        with types_unchecked(), model.hooks(edit(at=site, steps=1)):
            out = generated(model, max_new_tokens=2, min_new_tokens=2)[1]
        assert torch.equal(out[:, 0], clean[:, 0]) and not torch.equal(out, clean), site


def sums(model, cache, outs):
    places, seen = model.places.sites.canonical, real(model)
    for site in (s for s in cache if s.endswith("resid_mid")):
        block = site.removesuffix("resid_mid")
        assert torch.equal(cache[block + "resid_pre"] + cache[block + "attn_out"], cache[site])
        assert torch.equal(cache[site] + cache[block + "mlp_out"], cache[block + "resid_post"])
        bias = places[block + "attn.head_out"].tap.owner.bias
        total = cache[block + "attn.head_out"].sum(-2) + (0 if bias is None else bias)
        torch.testing.assert_close(total, cache[outs[block]], atol=1e-5, rtol=1e-5)
        if block + "attn.pattern" not in cache:  # Qwen's image towers
            continue
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
    _, once, steps, outs = recorded(model.name)
    sums(model, once, outs)
    for step in (0, 3):
        of_decoder = {s: v for s, v in steps.at(step).items() if not s.startswith("image.")}
        sums(model, of_decoder, outs)


@torch.no_grad()
def test_real_widths():
    """On the meta device, part by part: the model's own forward counts image tokens, for which there are no numbers."""
    model = mm.hook(REAL["LLaVA 1.5"]())
    parts = model.model.model
    with model.caching("*") as cache:
        features = parts.vision_tower(torch.empty(1, 3, 336, 336, device="meta")).last_hidden_state
        tokens = parts.multi_modal_projector(features[:, 1:])
        model.model.lm_head(parts.language_model(inputs_embeds=tokens).last_hidden_state)
    small = hooked_vlm("LLaVA 1.5").sites()
    assert set(cache) == set(model.sites()) == {site for site in small if ".blocks.2." not in site}
    shapes = {
        "image.blocks.1.attn.pattern": (1, 16, 577, 577),
        "projector.out": (1, 576, 4096),
        "lm.blocks.1.attn.head_out": (1, 576, 32, 4096),
        "lm.blocks.1.attn.pattern": (1, 32, 576, 576),
        "lm.blocks.1.mlp.gate": (1, 576, 11008),
        "lm.logits": (1, 576, 32064),
    }
    assert {site: tuple(cache[site].shape) for site in shapes} == shapes


def test_gradients_and_heads(model):
    given, slopes = inputs(model.model), []
    with model.hooks(bwd_hooks=[("lm.tokens", lambda g, *, hook: slopes.append(g))]):
        given["pixel_values"].requires_grad_()
        model.forward(**given).logits[:, -1, :3].sum().backward()
    assert slopes[0].abs().sum() > 0 and given["pixel_values"].grad.abs().sum() > 0
    model.model.zero_grad()
    for site, width in HEADS.items():
        if width == 32 or model.name == next(iter(VLMS)):
            take_a_head(model, site, width)
    assert not [*modules_changed(model.model)] and not len(registry)


@torch.no_grad()
def take_a_head(model, site, width):
    """Attached it changes no bit, of a generation either; masked it acts; detached it is gone."""
    (clean, alone), seen = unhooked(model.name), real(model)
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
