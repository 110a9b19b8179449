"""A hook that writes into what it is given does what returning the written tensor does, everywhere, in every mode."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hooks.conftest import tiny_clip

import mmhooks as mm
from mmhooks.models.clip.sites import example_inputs

from .families import FAMILIES
from .pipelines import draw

Hook = Callable[..., torch.Tensor | None]


def returned(z: torch.Tensor, *, hook: Any) -> torch.Tensor:
    new = z.clone()
    new[..., 0] = 0.25
    return new


def written(z: torch.Tensor, *, hook: Any) -> torch.Tensor:
    z[..., 0] = 0.25
    return z


def written_silently(z: torch.Tensor, *, hook: Any) -> None:
    z[..., 0] = 0.25


def written_past_autograd(z: torch.Tensor, *, hook: Any) -> None:
    z.data[..., 0] = 0.25


def written_by_numpy(z: torch.Tensor, *, hook: Any) -> None:
    z.detach().numpy()[..., 0] = 0.25


WRITERS = [written, written_silently, written_past_autograd, written_by_numpy]


def run(model: mm.HookedCLIP, site: str, fn: Hook, inputs: Any, *, grad: bool) -> list[torch.Tensor]:
    """Output, the site and the stream as a cache in the same context shows them, and the gradient of the input."""
    image = site.startswith("image")
    stream = "image.blocks.*.resid_post" if image else "text.blocks.*.resid_post"
    with model.caching([site, stream]) as cache, model.hooks(fwd_hooks=[(site, fn)]):
        given = inputs[0].clone().requires_grad_(grad and image)
        out = model.encode_image(given) if image else model.encode_text(inputs[1])
        pulled = []
        if grad:
            wanted = [given] if image else [p for p in model.model.parameters() if p.requires_grad]
            pulled = [
                g for g in torch.autograd.grad(out.square().sum(), wanted, allow_unused=True) if g is not None
            ]
    return [out.detach(), *cache.values(), *pulled]


MODES = [torch.no_grad, torch.inference_mode, torch.enable_grad]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_site_of_every_family(family):
    """The modes take turns over the sites; ``CLIP`` is tried in all of them."""
    torch.manual_seed(0)
    model = mm.HookedCLIP(FAMILIES[family]().eval())
    inputs = example_inputs(model.model, batch=1)
    for number, site in enumerate(s for s in model.sites() if ".blocks.0." in s or ".blocks." not in s):
        for mode in MODES if family == "CLIP" else [MODES[number % 3]]:
            grad = mode is torch.enable_grad
            write = WRITERS[number % (2 if grad else len(WRITERS))]
            with mode():
                want = run(model, site, returned, inputs, grad=grad)
                got = run(model, site, write, inputs, grad=grad)
            assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True)), (site, mode)


@pytest.fixture
def model():
    model = mm.HookedCLIP(tiny_clip())
    model.attach(mm.TopKSAE(12, 32, 4, seed=3), at=["image.embed", "text.embed"])
    model.attach(
        mm.ReLUSAE(16, 24, normalize_input="layer_norm"), at="image.blocks.0.resid_post", name="relu"
    )
    model.attach(mm.NCL(12, 24, seed=4), at="image.embed", splice=False)
    return model


@pytest.fixture
def inputs():
    torch.manual_seed(5)
    return torch.randn(2, 3, 16, 16), torch.randint(1, 31, (2, 6))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("write", WRITERS)
def test_inside_heads(model, inputs, mode, write):
    grad = mode is torch.enable_grad
    if grad and write in (written_past_autograd, written_by_numpy):
        pytest.skip("past autograd the values are those written, the gradients are not")
    with mode():
        for site in model.places.head_sites:
            want = run(model, site, returned, inputs, grad=grad)
            got = run(model, site, write, inputs, grad=grad)
            assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True)), site


@pytest.mark.parametrize("mode", MODES)
def test_a_written_pattern_reaches_nothing_but_the_flow(model, inputs, mode):
    """The user's own input, and caches of places that share its memory, keep their values."""
    pixels = inputs[0].clone()
    with mode(), model.caching("image.blocks.0.resid_post") as before:
        with model.hooks(fwd_hooks=[("image.blocks.1.resid_pre", written)]):
            model.encode_image(pixels)
    with mode():
        clean = model.run_with_cache(pixels, sites=["image.blocks.0.resid_post"])[1]
    assert torch.equal(before["image.blocks.0.resid_post"], clean["image.blocks.0.resid_post"])
    assert torch.equal(pixels, inputs[0])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("site", ["image.blocks.0.attn.z", "image.patches", "image.pooled", "image.blocks.0.ln_1",
                                  "text.embed.sae.latents", "text.embed.sae.recon", "text.blocks.1.attn.pattern"])  # fmt: skip
