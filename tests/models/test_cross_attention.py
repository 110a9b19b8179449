"""Inside a U-Net's cross-attention: the named places against attention written out, under every default processor."""

from __future__ import annotations

import copy

import pytest
import torch

import mmhooks as mm
from mmhooks.errors import MMHooksError

from .pipelines import PATTERN, draw, traces


class Naive:
    """A custom processor that writes out what attention is, and keeps it."""

    def __init__(self, kept: dict, name: str) -> None:
        self.kept, self.name = kept, name

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        split = lambda t: t.unflatten(-1, (attn.heads, -1))  # noqa: E731
        text = encoder_hidden_states
        q, k, v = split(attn.to_q(hidden_states)), split(attn.to_k(text)), split(attn.to_v(text))
        pattern = (torch.einsum("bqhe,bkhe->bhqk", q, k) * attn.scale).softmax(-1)
        z = torch.einsum("bhqk,bkhe->bqhe", pattern, v)
        out = attn.to_out[1](attn.to_out[0](z.flatten(-2)))
        for leaf, value in {"q": q, "k": k, "v": v, "pattern": pattern, "z": z, "out": out}.items():
            self.kept.setdefault(f"{self.name}.{leaf}", []).append(value)
        return out


@pytest.mark.parametrize("processor", ["AttnProcessor2_0", "AttnProcessor", "FusedAttnProcessor2_0"])
@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_cross_attention_under_every_default_processor(models, kind, processor):
    from diffusers.models import attention_processor

    sd = copy.deepcopy(models(kind))
    kept: dict[str, list] = {}
    for name in sd.cross_blocks:
        sd.model.get_submodule(name).attn2.set_processor(Naive(kept, f"{name}.cross"))
    want = draw(sd.pipe)
    sd.unet.set_attn_processor(getattr(attention_processor, processor.replace("Fused", ""))())
    if processor.startswith("Fused"):
        sd.unet.fuse_qkv_projections()
    assert {type(p).__name__ for p in sd.unet.attn_processors.values()} == {processor}
    plain = draw(sd.pipe)
    torch.testing.assert_close(plain, want, atol=1e-5, rtol=1e-4)
    with sd.caching("unet.*.cross.*") as cache:
        assert torch.equal(draw(sd.pipe), plain)
    assert set(sd.sites("unet.*.cross.*")) == set(kept) == set(cache)
    for site in kept:
        torch.testing.assert_close(cache[site], torch.stack(kept[site]), atol=2e-5, rtol=1e-3)
        with sd.hooks(fwd_hooks=[(site, lambda t, *, hook: t.clone())]):  # the same values, taken in
            torch.testing.assert_close(draw(sd.pipe), plain, atol=1e-5, rtol=1e-4)
        with sd.hooks(fwd_hooks=[(site, lambda t, *, hook: 1.5 * t + 0.1)]):
            assert not torch.equal(draw(sd.pipe), plain), site
    # one attention head without its values: the same in each of three places
    block, drawn = f"{sd.cross_blocks[-1]}.cross", []
    for leaf in ("pattern", "v", "z"):
        with sd.hooks(mm.Zero([1], at=f"{block}.{leaf}")), sd.caching(f"{block}.z", steps=[0]) as cut:
            drawn.append(draw(sd.pipe))
        z = cut[f"{block}.z"]
        assert not z[0, :, :, 1].any() and z[0, :, :, 0].any()
    torch.testing.assert_close(drawn[0], drawn[1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(drawn[2], drawn[1], atol=1e-5, rtol=1e-4)


def test_gradients_reach_the_patterns(models):
    sd = models("sd1")
    x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 12, 16)
    plain = sd.unet(x, 5, text).sample.detach()
    with sd.caching([PATTERN], detach=False) as cache, sd.denoising(0, guided=False):
        out = sd.unet(x, 5, text).sample
        out.square().sum().backward()
    torch.testing.assert_close(out, plain, atol=1e-6, rtol=1e-5)
    grad = cache.at(0)[PATTERN].grad
    assert grad is not None and grad.shape == (1, 2, 16, 12) and grad.any()
    with sd.caching([PATTERN]), sd.denoising(0, guided=False):
        assert torch.equal(sd.unet(x, 5, text).sample, plain)
    sd.unet.zero_grad(set_to_none=True)


def test_other_processors_raise(models):
    sd = models("sd1")
    plain = traces(sd)
    before = dict(sd.unet.attn_processors)
    sd.pipe.enable_attention_slicing(1)
    try:
        with pytest.raises(
            MMHooksError, match=r"cross\.\* is there under .*SlicedAttnProcessor.*set_default"
        ):
            with sd.caching(PATTERN):
                pass
        with sd.caching(PATTERN.replace("pattern", "out")):  # no insides, no matter
            draw(sd.pipe)
    finally:
        sd.unet.set_attn_processor(dict(before))
    with pytest.raises(MMHooksError, match="SlicedAttnProcessor"):  # exchanged inside the context
        with sd.caching(PATTERN, strict=False):
            sd.pipe.enable_attention_slicing(1)
            draw(sd.pipe)
    sd.unet.set_attn_processor(dict(before))
    assert traces(sd) == plain
