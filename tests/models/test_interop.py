"""The same three interventions through mmhooks, TransformerLens and nnsight."""

from __future__ import annotations

import pytest
import torch
from hooks.conftest import fingerprint, tiny_clip

import mmhooks as mm

STEER = torch.linspace(-1, 1, 16)
INTERVENTIONS = {
    "zero attention head": (
        "image.blocks.0.attn.z",
        lambda t: torch.cat([0 * t[..., :1, :], t[..., 1:, :]], -2),
    ),
    "steer residual": ("text.blocks.1.resid_post", lambda t: t + STEER),
    "zero features": ("image.embed.sae.latents", lambda t: t * (torch.arange(32) > 15)),
}


@pytest.fixture
def model():
    model = mm.HookedCLIP(tiny_clip())
    model.attach(mm.TopKSAE(12, 32, 4), at=["image.embed"])
    return model


@pytest.fixture
def inputs():
    torch.manual_seed(5)
    return torch.randn(2, 3, 16, 16), torch.randint(1, 31, (2, 6))


@pytest.mark.parametrize("name", INTERVENTIONS)
def test_three_toolkits_agree(model, inputs, name):
    site, change = INTERVENTIONS[name]
    before = fingerprint(model.model)
    clean = model.forward(*inputs)
    ours = model.run_with_hooks(*inputs, fwd_hooks=[(site, lambda t, *, hook: change(t))])
    lens = model.as_transformer_lens().run_with_hooks(*inputs, fwd_hooks=[(site, lambda t, hook: change(t))])
    view = model.as_nnsight([site])
    with view.trace(*inputs):
        node = view.get(site)
        node.output = change(node.output)
        theirs = view.output.save()
    for other in (lens, theirs):
        torch.testing.assert_close(other.image, ours.image, atol=1e-6, rtol=0)
        torch.testing.assert_close(other.text, ours.text, atol=1e-6, rtol=0)
    assert not (torch.equal(ours.image, clean.image) and torch.equal(ours.text, clean.text))
    assert fingerprint(model.model) == before


def test_lens_caches_and_encoders(model, inputs):
    lens = model.as_transformer_lens()
    out, cache = lens.run_with_cache(*inputs)
    _, ours = model.run_with_cache(*inputs)
    assert set(cache.keys()) == set(ours) == set(model.sites())
    for site in ours:
        torch.testing.assert_close(cache[site], ours[site], atol=1e-6, rtol=1e-5)
    seen = []
    with lens.hooks(fwd_hooks=[("image.embed", lambda t, hook: seen.append(hook.name))]):
        assert torch.equal(lens.encode_image(inputs[0]), model.encode_image(inputs[0]))
        lens.encode_text(inputs[1])
    assert seen == ["image.embed"]
    assert set(ours.to_transformer_lens(lens).keys()) == set(ours)


def test_lens_backward_hooks(model, inputs):
    lens, grads = model.as_transformer_lens(), []
    with lens.hooks(bwd_hooks=[("image.blocks.0.attn.z", lambda g, hook: grads.append(g.shape))]):
        lens.encode_image(inputs[0]).sum().backward()
    assert grads == [(2, 5, 2, 8)]


def test_trace_reaches_sites_by_name(model, inputs):
    with model.trace(inputs[0], sites=["image.embed", "image.blocks.*.resid_post"]) as tracer:
        z = tracer.sites.image.embed.output.save()
    assert torch.equal(z, model.encode_image(inputs[0]))
