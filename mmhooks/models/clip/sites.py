"""The site map of any open_clip model: canonical names for all places that the architecture has."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from mmhooks.hooks.parameter_product import ParameterProduct
from mmhooks.hooks.sites import Site, SiteMap, View, feature_map
from mmhooks.models.clip.blocks import add_openclip_block
from mmhooks.models.clip.foreign_blocks import add_hf_layer, add_timm_block


def openclip_sites(model: nn.Module) -> SiteMap:
    """Sites of ``CLIP``, ``CustomTextCLIP`` and ``CoCa`` over ViT, ResNet, timm and Hugging Face towers."""
    sites = SiteMap(model)
    visual: Any = model.visual
    kind = type(visual).__name__
    if hasattr(visual, "transformer") and hasattr(visual, "conv1"):
        _vit(sites, visual)
    elif kind == "ModifiedResNet":
        _resnet(sites, visual)
    elif hasattr(visual, "trunk"):
        _timm(sites, visual)
    sites.add(Site("image.embed", sites.output(visual), tokens=None, layout="batch d"))

    text: Any = getattr(model, "text", None)
    if text is None:
        _text(sites, model)
    elif hasattr(text, "token_embedding"):
        _text(sites, text, tower=text)
    else:
        _hf_text(sites, text)
    joint = _joint_width(model)
    if joint is not None:
        sites.widths |= {name: joint for name in ("image.embed", "text.embed") if name in sites.canonical}
    return sites


def _joint_width(model: Any) -> int | None:
    """Width of the shared embedding, if one of the towers defines it."""
    text = getattr(model, "text", model)
    projections = (getattr(text, "text_projection", None), getattr(model.visual, "proj", None))
    for projection in projections:
        if isinstance(projection, Tensor):
            return projection.shape[1]
    modules = (projections[0], getattr(text, "proj", None), getattr(model.visual, "head", None))
    for module in modules:
        last = (
            [m for m in module.modules() if hasattr(m, "out_features")]
            if isinstance(module, nn.Module)
            else []
        )
        if last:
            return last[-1].out_features  # type: ignore[return-value]
    width = getattr(model.visual, "output_dim", None)
    return width if isinstance(width, int) else None


def _vit(sites: SiteMap, visual: Any) -> None:
    # The convolution gives [b d h w]; patches are shown as tokens.
    patches = View(_as_tokens, _as_map)
    sites.add(Site("image.patches", sites.output(visual.conv1), layout="batch patch d", view=patches))
    for n, block in enumerate(visual.transformer.resblocks):
        add_openclip_block(sites, f"image.blocks.{n}", block)
    pooled_norm = getattr(visual, "final_ln_after_pool", False) and visual.attn_pool is None
    layout, tokens = ("batch d", None) if pooled_norm else ("batch token d", 1)
    sites.add(Site("image.ln_post", sites.output(visual.ln_post), tokens=tokens, layout=layout))
    if isinstance(visual.proj, Tensor):  # a parameter, or what a parametrisation computes
        sites.add(Site("image.pooled", ParameterProduct(visual, "proj"), "in", tokens=None, layout="batch d"))
    else:
        sites.add(Site("image.pooled", sites.output(visual), tokens=None, layout="batch d"))


def _as_tokens(raw: Tensor) -> Tensor:
    return rearrange(raw, "b d h w -> b (h w) d")


def _as_map(raw: Tensor, new: Tensor) -> Tensor:
    return rearrange(new, "b (h w) d -> b d h w", h=raw.shape[2])


def _resnet(sites: SiteMap, visual: Any) -> None:
    sites.add(_feature_map("image.patches", sites.output(visual.avgpool)))
    blocks = [block for n in range(1, 5) for block in getattr(visual, f"layer{n}")]
    for n, block in enumerate(blocks):
        sites.add(_feature_map(f"image.blocks.{n}.resid_pre", sites.input(block)))
        sites.add(_feature_map(f"image.blocks.{n}.resid_post", sites.output(block)))
        sites.widths[f"image.blocks.{n}.resid_pre"] = block.conv1.in_channels
        sites.widths[f"image.blocks.{n}.resid_post"] = block.conv3.out_channels
    sites.widths["image.patches"] = visual.conv3.out_channels


def _timm(sites: SiteMap, visual: Any) -> None:
    trunk = visual.trunk
    stem = getattr(trunk, "patch_embed", None) or getattr(trunk, "stem", None)
    blocks = getattr(trunk, "blocks", None)
    if isinstance(blocks, (nn.Sequential, nn.ModuleList)) and hasattr(trunk, "patch_embed"):
        sites.add(Site("image.patches", sites.output(trunk.patch_embed), layout="batch patch d"))
        sites.widths |= {"image.patches": trunk.embed_dim, "image.pooled": trunk.num_features}
        for n, block in enumerate(blocks):
            add_timm_block(sites, f"image.blocks.{n}", block)
        norm = getattr(trunk, "norm", None)
        norm = getattr(trunk, "fc_norm", None) if isinstance(norm, nn.Identity) else norm
        if isinstance(norm, nn.Module):
            sites.add(Site("image.ln_post", sites.output(norm), layout="batch token d"))
    else:
        last = getattr(trunk, "output_fmt", "NCHW") == "NHWC"  # Swin keeps its channels last
        if isinstance(stem, nn.Module):
            sites.add(_feature_map("image.patches", sites.output(stem), channels_last=last))
        stages = getattr(trunk, "stages", None) or getattr(trunk, "layers", ())
        inner = [block for stage in stages for block in (getattr(stage, "blocks", None) or [stage])]
        for n, block in enumerate(inner):
            for leaf, tap in (("resid_pre", sites.input(block)), ("resid_post", sites.output(block))):
                sites.add(_feature_map(f"image.blocks.{n}.{leaf}", tap, channels_last=last))
    sites.add(Site("image.pooled", sites.output(trunk), tokens=None, layout="batch d"))


def _feature_map(name: str, tap: Any, *, channels_last: bool = False) -> Site:
    if channels_last:
        return Site(name, tap, tokens=None, layout="batch height width channel")
    return feature_map(name, tap)


def _text(sites: SiteMap, owner: Any, tower: Any = None) -> None:
    """open_clip's text transformer, at the root of ``CLIP`` or in ``CustomTextCLIP.text``."""
    sites.add(Site("text.tokens", sites.output(owner.token_embedding), layout="batch token d"))
    for n, block in enumerate(owner.transformer.resblocks):
        add_openclip_block(sites, f"text.blocks.{n}", block)
    class_token = getattr(owner, "cls_emb", None) is not None  # CoCa: the norm comes after pooling
    layout, tokens = ("batch d", None) if class_token else ("batch token d", 1)
    sites.add(Site("text.ln_final", sites.output(owner.ln_final), tokens=tokens, layout=layout))
    projection = owner.text_projection
    pooled = embed = None
    if isinstance(projection, Tensor):
        product = ParameterProduct(owner, "text_projection")
        pooled, embed = (product, "in"), (product, "out")
    elif isinstance(projection, nn.Module):
        pooled, embed = (sites.input(projection), ""), (sites.output(projection), "")
    if tower is not None:
        embed = (sites.output(tower), "")
        pooled = pooled or embed
    if pooled and embed:  # without a projection and a separate tower there is no module to reach them by
        sites.add(Site("text.pooled", *pooled, tokens=None, layout="batch d"))
        sites.add(Site("text.embed", *embed, tokens=None, layout="batch d"))


