"""open_clip's own towers: its ViT, its ResNet, and its text transformer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mmhooks.hooks.encoder_kinds import ImageTokens, TextTokens
from mmhooks.hooks.parameter_product import ParameterProduct
from mmhooks.hooks.sites import Site, SiteMap
from mmhooks.models.layers.feature_map_block import add_feature_map_block, map_site
from mmhooks.models.layers.openclip_block import add_openclip_block
from mmhooks.models.layers.transformers_layer import add_transformers_layers
from mmhooks.models.towers.tokens import PATCHES, SIGLIP_END


def add_openclip_vit(sites: SiteMap, visual: Any) -> None:
    """``image.patches`` to ``image.pooled`` of a VisionTransformer."""
    sites.tokens["image"] = ImageTokens(cls=1)
    # The convolution gives [b d h w]; patches are shown as tokens.
    sites.add(Site("image.patches", sites.output(visual.conv1), layout="batch patch d", view=PATCHES))
    for n, block in enumerate(visual.transformer.resblocks):
        add_openclip_block(sites, f"image.blocks.{n}", block)
    pooled_norm = getattr(visual, "final_ln_after_pool", False) and visual.attn_pool is None
    layout, tokens = ("batch d", None) if pooled_norm else ("batch token d", 1)
    post = Site("image.ln_post", sites.output(visual.ln_post), tokens=tokens, layout=layout)
    sites.add(post, kinds=visual.attn_pool is None)  # CoCa norms what the queries of its pooling got
    if isinstance(visual.proj, Tensor):  # a parameter, or what a parametrisation computes
        sites.add(Site("image.pooled", ParameterProduct(visual, "proj"), "in", tokens=None, layout="batch d"))
    else:
        sites.add(Site("image.pooled", sites.output(visual), tokens=None, layout="batch d"))


def add_openclip_resnet(sites: SiteMap, visual: Any) -> None:
    """``image.patches`` and the blocks of a ModifiedResNet."""
    sites.add(map_site("image.patches", sites.output(visual.avgpool)))
    sites.widths["image.patches"] = visual.conv3.out_channels
    for n, block in enumerate(b for stage in range(1, 5) for b in getattr(visual, f"layer{stage}")):
        add_feature_map_block(sites, f"image.blocks.{n}", block)
        sites.widths[f"image.blocks.{n}.resid_pre"] = block.conv1.in_channels
        sites.widths[f"image.blocks.{n}.resid_post"] = block.conv3.out_channels


def add_openclip_text(sites: SiteMap, owner: Any, tower: Any = None) -> None:
    """open_clip's text transformer, at the root of ``CLIP`` or in ``CustomTextCLIP.text``."""
    sites.tokens["text"] = _text_tokens(owner)
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


def _text_tokens(owner: Any) -> TextTokens:
    """Where texts end: the pooled token where that is the end, else what its tokenizers write."""
    pool = getattr(owner, "pool_type", None) or getattr(owner, "text_pool_type", "argmax")
    eos = getattr(owner, "eos_id", None) or getattr(owner, "text_eos_id", None)
    class_token = getattr(owner, "cls_emb", None) is not None
    # Pooled at the last position: SigLIP, whose end is 1, with which SigLIP 1 pads too; CLIPA writes no end and pads with 0.
    end = {"argmax": "highest", "eos": eos}.get(pool, SIGLIP_END)
    return TextTokens(end, pad=0, cls=class_token)


def add_wrapped_text(sites: SiteMap, text: Any) -> None:
    """open_clip's wrapper around a text encoder of transformers."""
    sites.tokens["text"] = TextTokens(pad=text.config.pad_token_id)
    transformer = text.transformer
    sites.add(Site("text.tokens", sites.output(transformer.get_input_embeddings()), layout="batch token d"))
    encoder = getattr(transformer, "encoder", transformer)
    layers = next((getattr(encoder, n) for n in ("layer", "layers", "block") if hasattr(encoder, n)), ())
    add_transformers_layers(sites, "text", layers)
    if isinstance(getattr(encoder, "final_layer_norm", None), nn.Module):
        sites.add(Site("text.ln_final", sites.output(encoder.final_layer_norm), layout="batch token d"))
    sites.add(Site("text.pooled", sites.output(text.pooler), tokens=None, layout="batch d"))
    sites.add(Site("text.embed", sites.output(text), tokens=None, layout="batch d"))
