"""The site map of any open_clip model: canonical names for all places that the architecture has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmhooks.hooks.sites import Site, SiteMap
from mmhooks.models.towers.openclip_tower import (
    add_openclip_resnet,
    add_openclip_text,
    add_openclip_vit,
    add_wrapped_text,
)
from mmhooks.models.towers.timm_trunk import add_timm_trunk


def openclip_sites(model: nn.Module) -> SiteMap:
    """Sites of ``CLIP``, ``CustomTextCLIP`` and ``CoCa`` over ViT, ResNet, timm and Hugging Face towers."""
    sites = SiteMap(model)
    visual: Any = model.visual
    if hasattr(visual, "transformer") and hasattr(visual, "conv1"):
        add_openclip_vit(sites, visual)
    elif hasattr(visual, "layer4"):
        add_openclip_resnet(sites, visual)
    elif hasattr(visual, "trunk"):
        add_timm_trunk(sites, "image", visual.trunk)
        sites.add(Site("image.pooled", sites.output(visual.trunk), tokens=None, layout="batch d"))
    sites.add(Site("image.embed", sites.output(visual), tokens=None, layout="batch d"))

    text: Any = getattr(model, "text", None)
    if text is None:
        add_openclip_text(sites, model)
    elif hasattr(text, "token_embedding"):
        add_openclip_text(sites, text, tower=text)
    else:
        add_wrapped_text(sites, text)
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
