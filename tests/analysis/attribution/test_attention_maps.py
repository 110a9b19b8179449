"""Heat maps of words against a naive collector: with and without guidance, in batches, on non-square images."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from models.pipelines import build, draw, tokenizer
from PIL import Image
from torch.nn import functional as F

import mmhooks as mm
from mmhooks.analysis.attribution.attention_maps import attention_maps, head_maps, layer_size
from mmhooks.errors import HookDidNotFire, MMHooksError, ShapeMismatch
from mmhooks.report.heat import heat_grid
from mmhooks.utils.overlay import overlay


@pytest.fixture(scope="module")
def sd():
    return mm.HookedDiffusion(build("sd1"))


class Collector:
    """Writes attention out for one sample, head and layer after the other."""

    def __init__(self, kept: list, cross: bool) -> None:
        self.kept, self.cross = kept, cross

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (
            attn.head_to_batch_dim(p) for p in (attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text))
        )
        pattern = attn.get_attention_scores(q, k)
        if self.cross:
            self.kept.append(pattern.unflatten(0, (-1, attn.heads)))
        return attn.to_out[0](attn.batch_to_head_dim(pattern @ v))


@pytest.mark.parametrize("half", ["cond", "uncond"])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("size", [(16, 16), (16, 24)])  # latents 8 x 8; 8 x 12, then 4 x 6
@pytest.mark.parametrize("processor", ["AttnProcessor2_0", "AttnProcessor"])
def test_equals_a_naive_collector(sd, half, guidance, size, processor):
    from diffusers.models import attention_processor

    sd = copy.deepcopy(sd)
    prompts = ["a red panda", "blue kite on a house"]
    options = {"height": size[0], "width": size[1], "num_images_per_prompt": 2, "guidance": guidance}
    kept: list[torch.Tensor] = []
    for name, module in sd.unet.named_modules():
        if name.endswith(("attn1", "attn2")):
            module.set_processor(Collector(kept, name.endswith("attn2")))
    draw(sd.pipe, prompts, **options)
    if half == "uncond" and guidance == 1:
        with pytest.raises(HookDidNotFire, match="with guidance"):
            with attention_maps(sd_with(sd, attention_processor, processor), guidance=half) as maps:
                draw(sd.pipe, prompts, **options)
            _ = maps.maps
        return
    high, wide = size[0] // 2, size[1] // 2
    first = 4 if guidance > 1 and half == "cond" else 0
    naive = torch.zeros(4, 12, high, wide)
    for pattern in kept:
        for b in range(4):
            for token in range(12):
                for head in range(pattern.shape[1]):
                    grid = pattern[first + b, head, :, token]
                    rows = high if len(grid) == high * wide else high // 2
                    grid = grid.reshape(1, 1, rows, len(grid) // rows)
                    grid = F.interpolate(grid, (high, wide), mode="bilinear")[0, 0]
                    naive[b, token] += grid / pattern.shape[1] / len(kept)
    sd_with(sd, attention_processor, processor)
    plain = draw(sd.pipe, prompts, **options)
    with attention_maps(sd, guidance=half) as maps:
        draw(sd.pipe, ["house", "house"], **options)  # an earlier run is forgotten
        assert torch.equal(draw(sd.pipe, prompts, **options), plain)
    torch.testing.assert_close(maps.maps, naive, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(maps.maps.sum(1), torch.ones(4, high, wide))
    assert maps.layers == 3 * 4
    if half == "cond":
        found = torch.cat([naive[:2, 3:4], naive[2:, 2:3]]).squeeze(1)  # panda, kite
        heat = torch.cat([maps.word("panda", prompts[0])[:2], maps.word("kite", [prompts[1]])[2:]])
        torch.testing.assert_close(heat, found, atol=1e-6, rtol=1e-4)


def sd_with(sd, module, processor):
    sd.unet.set_attn_processor(getattr(module, processor)())
    return sd


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("size", [(16, 16), (16, 24)])
def test_head_maps_equal_the_public_code(sd, guidance, size):
    """``trace.py``: a sum over steps for each (layer, head), resized bicubically, clamped at 0, and their mean; token by
    token. The public code's is this times the number of steps."""
    from diffusers.models import attention_processor

    sd = copy.deepcopy(sd)
    prompts = ["a red panda", "blue kite on a house"]
    options = {"height": size[0], "width": size[1], "guidance": guidance}
    kept: dict[str, list[torch.Tensor]] = {}
    for name, module in sd.unet.named_modules():
        if name.endswith("attn2"):
            module.set_processor(Collector(kept.setdefault(name, []), True))
    draw(sd.pipe, prompts, **options)
    sd_with(sd, attention_processor, "AttnProcessor2_0")
    high, wide = size[0] // 2, size[1] // 2
    first = 2 if guidance > 1 else 0
    by_head = {}
    for name, patterns in kept.items():
        steps = len(patterns)
        for head in range(patterns[0].shape[1]):
            summed = sum(pattern[first:, head] for pattern in patterns)  # [b pixel token]
            rows = high if summed.shape[1] == high * wide else high // 2
            tokens = []
            for token in range(12):
                grid = summed[:, :, token].reshape(2, 1, rows, -1)
                tokens.append(F.interpolate(grid, (high, wide), mode="bicubic").clamp_(min=0)[:, 0])
            by_head[name, head] = torch.stack(tokens, 1) / steps
    with head_maps(sd) as heads:
        draw(sd.pipe, ["house", "house"], **options)  # an earlier run is forgotten
        draw(sd.pipe, prompts, **options)
    torch.testing.assert_close(heads.maps, torch.stack(list(by_head.values())).mean(0), atol=1e-6, rtol=1e-4)
    assert heads.layers == sum(map(len, kept.values())) and float(heads.maps.min()) >= 0
    for site in heads.sums:
        name = next(n for n in kept if n.removesuffix(".attn2") == site[5:].removesuffix(".cross.pattern"))
        own = [heat for (layer, _), heat in by_head.items() if layer == name]
        torch.testing.assert_close(heads.of(site), torch.stack(own).mean(0), atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(heads.of(site, head=1), by_head[name, 1], atol=1e-6, rtol=1e-4)
    two = list(heads.sums)[:2]
    torch.testing.assert_close(heads.of(two), (heads.of(two[0]) + heads.of(two[1])) / 2)
    panda = heads.word("panda", prompts[0], heads.of(two[0], head=0))
    torch.testing.assert_close(panda, heads.of(two[0], head=0)[:, 3])


def test_head_maps_name_what_is_missing(sd):
    with head_maps(sd) as heads:
        with pytest.raises(HookDidNotFire, match="no attention"):
            _ = heads.maps
        draw(sd.pipe, "a red panda")
    site = next(iter(heads.sums))
    with pytest.raises(MMHooksError, match="expected layers that were recorded"):
        heads.of("unet.nowhere")
    with pytest.raises(ShapeMismatch, match="attention heads of"):
        heads.of(site, head=99)
    with pytest.raises(ShapeMismatch, match="at least one layer, got none"):
        heads.of([])


def test_words(sd):
    with attention_maps(sd, steps=[1]) as maps:
        draw(sd.pipe, "a red panda a kite")
    assert maps.layers == 4
    prompt = "a red panda a kite"
    assert maps.places("red panda", prompt) == [2, 3] and maps.places("A", prompt) == [1, 4]
    assert len(maps.places("xyz", "a xyz kite")) == 3 == len(tokenizer()("xyz")["input_ids"]) - 2
    torch.testing.assert_close(maps.word("a", prompt), maps.maps[:, [1, 4]].mean(1))
    for word, text in (("pan", prompt), ("", prompt), ("umbrella", prompt), ("kite", "a " * 20 + "kite")):
        with pytest.raises(MMHooksError, match="is not among the first 12 tokens"):
            maps.word(word, text)
    with pytest.raises(ShapeMismatch, match="2 prompts for a run of 1 images"):
        maps.word("a", [prompt, prompt])
    with pytest.raises(HookDidNotFire, match="no attention"):
        with attention_maps(sd, steps=[9]) as none:
            draw(sd.pipe)
        _ = none.maps
    with pytest.raises(ShapeMismatch, match="halves latents"):
        layer_size(30, (8, 8))


@pytest.fixture(scope="module")
def drawn(sd):
    with attention_maps(sd, steps=[0]) as maps:
        draw(sd.pipe, "a red panda")
    return maps


@pytest.mark.parametrize(
    ("prompt", "word", "places"),
    [
        ("redpanda panda", "panda", [4]),  # re d panda</w> panda</w>
        ("panda redpanda", "panda", [1]),
        ("panda, redpanda", "panda", [1]),
        ("redpanda", "redpanda", [1, 2, 3]),
        ("blue redpanda panda", "redpanda panda", [2, 3, 4, 5]),
    ],
)
def test_a_part_of_a_longer_word_does_not_count(drawn, prompt, word, places):
    assert drawn.places(word, prompt, 12) == places


def test_a_word_found_only_inside_another_is_reported(drawn):
    with pytest.raises(
        MMHooksError, match="'panda' is not among .* tokens of 'a redpanda' .only inside a longer word"
    ):
        drawn.places("panda", "a redpanda", 12)


def test_words_of_tokenizers_with_other_markers():
    """A piece at a time, by the marks of T5 and GPT-2 (where words begin) and of BERT (where they go on)."""
    from mmhooks.analysis.attribution.attention_maps import AttentionMaps

    for rows in (["</s>", "▁con", "cat", "▁cat", "▁cat", "s"], ["<s>", "Ġcon", "cat", "Ġcat", "Ġcat", "s"]):
        ids = {piece: n for n, piece in enumerate(dict.fromkeys(rows))}
        text = [ids[p] for p in rows] + [0]
        whole = [0, ids[rows[3]], 0]
        pieces = {n: p for p, n in ids.items()}
        maps = AttentionMaps(
            lambda t, a=text, b=whole: a if t == "x" else b, lambda i, p=pieces: [p[n] for n in i]
        )
        assert maps.places("cat", "x", 20) == [3]
    rows = ["[CLS]", "con", "##cat", "cat", "cat", "##s"]
    ids = {piece: n for n, piece in enumerate(dict.fromkeys(rows))}
    pieces = {n: p for p, n in ids.items()}
    maps = AttentionMaps(
        lambda t: [ids[p] for p in rows] + [0] if t == "x" else [0, ids["cat"], 0],
        lambda i: [pieces[n] for n in i],
    )
    assert maps.places("cat", "x", 20) == [3]


def test_layers_as_a_list(sd):
    from models.pipelines import PATTERN

    def heat(*sites):
        with attention_maps(sd, *sites) as maps:
            draw(sd.pipe, "a red panda")
        return maps

    everything, one = heat(), heat(PATTERN)
    names = list(sd.sites("unet.*.cross.pattern"))
    assert torch.equal(heat(names).maps, everything.maps)
    assert heat([PATTERN]).layers == one.layers and torch.equal(heat([PATTERN]).maps, one.maps)
    assert heat([PATTERN, "unet.*.cross.pattern"]).layers == everything.layers  # each layer once
    with pytest.raises(mm.errors.UnknownSite), attention_maps(sd, ["a", "b"]):
        pass
    with pytest.raises(MMHooksError, match="expected a pattern or several"), attention_maps(sd, []):
        pass
    with pytest.raises(MMHooksError, match="expected a mm.HookedDiffusion, got a HookedCLIP"):
        with attention_maps(mm.load("mini")):
            pass


def test_overlay(tmp_path):
    picture = Image.new("RGB", (40, 20), "white")
    heat = torch.zeros(2, 4)
    heat[0, 0] = 1
    shown = np.asarray(overlay(picture, heat)).astype(int)
    assert shown.shape == (20, 40, 3)
    assert shown[0, 0].sum() > shown[-1, -1].sum()  # inferno: the hottest is the lightest
    assert (np.asarray(overlay(picture, heat, strength=0.0)) == 255).all()
    assert len(np.unique(np.asarray(overlay(picture, torch.ones(2, 2))).reshape(-1, 3), axis=0)) == 1
    with pytest.raises(mm.errors.NotFinite, match="1 of 8"):
        overlay(picture, nan(heat))
    with pytest.raises(ShapeMismatch, match="shape"):
        overlay(picture, heat[None])
    figure = heat_grid(
        [("a $red panda", picture, {"red": heat, "panda": heat}), ("kite", picture, {"kite": heat})]
    )
    figure.savefig(tmp_path / "grid.png")
    assert Image.open(tmp_path / "grid.png").size[0] > 100


def nan(heat):
    heat = heat.clone()
    heat[1, 1] = float("nan")
    return heat
