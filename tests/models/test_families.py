"""One small random instance of every architecture family of open_clip: all sites fire, read exactly, and act."""

from __future__ import annotations

import pytest
import torch

import mmhooks as mm
from mmhooks.models.openclip_sites import example_inputs

V = {"image_size": 32, "patch_size": 16, "width": 16, "layers": 2, "head_width": 8}
T = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 2}
CUSTOM = {
    "qk_norm": True,
    "scale_heads": True,
    "scale_attn_inner": True,
    "scale_attn": True,
    "scale_fc": True,
}


def timm(name: str, pool: str = "", size: int = 64) -> dict:
    return {"timm_model_name": name, "timm_pool": pool, "timm_proj": "linear", "image_size": size}


def coca():
    from open_clip.coca_model import CoCa

    text, vision = {**T, "embed_cls": True, "output_tokens": True}, {**V, "attentional_pool": True}
    return CoCa(12, dict(T), text, {**vision, "attn_pooler_heads": 2, "output_tokens": True})  # type: ignore[arg-type]


def hugging_face():
    from open_clip import CustomTextCLIP
    from open_clip.hf_model import HFTextEncoder
    from transformers import BertConfig

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=64, max_position_embeddings=8, pad_token_id=0, **sizes)
    model = CustomTextCLIP(12, dict(V), dict(T))  # type: ignore[arg-type]
    model.text = HFTextEncoder("", 12, config=config, pooler_type="mean_pooler", proj_type="mlp")
    return model


def build(kind: str, vision: dict, text: dict):
    import open_clip

    return getattr(open_clip, kind)(12, dict(vision), dict(text))


FAMILIES = {
    "CLIP": lambda: build("CLIP", V, T),
    "CustomTextCLIP": lambda: build("CustomTextCLIP", V, {**T, "proj_bias": True, "no_causal_mask": True, "pool_type": "last"}),
    "SigLIP text": lambda: build("CustomTextCLIP", V, {**T, "proj_type": "none", "width": 12}),
    "custom blocks": lambda: build("CLIP", {**V, **CUSTOM}, {**T, "qk_norm": True}),
    "layer scale": lambda: build("CLIP", {**V, "ls_init_value": 0.1}, {**T, "ls_init_value": 0.1}),
    "norm after pool": lambda: build("CLIP", {**V, "pool_type": "avg", "final_ln_after_pool": True, "no_ln_pre": True}, T),
    "ResNet": lambda: build("CLIP", {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8}, T),
    "timm ViT": lambda: build("CustomTextCLIP", timm("test_vit", size=160), T),
    "EVA": lambda: build("CustomTextCLIP", timm("eva02_tiny_patch14_224", "token", 224), T),
    "ConvNeXt": lambda: build("CLIP", timm("test_convnext", size=160), T),
    "CoCa": coca,
    "HF text": hugging_face,
}  # fmt: skip
EVERY = ["image.embed", "text.tokens", "text.embed", "text.blocks.1.resid_post", "image.blocks.0.resid_pre"]
VIRTUAL = [f"image.blocks.1.attn.{leaf}" for leaf in ("q", "k", "v", "pattern", "z", "head_out")]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_site_of_every_family(family):
    torch.manual_seed(0)
    model = mm.HookedCLIP(FAMILIES[family]().eval())
    images, texts = example_inputs(model.model, batch=1)
    with torch.no_grad():
        clean = model.forward(images, texts)
        out, cache = model.run_with_cache(images, texts)
        assert torch.equal(out.image, clean.image) and torch.equal(out.text, clean.text)
        assert set(model.sites()) == set(cache) == set(model.shapes)
        assert set(EVERY) <= set(cache)
        if family in ("CLIP", "CustomTextCLIP", "custom blocks", "layer scale", "norm after pool", "CoCa"):
            assert set(VIRTUAL) <= set(cache)
        for site in model.sites():
            with model.hooks(fwd_hooks=[(site, lambda t, *, hook: 1.5 * t + 0.1)]):
                edited = model.forward(images, texts)
            tower = 0 if site.startswith("image") else 1
            assert not torch.equal(edited[tower], clean[tower]), site
            assert torch.equal(edited[1 - tower], clean[1 - tower]), site
        again = model.forward(images, texts)
    assert torch.equal(again.image, clean.image) and torch.equal(again.text, clean.text)


@pytest.mark.parametrize("family", ["CLIP", "CustomTextCLIP", "custom blocks", "layer scale"])
def test_attention_heads_sum_to_the_output_and_are_slices(family):
    torch.manual_seed(0)
    model = mm.HookedCLIP(FAMILIES[family]().eval())
    for module in model.model.modules():  # a bias of zero would hide a forgotten one
        if hasattr(module, "out_proj"):
            torch.nn.init.normal_(module.out_proj.bias)
    images, _ = example_inputs(model.model)
    block = model.model.visual.transformer.resblocks[1]
    native = {"custom blocks": "attn", "layer scale": "attn"}.get(family, "attn")
    path = f"visual.transformer.resblocks.1.{native}"
    with torch.no_grad():
        clean, cache = model.run_with_cache(
            images, sites=["image.blocks.1.attn.*", "image.blocks.1.attn_out"]
        )
        _, whole = model.run_with_cache(images, sites=[path])
        total = cache["image.blocks.1.attn.head_out"].sum(2) + block.attn.out_proj.bias
        torch.testing.assert_close(total, whole[path], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(cache["image.blocks.1.attn.pattern"].sum(-1), torch.ones(2, 2, 5))
        with model.hooks(mm.Zero([0], at="image.blocks.1.attn.head_out")):
            by_output = model.encode_image(images)
        with model.hooks(mm.Zero([0], at="image.blocks.1.attn.z")):
            by_z = model.encode_image(images)
        kept = block.attn.out_proj.weight.clone()
        block.attn.out_proj.weight[:, :8] = 0  # the slice of attention head 0, by hand
        by_hand = model.encode_image(images)
        block.attn.out_proj.weight.copy_(kept)
    torch.testing.assert_close(by_z, by_hand, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(by_output, by_hand, atol=1e-6, rtol=1e-5)
    assert not torch.equal(by_hand, clean.image)


def test_embed_sites_inside_normalised_calls_and_forward():
    """Edits at the raw embedding reach every entry point of the model itself."""
    torch.manual_seed(0)
    model = mm.HookedCLIP(FAMILIES["CLIP"]().eval())
    images, texts = example_inputs(model.model)
    with model.hooks(mm.Zero(range(6), at=["image.embed", "text.embed"])):
        outs = [
            model.encode_image(images, normalize=True), model.model.encode_text(texts, normalize=True),
            *model.model(images, texts)[:2], model.model.forward_intermediates(images, texts)["text_features"],
        ]  # fmt: skip
    for z in outs:
        assert not z[:, :6].any()
        torch.testing.assert_close(z.norm(dim=-1), torch.ones(2))
