"""Every kind of head in a model's graph: idle it changes no bit, a mask is the two-decode formula."""

from __future__ import annotations

import pytest
import torch

import mmhooks as mm
from mmhooks.heads import NCL, Head

VISION = {"image_size": 16, "patch_size": 8, "width": 16, "layers": 2, "head_width": 8}
TEXT = {"context_length": 6, "vocab_size": 32, "width": 16, "heads": 2, "layers": 2}
MASK = [0, 3, 5, 8, 13, 21, 30]


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(40, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model() -> mm.HookedCLIP:
    from open_clip import CLIP

    torch.manual_seed(0)
    return mm.HookedCLIP(CLIP(embed_dim=12, vision_cfg=dict(VISION), text_cfg=dict(TEXT)).eval())  # type: ignore[arg-type]


HEADS = {
    "topk": lambda: mm.TopKSAE(12, 32, 4, seed=3),
    "batchtopk": lambda: mm.BatchTopKSAE(12, 32, 4, seed=3),
    "matryoshka": lambda: mm.MatryoshkaSAE(12, 32, 4, seed=3),
    "nested K": lambda: mm.MatryoshkaSAE(12, 32, 4, ks=(2, 4), seed=3),
    "jumprelu": lambda: mm.JumpReLUSAE(12, 32, threshold=0.15, seed=3),
    "relu": lambda: mm.ReLUSAE(12, 32, seed=3),
    "ncl with decoder": lambda: NCL(12, 32, seed=3),
}


@pytest.fixture(params=HEADS)
def head(request: pytest.FixtureRequest, model: mm.HookedCLIP, images: torch.Tensor) -> Head:
    head = HEADS[request.param]()
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        x = model.encode_image(images)
        for name, p in head.named_parameters():
            if name.startswith("b"):
                p.add_(0.05 * torch.randn(p.shape, generator=g))
        if isinstance(head, mm.BatchTopKSAE):
            head.calibrate(x)
        if isinstance(head, NCL):
            head.fit_decoder(x)
    return head


def by_hand(head: Head, x: torch.Tensor) -> torch.Tensor:
    scale = x.norm(dim=-1, keepdim=True)
    f = head.encode(x / scale)
    masked = f.clone()
    masked[..., MASK] = 0
    return scale * head.decode(masked) + (x - scale * head.decode(f))


def test_idle_or_silent_it_changes_no_bit(model, images, head) -> None:
    with torch.no_grad():
        x = model.encode_image(images)
        model.attach(head, at=["image.embed", "text.embed"])
        assert torch.equal(model.encode_image(images), x)
        site = f"image.embed.{head.name}"
        out, cache = model.run_with_cache(images=images, sites=[f"{site}.latents", f"{site}.recon"])
        assert torch.equal(out.image, x)
        f = cache[f"{site}.latents"]
        torch.testing.assert_close(f, head.encode(x / x.norm(dim=-1, keepdim=True)))
        with model.hooks(mm.Clamp(range(32), min=-1.0)):  # an edit that changes nothing
            assert torch.equal(model.encode_image(images), x)
        silent = (f == 0).all(dim=0).nonzero().flatten()
        if len(silent):
            with model.hooks(mask=silent):
                assert torch.equal(model.encode_image(images), x)


def test_a_mask_is_the_two_decode_formula(model, images, head) -> None:
    x = model.encode_image(images)
    model.attach(head, at="image.embed")
    with model.hooks(mask=MASK):
        z = model.encode_image(images)
    assert not torch.equal(z, x)
    torch.testing.assert_close(z, by_hand(head, x), atol=1e-5, rtol=1e-4)


def test_gradients_through_a_mask_reach_pixels_and_head(model, images, head) -> None:
    weights = torch.randn(40, 12)
    parameters = [p for n, p in head.named_parameters() if "b_pre" not in n and "b_dec" not in n]
    pixels = images.clone().requires_grad_()
    inputs = [pixels, *parameters]
    want = torch.autograd.grad((by_hand(head, model.encode_image(pixels)) * weights).sum(), inputs)
    model.attach(head, at="image.embed")
    with model.hooks(mask=MASK):
        got = torch.autograd.grad((model.encode_image(pixels) * weights).sum(), inputs)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def test_pre_activations_can_be_edited(model, images, head) -> None:
    x = model.encode_image(images)
    model.attach(head, at="image.embed")
    with model.hooks(mm.Steer([3], strength=5.0, at=f"image.embed.{head.name}.pre")):
        z = model.encode_image(images)
    scale = x.norm(dim=-1, keepdim=True)
    pre = head.pre(x / scale)
    raised = pre.clone()
    raised[..., 3] += 5.0
    change = head.activate(raised) - head.activate(pre)
    torch.testing.assert_close(z, x + scale * (change @ head.W_dec), atol=1e-5, rtol=1e-4)


def test_a_set_for_one_head_is_refused_by_another(model, images, head) -> None:
    model.attach(head, at="image.embed")
    with model.hooks(mask=mm.FeatureSet(MASK, 32, head=head.id)):
        model.encode_image(images)
    with pytest.raises(mm.errors.WrongHead):
        with model.hooks(mask=mm.FeatureSet(MASK, 32, head="topk-0000")):
            pass
