"""Grad, no_grad, inference, checkpointing, compile: the same edits, the same numbers."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from models import tiny_transformers

import mmhooks as mm
from mmhooks.errors import MMHooksError

EDITS = [
    mm.Zero([1], at="image.blocks.0.attn.z"),
    mm.Steer(at="image.blocks.1.resid_mid", direction=torch.linspace(0, 1, 16), strength=0.5),
    mm.Zero([0, 3], at="image.blocks.0.mlp.post"),
]


def gradients(model, images):
    model.model.zero_grad()
    with model.hooks(*EDITS):
        model.encode_image(images).square().sum().backward()
    return [p.grad.clone() for p in model.model.visual.parameters() if p.grad is not None]


def test_checkpointing_recomputes_under_the_same_edits(model, images):
    plain = gradients(model, images)
    model.model.set_grad_checkpointing()
    for a, b in zip(plain, gradients(model, images), strict=True):
        torch.testing.assert_close(a, b)
    model.model.zero_grad()
    with model.hooks(*EDITS):  # as CUDA does: backward in a thread that opened no context
        loss = model.encode_image(images).square().sum()
        with model.hooks(mm.Zero(at="image.blocks.1.mlp_out"), strict=False):  # and another one open
            thread = threading.Thread(target=loss.backward)
            thread.start()
            thread.join()
    for a, b in zip(
        plain, [p.grad for p in model.model.visual.parameters() if p.grad is not None], strict=True
    ):
        torch.testing.assert_close(a, b)
    assert not any("_call_impl" in m.__dict__ for m in model.model.modules())


def test_a_checkpointed_backward_after_the_context_raises(model, images):
    model.model.set_grad_checkpointing()
    with model.hooks(*EDITS):
        loss = model.encode_image(images).sum()
    with pytest.raises(MMHooksError, match="within the with block"):
        loss.backward()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["clip", "dinov2"])
def test_transformers_recompute_under_the_same_edits(kind, reentrant):
    """Its layers checkpoint their ``forward``, which no hook on the layer's call sees; turned on after hooking."""
    model = mm.hook(getattr(tiny_transformers, kind)())
    pixels = torch.randn(2, 3, 32, 32)
    edits = [
        mm.Zero([1], at="image.blocks.0.attn.z"),
        mm.Steer(at="image.blocks.2.mlp_out", strength=2.0, tokens="patch"),
    ]

    def gradients(threaded):
        model.model.zero_grad()
        with model.hooks(*edits):
            loss = model.encode_image(pixels.requires_grad_()).square().sum()
            with model.hooks(mm.Zero(at="image.blocks.1.mlp_out"), strict=False):
                if threaded:  # as CUDA does: backward in a thread that opened no context
                    thread = threading.Thread(target=loss.backward)
                    thread.start()
                    thread.join()
                else:
                    loss.backward()
        return {name: p.grad.clone() for name, p in model.model.named_parameters() if p.grad is not None}

    plain = gradients(False)
    model.model.train()  # these have no dropout
    model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for threaded in (False, True):
        found = gradients(threaded)
        assert found.keys() == plain.keys()
        for name, grad in found.items():
            torch.testing.assert_close(grad, plain[name])
    with model.hooks(*edits):
        loss = model.encode_image(pixels.requires_grad_()).sum()
    with pytest.raises(MMHooksError, match="within the with block"):
        loss.backward()
    with torch.no_grad():
        assert torch.equal(model.encode_image(pixels), model.encode_image(pixels))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_modes_agree(model, images, sae, mode):
    model.attach(sae, at="image.embed")
    with model.hooks(*EDITS, mask=range(20)):
        want = model.encode_image(images)
        with mode():
            got = model.encode_image(images)
    torch.testing.assert_close(got, want.detach(), atol=1e-5, rtol=1e-5)


def test_gradient_cache(model, images):
    out, cache = model.run_with_cache(images, sites=["image.blocks.*.resid_post"], detach=False)
    out.image.sum().backward()
    assert cache.grad("image.blocks.0.resid_post").shape == (3, 5, 16)
    _, cache = model.run_with_cache(images, sites=["image.embed"])
    with pytest.raises(MMHooksError, match="detach=False"):
        cache.grad("image.embed")


def test_backward_hooks_change_gradients(model, images):
    pixels = images.clone().requires_grad_()
    with model.hooks(bwd_hooks=[("image.blocks.0.resid_pre", lambda g, *, hook: torch.zeros_like(g))]):
        model.encode_image(pixels).sum().backward()
    assert not pixels.grad.any()


def test_compiled_encoder_follows_the_contexts(model, images, sae):
    """Compiled idle, then under masks, then idle again: never stale code."""
    model.attach(sae, at="image.embed")
    fast = torch.compile(model.encode_image, backend="eager")
    with torch.no_grad():
        clean = model.encode_image(images)
        torch.testing.assert_close(fast(images), clean)
        for mask in (range(16), range(16, 32)):
            with model.hooks(mask=mask, fwd_hooks=[("image.blocks.0.attn.z", lambda t, *, hook: t * 0.5)]):
                want, got = model.encode_image(images), fast(images)
            torch.testing.assert_close(got, want)
            assert not torch.allclose(got, clean, atol=1e-3)
        torch.testing.assert_close(fast(images), clean)