def test_other_toolkits_write_in_place(model, inputs, site, mode):
    def lens(z, hook):
        z[..., 0] = 0.25

    with mode():
        want = model.run_with_hooks(*inputs, fwd_hooks=[(site, returned)])
        got = model.as_transformer_lens().run_with_hooks(*inputs, fwd_hooks=[(site, lens)])
        view = model.as_nnsight([site])
        with view.trace(*inputs):
            view.get(site).output[..., 0] = 0.25
            traced = view.output.save()
    for other in (got, traced):
        assert torch.equal(other.image, want.image) and torch.equal(other.text, want.text)


@pytest.mark.parametrize("shared", ["image.blocks.0.resid_mid", "image.blocks.0.mlp_out", "image.embed"])
def test_backward_hooks_write_in_place(model, inputs, shared):
    """Autograd hands one tensor to both terms of a sum: the other term's gradient stays."""

    def gradients(fn):
        model.model.zero_grad()
        pixels = inputs[0].clone().requires_grad_()
        with model.hooks(bwd_hooks=[(shared, fn)]):
            model.encode_image(pixels).square().sum().backward()
        return [pixels.grad, *(p.grad.clone() for p in model.model.visual.parameters() if p.grad is not None)]

    want = gradients(returned)
    for write in (written, written_silently):
        assert all(torch.equal(a, b) for a, b in zip(want, gradients(write), strict=True))


@pytest.mark.parametrize("where", ["image.embed", "image.embed.sae.latents", "image.blocks.0.attn.z"])
def test_a_users_edit_may_write(model, inputs, where):
    from mmhooks.hooks.edits import Edit

    class Written(Edit):
        keeps_zero = True

        def change(self, value, index, hook):
            return value.mul_(3)

    class Returned(Edit):
        keeps_zero = True

        def change(self, value, index, hook):
            return value * 3

    for options in ({}, {"features": [0, 1]}):
        for error_term in (True, False):
            model.attach(mm.TopKSAE(12, 32, 4), at="image.embed", name="other", error_term=error_term)
            outs = []
            for kind in (Written, Returned):
                with torch.no_grad(), model.hooks(kind(at=where, **options)):
                    outs.append(model.encode_image(inputs[0]))
            assert torch.equal(*outs)
            model.detach("other")


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_every_step_of_a_diffusion_run(models, kind):
    """What is passed at every denoising step is not written again and again."""
    model = models(kind)
    names = [
        s
        for s in model.sites()
        if s == "text.cond" or ".mid_block." in s or s.endswith(("0.attn.z", "0.resid_pre"))
    ]
    native = ["unet.down_blocks.0", "unet.mid_block", "unet.conv_in"]
    for number, site in enumerate([*names, *native]):
        outs = []
        for fn in (returned, WRITERS[number % len(WRITERS)]):
            with model.hooks(fwd_hooks=[(site, fn)]):
                outs.append(draw(model.pipe))
        assert torch.equal(*outs), site


@pytest.mark.parametrize("mode", MODES)
def test_readers_leave_every_bit(model, inputs, mode):
    """Whatever a function looks at, nothing moves; what it keeps in grad mode is part of the graph."""
    with mode():
        model.model.requires_grad_(False)
        clean = model.forward(*inputs)
        for site in (*model.sites(), "visual.transformer.resblocks.0.attn", "visual.conv1"):
            with model.hooks(fwd_hooks=[(site, lambda t, *, hook: print(t.sum(), file=io.StringIO()))]):
                out = model.forward(*inputs)
            assert torch.equal(out.image, clean.image) and torch.equal(out.text, clean.text), site


@pytest.mark.parametrize("site", ["image.blocks.0.attn.z", "image.blocks.0.resid_post", "image.pooled", "image.patches",
                                  "image.embed.sae.latents"])  # fmt: skip
def test_what_a_reader_keeps_has_the_gradient_of_the_flow(model, inputs, site):
    kept = []

    def keep(z, *, hook):
        z.retain_grad()
        kept.append(z)

    with model.hooks(mm.Steer([0], at=site, direction=0.0), fwd_hooks=[(site, keep)]):
        model.encode_image(inputs[0]).square().sum().backward()
    assert kept[0].grad is not None and (site.endswith("latents") or bool(kept[0].grad.any()))
