"""A flash kernel shows nothing of its inside: what is asked of it is refused, everything around it works."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from transformers import AttentionInterface

import mmhooks as mm
from mmhooks.errors import MMHooksError

from . import tiny_transformers as tiny

REFUSAL = (
    r"CLIPAttention ran without the torch calls at which {} can be intercepted \(its attention is compiled or uses a custom "
    r"kernel\); use sdpa, e.g. model.set_attn_implementation\('sdpa'\)"
)


def flash(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **options):
    """The flash kernel that torch has for the CPU, called as packages of flash attention call theirs: past torch's function."""
    out = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout, False, attn_mask=None, scale=scaling
    )[0]
    return out.transpose(1, 2).contiguous(), None


@pytest.fixture(scope="module")
def model() -> Iterator[mm.HookedCLIP]:
    AttentionInterface.register("kernel_for_cpu", flash)
    made = tiny.clip()
    made.set_attn_implementation("kernel_for_cpu")
    yield mm.hook(made)
    AttentionInterface._global_mapping.pop("kernel_for_cpu")


@pytest.mark.parametrize("leaf", ["q", "k", "v", "pattern"])
@torch.no_grad()
def test_what_is_inside_the_kernel_is_refused(model, leaf):
    pixels, _ = tiny.inputs(model.model)
    site = f"image.blocks.1.attn.{leaf}"
    clean = model.encode_image(pixels)
    with pytest.raises(MMHooksError, match=REFUSAL.format(leaf)), model.caching(site, strict=False):
        model.encode_image(pixels)
    with pytest.raises(MMHooksError, match=REFUSAL.format(leaf)), model.hooks(mm.Zero(at=site), strict=False):
        model.encode_image(pixels)
    assert torch.equal(model.encode_image(pixels), clean)


@torch.no_grad()
def test_what_is_around_it_is_read_and_edited(model):
    pixels, _ = tiny.inputs(model.model)
    clean = model.encode_image(pixels)
    with model.caching(
        ["image.blocks.1.attn.z", "image.blocks.1.attn.head_out", "image.*.resid_mid"]
    ) as cache:
        assert torch.equal(model.encode_image(pixels), clean)
    assert cache["image.blocks.1.attn.z"].shape == (2, 17, 4, 8)
    with model.hooks(mm.Zero([0], at="image.blocks.1.attn.z")):
        assert not torch.equal(model.encode_image(pixels), clean)


@torch.no_grad()
def test_the_remedy_helps(model):
    pixels, _ = tiny.inputs(model.model)
    model.model.set_attn_implementation("sdpa")
    try:
        with model.caching("image.blocks.1.attn.pattern") as cache:
            model.encode_image(pixels)
        assert cache["image.blocks.1.attn.pattern"].shape == (2, 4, 17, 17)
    finally:
        model.model.set_attn_implementation("kernel_for_cpu")
