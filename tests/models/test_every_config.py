"""Every name of ``open_clip.list_models()`` maps onto sites that fire.

Towers are built at their real widths on the meta device (no memory, no arithmetic), stacks of blocks cut to two.
A Hugging Face text tower would need its configuration from the Hub: in its place stands a small random encoder
of the same class, named in ``HF_KINDS``; a text model that is not named there fails the test.
"""

from __future__ import annotations

import copy

import open_clip
import pytest
import torch

import mmhooks as mm
from mmhooks.models.clip.sites import example_inputs
from mmhooks.models.encoder_tokens import encoder_token_mask, patch_grid

from .families import hf_text

HF_KINDS = {
    "roberta-base": "RobertaConfig",
    "xlm-roberta-base": "XLMRobertaConfig",
    "xlm-roberta-large": "XLMRobertaConfig",
    "facebook/nllb-200-distilled-600M": "M2M100Config",
    "facebook/nllb-200-distilled-1.3B": "M2M100Config",
    "google/mt5-base": "MT5Config",
    "google/mt5-xl": "MT5Config",
}
BLOCK = {"resid_pre", "ln_1", "attn.q", "attn.k", "attn.v", "attn.pattern", "attn.z", "attn.head_out", "attn_out",
         "resid_mid", "ln_2", "mlp.post", "mlp_out", "resid_post"}  # fmt: skip


def build(name: str):
    config = copy.deepcopy(open_clip.get_model_config(name))
    vision, text = config["vision_cfg"], config["text_cfg"]
    custom = config.pop("custom_text", False) or "hf_model_name" in text
    kind = (
        open_clip.CoCa
        if "multimodal_cfg" in config
        else open_clip.CustomTextCLIP
        if custom
        else open_clip.CLIP
    )
    hf = text.get("hf_model_name")
    if hf:
        config["text_cfg"] = {"context_length": 8, "vocab_size": 64, "width": 64, "heads": 2, "layers": 1}
    for part in (vision, config["text_cfg"]):
        if not isinstance(part.get("layers", 2), list):
            part["layers"] = 2
    vision["timm_model_pretrained"] = False
    with torch.device("meta"):
        model = kind(**config)
    if hf:
        model.text = hf_text(
            HF_KINDS[hf], config["embed_dim"], output_tokens=text.get("output_tokens", False)
        )
    blocks = getattr(getattr(model.visual, "trunk", None), "blocks", None)
    if blocks is not None:
        model.visual.trunk.blocks = blocks[:2]
    return model.eval()


@pytest.mark.parametrize("name", open_clip.list_models())
def test_every_listed_model_has_sites_that_fire(name):
    model = mm.HookedCLIP(build(name))
    images, texts = example_inputs(model.model, batch=1)
    text_device = next(
        (model.model.text if hasattr(model.model, "text") else model.model).parameters()
    ).device
    with torch.no_grad():
        out, cache = model.run_with_cache(images.to("meta"), texts.to(text_device))
    assert set(cache) == set(model.sites())
    assert cache["image.embed"].shape == out.image.shape and cache["text.embed"].shape == out.text.shape
    leaves = {site.removeprefix("image.blocks.1.") for site in cache if site.startswith("image.blocks.1.")}
    config = open_clip.get_model_config(name)["vision_cfg"]
    staged = isinstance(config.get("layers"), list) or any(
        word in config.get("timm_model_name", "") for word in ("convnext", "fastvit", "swin")
    )
    assert leaves >= ({"resid_pre", "resid_post"} if staged else BLOCK)
    site = model.places.sites.canonical["image.blocks.1.resid_post"]
    assert site.kinds is not None and "patch" in site.kinds.kinds
    if not site.is_map:
        rows, columns = patch_grid(model, (images.shape[2], images.shape[3]))
        patches = encoder_token_mask(model, site.name, "patch", cache[site.name].shape[1])
        assert int(patches.sum()) == rows * columns
    stream, length = "text.blocks.0.resid_post", cache["text.tokens"].shape[1]
    assert int(encoder_token_mask(model, stream, "eot", length, texts).sum()) == len(texts)
