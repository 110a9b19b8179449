"""``cache.grad`` is the gradient of the value that flows on, at every kind of site, or an error that says what to do."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import mmhooks as mm
from mmhooks.errors import MMHooksError, UnknownSite

sys.path.insert(0, str(Path(__file__).parents[1]))
from models.families import FAMILIES
from models.pipelines import PATTERN, build

WEIGHTS = torch.randn(12, generator=torch.Generator().manual_seed(5))


def loss(embedding: torch.Tensor) -> torch.Tensor:
    return (embedding * WEIGHTS.to(embedding)).sum().tanh()


def unhooked(model: Any, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of a CLIP that nothing of ours is installed on, by torch's own hooks on its modules."""
    visual, seen = model.model.visual, {}
    block = visual.transformer.resblocks[1]
    handles = [
        block.register_forward_hook(lambda m, a, out: seen.update({"image.blocks.1.resid_post": out})),
        block.attn.register_forward_hook(lambda m, a, out: seen.update({"attn_out": out[0]})),
        block.mlp.c_fc.register_forward_hook(lambda m, a, out: seen.update({"image.blocks.1.mlp.pre": out})),
        block.ln_1.register_forward_hook(lambda m, a, out: seen.update({"image.blocks.1.ln_1": out})),
        block.register_forward_pre_hook(lambda m, a: seen.update({"image.blocks.1.resid_pre": a[0]})),
    ]
    embedding = model.model.encode_image(pixels)
    found = dict(zip(seen, torch.autograd.grad(loss(embedding), [*seen.values(), embedding][:-1], retain_graph=True),
                     strict=True))  # fmt: skip
    (found["image.embed"],) = torch.autograd.grad(loss(embedding), embedding)
    for handle in handles:
        handle.remove()
    found["image.pooled"] = found["image.embed"] @ visual.proj.T  # a product that no module owns
    out = found.pop("attn_out")  # written by every attention head alike
    found["image.blocks.1.attn.head_out"] = out[:, :, None].expand(-1, -1, block.attn.num_heads, -1)
    found["image.blocks.1.attn.z"] = (out @ block.attn.out_proj.weight).unflatten(
        -1, (block.attn.num_heads, -1)
    )
    return {name: value.detach() for name, value in found.items()}


SITES = ("image.blocks.1.resid_pre", "image.blocks.1.resid_post", "image.blocks.1.ln_1", "image.blocks.1.mlp.pre",
         "image.blocks.1.attn.z", "image.blocks.1.attn.head_out", "image.pooled", "image.embed")  # fmt: skip