def _hf_text(sites: SiteMap, text: Any) -> None:
    transformer = text.transformer
    sites.add(Site("text.tokens", sites.output(transformer.get_input_embeddings()), layout="batch token d"))
    encoder = getattr(transformer, "encoder", transformer)
    layers = next((getattr(encoder, n) for n in ("layer", "layers", "block") if hasattr(encoder, n)), ())
    for n, layer in enumerate(layers):
        add_hf_layer(sites, f"text.blocks.{n}", layer)
    if isinstance(getattr(encoder, "final_layer_norm", None), nn.Module):
        sites.add(Site("text.ln_final", sites.output(encoder.final_layer_norm), layout="batch token d"))
    sites.add(Site("text.pooled", sites.output(text.pooler), tokens=None, layout="batch d"))
    sites.add(Site("text.embed", sites.output(text), tokens=None, layout="batch d"))


def example_inputs(model: Any, batch: int = 2) -> tuple[Tensor, Tensor]:
    """Random pixels and tokens of the sizes that an open_clip model takes; for shapes and tests."""
    size = getattr(model.visual, "image_size", 224)
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    vocabulary = int(getattr(model, "vocab_size", None) or model.text.vocab_size)
    text = getattr(model, "text", model)
    length = int(getattr(text, "context_length", 0) or model.context_length)
    highest = min(vocabulary, 30_000) - 2
    tokens = torch.randint(1, highest, (batch, min(length, 77)))
    tokens[:, -1] = highest  # CLIP pools at the highest token, the end of the text
    return torch.randn(batch, 3, height, width), tokens
