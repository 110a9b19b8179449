"""One small random instance of every architecture family of open_clip: all sites fire, read exactly, and act."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import mmhooks as mm
from mmhooks.models.clip.sites import example_inputs

from .families import FAMILIES

EVERY = ["image.embed", "text.tokens", "text.embed", "text.blocks.1.resid_post", "image.blocks.0.resid_pre"]
INSIDES = [f"attn.{leaf}" for leaf in ("q", "k", "v", "pattern", "z", "head_out")]
BLOCK = ["resid_pre", "ln_1", *INSIDES, "attn_out", "resid_mid", "ln_2", "mlp.post", "mlp_out", "resid_post"]
CONVOLUTIONAL = {"ResNet", "ConvNeXt", "FastViT, MobileCLIP", "Swin"}  # no stream of tokens: block ends only
POST_NORM = {"BERT", "RoBERTa", "XLM-RoBERTa"}  # the stream runs through the norms: no resid_mid


def instance(family: str) -> mm.HookedCLIP:
    torch.manual_seed(0)
    return mm.HookedCLIP(FAMILIES[family]().eval())


def expected(family: str, tower: str) -> list[str]:
    if tower == "image" and family in CONVOLUTIONAL:
        return ["resid_pre", "resid_post"]
    return [leaf for leaf in BLOCK if not (tower == "text" and family in POST_NORM and leaf == "resid_mid")]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_site_of_every_family(family):
    model = instance(family)
    images, texts = example_inputs(model.model, batch=1)
    with torch.no_grad():
        clean = model.forward(images, texts)
        out, cache = model.run_with_cache(images, texts)
        assert torch.equal(out.image, clean.image) and torch.equal(out.text, clean.text)
        assert set(model.sites()) == set(cache) == set(model.shapes)
        wanted = [f"{t}.blocks.1.{leaf}" for t in ("image", "text") for leaf in expected(family, t)]
        assert {*EVERY, *wanted} <= set(cache)
        for site in model.sites():
            tower = 0 if site.startswith("image") else 1
            run = model.encode_text if tower else model.encode_image
            with model.hooks(fwd_hooks=[(site, lambda t, *, hook: 1.5 * t + 0.1)]):
                edited = run(texts if tower else images)
            assert not torch.equal(edited, clean[tower]), site
        with model.hooks(fwd_hooks=[("image.*", lambda t, *, hook: 1.5 * t + 0.1)]):  # towers stay apart
            assert torch.equal(model.encode_text(texts), clean.text)
            model.encode_image(images)
        again = model.forward(images, texts)
    assert torch.equal(again.image, clean.image) and torch.equal(again.text, clean.text)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_stream_adds_up(family):
    """Before + attention = middle, middle + MLP = after: the very additions that the model makes."""
    model = instance(family)
    images, texts = example_inputs(model.model)
    with torch.no_grad():
        _, cache = model.run_with_cache(images, texts)
    middles = [site.removesuffix("resid_mid") for site in cache if site.endswith("resid_mid")]
    assert len(middles) == sum(2 for t in ("image", "text") if "resid_mid" in expected(family, t))
    for block in middles:
        assert torch.equal(cache[block + "resid_pre"] + cache[block + "attn_out"], cache[block + "resid_mid"])
        assert torch.equal(cache[block + "resid_mid"] + cache[block + "mlp_out"], cache[block + "resid_post"])


def attention_of(model: mm.HookedCLIP, tower: str) -> tuple[str, nn.Linear]:
    """Native path of the attention of block 1 that returns its projection's output, and that projection."""
    for path, module in model.model.named_modules():
        if ".1." not in path or path.startswith("visual") != (tower == "image"):
            continue
        for name in ("out_proj", "proj", "o", "output.dense"):
            try:
                projection = module.get_submodule(name)
            except AttributeError:
                continue
            if path.endswith(("attn", "attention", "SelfAttention")):
                return path + (".output.dense" if name == "output.dense" else ""), projection  # type: ignore
    raise AssertionError(f"no attention in {tower}")


SUMS = [(f, "image") for f in FAMILIES if f not in (*CONVOLUTIONAL, *POST_NORM, "NLLB", "mT5")]
SUMS += [(f, "text") for f in ("CLIP", "custom blocks", *sorted(POST_NORM), "NLLB", "mT5")]