WAYS: dict[str, dict[str, Any]] = {
    "whole": {},
    "some tokens": {"tokens": [0, 3]},
    "in another precision": {"dtype": torch.float64},
    "on a device": {"device": "cpu"},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("site", SITES)
def test_the_gradient_of_an_unhooked_model(model, images, site, way):
    wanted = unhooked(model, images)[site]
    with model.caching(site, detach=False, **WAYS[way]) as cache:
        loss(model.encode_image(images)).backward()
    if "tokens" in WAYS[way] and wanted.dim() > 2:
        wanted = wanted[:, [0, 3]]
    got = cache.grad(site)
    assert got.shape == cache[site].shape and got.dtype == cache[site].dtype
    torch.testing.assert_close(got, wanted.to(got), atol=1e-6, rtol=1e-4)


def test_all_sites_at_once_and_after_the_context(model, images):
    out, cache = model.run_with_cache(images, sites=list(SITES), detach=False)
    loss(out.image).backward()
    for site, wanted in unhooked(model, images).items():
        torch.testing.assert_close(cache.grad(site), wanted, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(
            cache.select(site).to(dtype=torch.float64).grad(site), wanted.double(), atol=1e-6, rtol=1e-4
        )


@pytest.mark.parametrize("family", ["timm ViT, SigLIP", "custom blocks", "ResNet"])
def test_sites_that_are_views_and_models_that_write_into_their_activations(family):
    """Attention heads are a view of the projection's input; a ResNet's ReLU writes into what a cache kept."""
    torch.manual_seed(0)
    model = mm.HookedCLIP(FAMILIES[family]().eval())
    size = model.model.visual.image_size
    pixels = torch.randn(2, 3, *((size, size) if isinstance(size, int) else size))
    if family == "ResNet":
        site, module = "visual.layer1.0.bn1", model.model.visual.layer1[0].bn1
    else:
        site = "image.blocks.1.attn.z"
        block = (
            model.model.visual.trunk.blocks
            if family.startswith("timm")
            else model.model.visual.transformer.resblocks
        )[1]
        module = getattr(block.attn, "proj", None) or block.attn.out_proj
    seen: list[torch.Tensor] = []
    if family == "ResNet":
        handle = module.register_forward_hook(lambda m, a, out: seen.append(out.clone()) or seen[-1])
    else:
        handle = module.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    (wanted,) = torch.autograd.grad(loss(model.model.encode_image(pixels)), seen[0])
    handle.remove()
    with model.caching(site, detach=False) as cache:
        loss(model.encode_image(pixels)).backward()
    torch.testing.assert_close(cache.grad(site).reshape(wanted.shape), wanted, atol=1e-6, rtol=1e-4)


def test_edits_and_functions_at_and_behind_a_site(model, images):
    """The gradient of what flows on: through what stands behind the site, not through what stands before it."""
    site, behind = "image.blocks.0.resid_post", "image.blocks.1.resid_pre"

    def double(value: torch.Tensor, *, hook: Any) -> torch.Tensor:
        return 2 * value

    def write(value: torch.Tensor, *, hook: Any) -> None:
        value.mul_(2)

    with model.caching(behind, detach=False) as cache, model.hooks(fwd_hooks=[(site, double)]):
        loss(model.encode_image(images)).backward()
    wanted, kept = cache.grad(behind), cache[behind]
    for function in (double, write):
        with model.caching(site, detach=False) as cache, model.hooks(fwd_hooks=[(site, function)]):
            loss(model.encode_image(images)).backward()
        assert torch.equal(cache[site], kept)
        torch.testing.assert_close(cache.grad(site), wanted)
        with model.caching(site, detach=False) as cache, model.hooks(fwd_hooks=[(behind, function)]):
            loss(model.encode_image(images)).backward()
        torch.testing.assert_close(cache.grad(site), 2 * wanted)
    with model.caching(site, detach=False) as cache, model.hooks(mm.Zero([1, 2], at=behind)):
        loss(model.encode_image(images)).backward()
    assert not cache.grad(site)[..., [1, 2]].any() and cache.grad(site)[..., 3].any()


def test_several_backward_passes_add_up(model, images):
    with model.caching("image.embed", detach=False) as cache:
        embedding = model.encode_image(images)
        loss(embedding).backward(retain_graph=True)
        once = cache.grad("image.embed").clone()
        loss(embedding).backward()
    torch.testing.assert_close(cache.grad("image.embed"), 2 * once)


def test_a_head_s_latents(model, images, sae):
    model.attach(sae, at="image.embed")
    site = "image.embed.sae.latents"
    with model.caching([site, "image.embed"], detach=False) as cache, model.hooks(mm.Zero([0], at=site)):
        loss(model.encode_image(images)).backward()
    scale = model.encode_image(images).norm(dim=1, keepdim=True)  # the head reads unit vectors
    wanted = scale * (cache.grad("image.embed") @ sae.W_dec.T)
    torch.testing.assert_close(cache.grad(site), wanted.detach(), atol=1e-6, rtol=1e-4)


FAULTS = ["detached", "no_grad", "inference", "frozen", "no backward", "cut off", "not kept"]


@pytest.mark.parametrize("fault", FAULTS)
def test_where_there_is_none_it_says_why(model, images, fault):
    site = "image.blocks.0.resid_post"
    detach = fault == "detached"
    if fault == "frozen":
        model.model.requires_grad_(False)
    if fault in ("no_grad", "inference"):
        with torch.no_grad() if fault == "no_grad" else torch.inference_mode():
            _, cache = model.run_with_cache(images, sites=[site], detach=detach)
    elif fault == "cut off":
        patch = mm.Patch(torch.zeros(3, 5, 16), at="image.blocks.1.resid_pre")
        with model.caching(site, detach=False) as cache, model.hooks(patch):
            loss(model.encode_image(images)).backward()
    else:
        out, cache = model.run_with_cache(images, sites=[site], detach=detach)
        if fault in ("detached", "not kept"):
            loss(out.image).backward()
    said = {"detached": "make it with detach=False", "no backward": r"call backward\(\)", "cut off": "cuts it off",
            "not kept": "no site of this cache"}.get(fault, "had no graph")  # fmt: skip
    with pytest.raises(UnknownSite if fault == "not kept" else MMHooksError, match=said):
        cache.grad("image.embed" if fault == "not kept" else site)


@pytest.mark.parametrize("guidance", ["both", "cond"])
def test_denoising_steps(guidance):
    """One gradient a step and half; equal to that of the value itself where it is kept whole."""
    sd = mm.HookedDiffusion(build("sd1"))
    latents, cond = torch.randn(2, 4, 8, 8), torch.randn(2, 12, 16)
    with sd.caching(PATTERN, guidance=guidance, detach=False) as cache:
        total = torch.zeros(())
        for step in range(2):
            with sd.denoising(step, guided=True):
                total = (
                    total
                    + (step + 1) * sd.unet(latents, step, encoder_hidden_states=cond).sample.square().sum()
                )
        total.backward()
    grad = cache.grad(PATTERN)
    assert grad.shape == cache[PATTERN].shape and grad.shape[0] == 2 and grad.isfinite().all()
    assert grad.flatten(1).norm(dim=1).min() > 0
    if guidance == "both":
        assert torch.equal(cache.cond.grad(PATTERN), grad[:, 1:]) and torch.equal(
            cache.uncond.grad(PATTERN), grad[:, :1]
        )
        assert torch.equal(cache.at(1).grad(PATTERN), grad[1])
        with sd.caching(PATTERN, guidance="cond", detach=False) as half:
            total = torch.zeros(())
            for step in range(2):
                with sd.denoising(step, guided=True):
                    total = (
                        total
                        + (step + 1)
                        * sd.unet(latents, step, encoder_hidden_states=cond).sample.square().sum()
                    )
            total.backward()
        torch.testing.assert_close(half.grad(PATTERN), grad[:, 1:])