WHOLE = """
import sys, torch, mmhooks as mm
from hooks.conftest import tiny_clip
model = mm.HookedCLIP(tiny_clip())
model.attach(mm.TopKSAE(12, 32, 4), at="image.embed")
images = torch.randn(3, 3, 16, 16)
torch.set_grad_enabled(False)
for site in sys.argv[1:]:
    torch.compiler.reset()
    fast = torch.compile(model.encode_image, backend="eager", fullgraph=True)
    with model.hooks(mm.Zero([1], at=site), mm.Steer([0], at=site, direction=0.5), mask=range(8)):
        torch.testing.assert_close(fast(images), model.encode_image(images), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(fast(images), model.encode_image(images), atol=1e-6, rtol=1e-5)
print("compiled", len(sys.argv) - 1)
"""


@pytest.mark.slow
def test_every_kind_of_site_compiles_whole():
    """One graph, no break: edits at the site, a mask through a head. Aside, where no type checks break the graph."""
    sites = ["image.patches", "image.blocks.0.resid_pre", "image.blocks.0.attn.q", "image.blocks.1.attn.pattern",
             "image.blocks.0.attn.head_out", "image.blocks.0.resid_mid", "image.blocks.1.mlp.post", "image.pooled"]  # fmt: skip
    tests = Path(__file__).parents[1]
    run = subprocess.run(
        [sys.executable, "-c", WHOLE, *sites], cwd=tests, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests)])},
    )  # fmt: skip
    assert run.stdout.strip() == f"compiled {len(sites)}", run.stderr[-3000:]


def test_native_code_compiled_while_idle_follows_the_contexts(model, images):
    """Dynamo does not look at hooks; both blocks share their code, and only one of them is hooked."""
    torch.compiler.reset()
    fast = torch.compile(model.model.encode_image, backend="eager")
    other = torch.ones(16)
    edits = (
        mm.Zero([1], at="image.blocks.1.mlp.post"),
        mm.Zero([3], at="image.blocks.1.mlp.post"),
        mm.Steer([1, 2], at="image.blocks.0.resid_mid", direction=other, tokens=[0, 1]),
    )
    with torch.no_grad():
        clean = model.encode_image(images)
        torch.testing.assert_close(fast(images), clean)
        for edit in edits:
            with model.hooks(edit):
                got = fast(images)
            with model.hooks(edit):
                want = model.encode_image(images)
            torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)
            assert not torch.allclose(got, clean, atol=1e-3)
        for batch in (images, 2 * images):
            with model.caching("image.blocks.*.resid_post") as cache:
                fast(batch)
            for site, value in model.run_with_cache(batch, sites="image.blocks.*.resid_post")[1].items():
                torch.testing.assert_close(cache[site], value, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(fast(images), clean)


def test_a_reader_does_not_change_what_dropout_draws(model, images):
    model.model.train()
    model.model.visual.transformer.resblocks[0].attn.dropout = 0.3
    torch.manual_seed(0)
    clean = [model.encode_image(images) for _ in range(2)]
    torch.manual_seed(0)
    with model.caching("image.blocks.0.attn.*"):
        cached = model.encode_image(images)
    with torch.no_grad(), model.hooks(fwd_hooks=[("image.blocks.0.attn.z", lambda t, *, hook: None)]):
        read = model.encode_image(images)
    assert torch.equal(cached, clean[0]) and torch.equal(read, clean[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_converted_after_attaching(model, images, sae, dtype):
    """The head stays as it is; its change is added in the model's dtype."""
    model.attach(sae, at="image.embed")
    with torch.no_grad(), model.hooks(mask=range(32)):
        want = model.encode_image(images)
        model.model.to(dtype)
        got = model.encode_image(images.to(dtype))
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), want, atol=0.05, rtol=0.1)


BROKEN = """
import sys, torch, mmhooks as mm
from torch import nn
from mmhooks.hooks.sites import SiteMap
from mmhooks.hooks.taps import _compiles
from mmhooks.models.hooked import HookedModel

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 4)
    def forward(self, x):
        x = self.lin(x)
        torch._dynamo.graph_break()
        return x * 2

torch.manual_seed(0)
torch.set_grad_enabled(False)
net = nn.Sequential(*(Block() for _ in range(3)))
model, x = HookedModel(net, SiteMap(net)), torch.randn(2, 4)
assert not _compiles(), "something was compiled before this test began"
fast = None if sys.argv[1] == "inside" else torch.compile(net, backend="eager")
for factors in [{"0.lin": 0.5}, {"1.lin": 0.25}, {"0.lin": 0.5, "1.lin": 0.25, "2.lin": 3.0}, {"0": 0.5, "2": 3.0}] * 2:
    hooks = [(site, lambda t, *, hook, c=c: t * c) for site, c in factors.items()]
    with model.hooks(fwd_hooks=hooks):
        want = net(x)
    with model.hooks(fwd_hooks=hooks):
        fast = fast or torch.compile(net, backend="eager")
        assert torch.allclose(fast(x), want), factors
    assert torch.allclose(fast(x), net(x)), factors
print("followed")
"""


@pytest.mark.parametrize("compiled", ["before", "inside"])
def test_code_in_pieces_follows_hooks_on_siblings(compiled):
    """Three blocks of one class, cut by a graph break, hooked differently; compiled before or inside a context."""
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-c", BROKEN, compiled], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(root)}
    )  # fmt: skip
    assert run.stdout.strip() == "followed", run.stderr[-3000:]