@pytest.mark.parametrize(("family", "tower"), SUMS)
def test_attention_heads_sum_to_the_output_and_are_slices(family, tower):
    model = instance(family)
    path, projection = attention_of(model, tower)
    if projection.bias is not None:  # a bias of zero would hide a forgotten one
        nn.init.normal_(projection.bias)
    inputs = example_inputs(model.model)[0 if tower == "image" else 1]
    run = model.encode_image if tower == "image" else model.encode_text
    site = f"{tower}.blocks.1.attn"
    with torch.no_grad():
        with model.caching([f"{site}.*", path]) as cache:
            clean = run(inputs)
        total = cache[f"{site}.head_out"].sum(2)
        total = total if projection.bias is None else total + projection.bias
        torch.testing.assert_close(total, cache[path], atol=1e-6, rtol=1e-5)
        pattern, z = cache[f"{site}.pattern"], cache[f"{site}.z"]
        torch.testing.assert_close(pattern.sum(-1), torch.ones(pattern.shape[:-1]))
        if family not in ("custom blocks", "EVA"):  # these scale or norm z before the projection
            mixed = torch.einsum("bhqk,bkhe->bqhe", pattern, cache[f"{site}.v"])
            torch.testing.assert_close(z, mixed, atol=1e-6, rtol=1e-5)
        edited = []
        for leaf in ("head_out", "z"):
            with model.hooks(mm.Zero([0], at=f"{site}.{leaf}")):
                edited.append(run(inputs))
        kept = projection.weight.clone()
        projection.weight[:, : z.shape[-1]] = 0  # the slice of attention head 0, by hand
        by_hand = run(inputs)
        projection.weight.copy_(kept)
        # A pattern that is looked at one key only: z is that key's v, whatever the kernel.
        with model.hooks(fwd_hooks=[(f"{site}.pattern", lambda p, *, hook: torch.zeros_like(p).index_fill_(
            -1, torch.tensor([0]), 1.0))]), model.caching([f"{site}.z", f"{site}.v"]) as first:  # fmt: skip
            run(inputs)
    for z in edited:
        torch.testing.assert_close(z, by_hand, atol=1e-6, rtol=1e-5)
    assert not torch.equal(by_hand, clean)
    if family not in ("custom blocks", "EVA"):
        want = first[f"{site}.v"][:, :1].expand_as(first[f"{site}.z"])
        torch.testing.assert_close(first[f"{site}.z"], want, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_attention_heads_of_vit_b_32_and_mini_sum_to_the_output():
    """Every block of both towers, at fp32: within 1e-5 and 1e-6, on the scale of the output where that exceeds 1."""
    import open_clip

    torch.manual_seed(0)
    sizes = (("ViT-B-32", 1e-5, mm.HookedCLIP(open_clip.create_model("ViT-B-32", pretrained=None).eval())),
             ("mini", 1e-6, mm.load("mini")))  # fmt: skip
    for name, tolerance, model in sizes:
        images, texts = example_inputs(model.model)
        _, cache = model.run_with_cache(images, texts, ["*.attn.head_out", "*.attn_out"])
        towers = {"image": model.model.visual.transformer, "text": model.model.transformer}
        for tower, transformer in towers.items():
            for n, block in enumerate(transformer.resblocks):
                out = cache[f"{tower}.blocks.{n}.attn_out"]
                total = cache[f"{tower}.blocks.{n}.attn.head_out"].sum(2) + block.attn.out_proj.bias
                error = float((total - out).abs().max() / out.abs().max().clamp_min(1))
                assert error <= tolerance, (name, tower, n, error)


def test_embed_sites_inside_normalised_calls_and_forward():
    """Edits at the raw embedding reach every entry point of the model itself."""
    model = instance("CLIP")
    images, texts = example_inputs(model.model)
    with model.hooks(mm.Zero(range(6), at=["image.embed", "text.embed"])):
        outs = [
            model.encode_image(images, normalize=True), model.model.encode_text(texts, normalize=True),
            *model.model(images, texts)[:2], model.model.forward_intermediates(images, texts)["text_features"],
        ]  # fmt: skip
    for z in outs:
        assert not z[:, :6].any()
        torch.testing.assert_close(z.norm(dim=-1), torch.ones(2))
