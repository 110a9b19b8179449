"""What hooks cost a diffusion pipeline: idle, all cross-attention maps, a masked conditioner.

    python -m pytest benchmarks/test_diffusion.py --benchmark-only

Against the plain pipeline, and against a collector as diffusers' documentation suggests it: a custom processor that
computes attention by hand. Correctness first, then turns round by round, as in race.py. The pipeline is SD 1.x's
shape at mini-sd's size (8 x 8 latents, cross-attention at 8 x 8 and 4 x 4), random weights, 5 guided steps.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
import torch
from race import race

import mmhooks as mm

sys.path.append(str(Path(__file__).parents[1] / "tests" / "models"))
STEPS = 5
pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture(scope="module")
def sd() -> mm.HookedDiffusion:
    from pipelines import LENGTH, build, text_encoder, unet

    pipe = build("sd1")
    torch.manual_seed(0)
    wide = unet(
        192, block_out_channels=(128, 128), norm_num_groups=32, attention_head_dim=8, layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    pipe.register_modules(unet=wide, text_encoder=text_encoder(192, layers=4))
    assert pipe.text_encoder.config.max_position_embeddings == LENGTH
    return mm.HookedDiffusion(pipe)


def draw(pipe) -> torch.Tensor:
    return pipe(
        ["a red panda", "blue kite"] * 2, num_inference_steps=STEPS, guidance_scale=4.0, output_type="latent",
        generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip


class Collector:
    """A custom processor: classic attention, its probabilities handed on."""

    def __init__(self, take) -> None:
        self.take = take

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (
            attn.head_to_batch_dim(p) for p in (attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text))
        )
        pattern = attn.get_attention_scores(q, k)
        self.take(pattern.unflatten(0, (-1, attn.heads)))
        return attn.to_out[1](attn.to_out[0](attn.batch_to_head_dim(pattern @ v)))


def test_maps(benchmark, sd):
    """All cross-attention patterns: kept, and summed to heat maps."""
    from torch.nn import functional as F

    from mmhooks.analysis.attribution.attention_maps import layer_size

    plain, sites = draw(sd.pipe), "unet.*.cross.pattern"
    found: list[torch.Tensor] = []

    def collect(take):
        before = dict(sd.unet.attn_processors)
        for name in sd.cross_blocks:
            sd.model.get_submodule(name).attn2.set_processor(Collector(take))
        out = draw(sd.pipe)
        sd.unet.set_attn_processor(before)
        return out

    def keep_by_hand():
        found.clear()
        return collect(found.append)

    def keep():
        with sd.caching(sites) as cache:
            out = draw(sd.pipe)
        return out, cache

    def heat_by_hand():
        sums = torch.zeros(4, 12, 8, 8)

        def take(pattern):
            mean = pattern[4:].mean(1).transpose(1, 2)
            grid = mean.unflatten(-1, layer_size(mean.shape[-1], (8, 8)))
            sums.add_(F.interpolate(grid, (8, 8), mode="bilinear"))

        collect(take)
        return sums / (STEPS * len(sd.cross_blocks))

    def heat():
        with mm.attention_maps(sd) as maps:
            draw(sd.pipe)
        return maps.maps

    out, cache = keep()
    assert torch.equal(out, plain)
    torch.testing.assert_close(keep_by_hand(), plain, atol=1e-3, rtol=1e-3)
    count = len(sd.cross_blocks)
    by_call: dict[tuple[int, ...], list[torch.Tensor]] = {}
    for pattern in found:
        by_call.setdefault(tuple(pattern.shape), []).append(pattern)
    assert len(found) == count * STEPS == sum(len(v) for v in cache.values())
    for shape, patterns in by_call.items():
        ours = torch.stack([c for c in cache.values() if c.shape[1:] == shape]).sum((0, 1))
        torch.testing.assert_close(ours, torch.stack(patterns).sum(0), atol=1e-2, rtol=1e-3)
    torch.testing.assert_close(heat(), heat_by_hand(), atol=1e-4, rtol=1e-3)
    race(benchmark, f"all {count} cross-attention maps, {STEPS} steps", {
        "plain pipeline": lambda: draw(sd.pipe),
        "mmhooks, after contexts": lambda: draw(sd.pipe),
        "mmhooks, patterns kept": keep,
        "custom processor, patterns kept": keep_by_hand,
        "mmhooks, heat maps": heat,
        "custom processor, heat maps": heat_by_hand,
    })  # fmt: skip


def test_masked_conditioner(benchmark, sd):
    """Dimensions, and features of a head, set to zero in the conditioner of the prompt's half."""
    dims = list(range(0, 192, 5))
    torch.manual_seed(1)
    sae = mm.TopKSAE(192, 1024, 32)
    embeds = sd.pipe.encode_prompt(["a red panda", "blue kite"] * 2, "cpu", 1, True)
    edited = mm.Zero(dims)(embeds[0])
    by_hand = lambda: sd.pipe(  # noqa: E731
        prompt_embeds=edited, negative_prompt_embeds=embeds[1], num_inference_steps=STEPS, guidance_scale=4.0,
        output_type="latent", generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip

    def masked(edit):
        with sd.hooks(edit):
            return draw(sd.pipe)

    raw = mm.Zero(dims, at="text.cond", guidance="cond")
    assert torch.equal(masked(raw), by_hand()) and not torch.equal(by_hand(), draw(sd.pipe))
    sd.attach(sae, at="text.cond")
    latents = mm.Zero(range(0, 1024, 4), at="text.cond.sae.latents", guidance="cond")
    assert not torch.equal(masked(latents), draw(sd.pipe))
    race(benchmark, f"masked conditioner, {STEPS} steps", {
        "plain pipeline": lambda: draw(sd.pipe),
        "39 dimensions masked": lambda: masked(raw),
        "256 features of an SAE masked": lambda: masked(latents),
    })  # fmt: skip
    sd.detach()


@pytest.mark.parametrize("pixels", [4096, 1024, 256])
def test_heat_of_a_layer(benchmark, pixels):
    """What einops costs where a pattern becomes heat: the fold alone, and with the resize that follows. Processor time."""
    from einops import reduce
    from torch.nn import functional as F

    rows = int(pixels**0.5)
    pattern = torch.rand(2, 8, pixels, 77, generator=torch.Generator().manual_seed(0))

    def by_einops():
        return reduce(pattern, "b head (h w) token -> b token h w", "mean", h=rows)

    def by_hand():
        return pattern.mean(1).unflatten(1, (rows, -1)).permute(0, 3, 1, 2)

    def resized(fold):
        return lambda: F.interpolate(fold(), (64, 64), mode="bilinear", align_corners=False)

    torch.testing.assert_close(by_einops(), by_hand(), atol=1e-6, rtol=1e-5)
    contenders = {
        "by hand": by_hand,
        "einops": by_einops,
        "by hand, resized to 64 x 64": resized(by_hand),
        "einops, resized to 64 x 64": resized(by_einops),
    }
    case = f"heat of a layer of {rows} x {rows}, 8 attention heads, 2 images"
    race(benchmark, case, contenders, timer=time.process_time)


@pytest.mark.parametrize("fold", ["(b head) l e -> b head l e", "b head l e -> (b head) l e"])
def test_one_fold(benchmark, fold):
    """A fold that copies nothing: the call alone."""
    from einops import rearrange

    shape = (16, 256, 77) if fold.startswith("(") else (2, 8, 256, 77)
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0))

    def by_hand():
        return x.unflatten(0, (2, 8)) if fold.startswith("(") else x.flatten(0, 1)

    def by_einops():
        return rearrange(x, fold, **({"head": 8} if fold.startswith("(") else {}))

    assert torch.equal(by_hand(), by_einops())
    contenders = {"by hand": by_hand, "einops": by_einops}
    race(benchmark, f"one fold, {fold}", contenders, loops=2000, timer=time.process_time)
