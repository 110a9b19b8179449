"""Grad, no_grad, inference, checkpointing, compile: the same edits, the same numbers."""

from __future__ import annotations

import threading

import pytest
import torch

import mmhooks as mm
from mmhooks.errors import HookDidNotFire, MMHooksError

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


def test_compiled_behind_our_back_is_not_silent(model, images):
    """The native method compiled while idle does not know of hooks: the context says that nothing fired."""
    torch.compiler.reset()
    fast = torch.compile(model.model.encode_image, backend="eager")
    with torch.no_grad():
        clean = fast(images)
        with pytest.raises(HookDidNotFire, match="compiled"):
            with model.hooks(mm.Zero(at="image.embed")):
                fast(images)
        torch.testing.assert_close(fast(images), clean)
