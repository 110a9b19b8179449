"""timm's networks: stacks of blocks over tokens (ViT, EVA, DINOv2, DINOv3) and stages of feature maps (ConvNeXt, Swin)."""

from __future__ import annotations

from typing import Any

from torch import nn

from mmhooks.hooks.sites import Site, SiteMap
from mmhooks.models.layers.feature_map_block import add_feature_map_block, map_site
from mmhooks.models.layers.timm_block import add_timm_block


def add_timm_trunk(sites: SiteMap, tower: str, trunk: Any) -> None:
    """``<tower>.patches``, its blocks, and ``<tower>.ln_post`` where the network is a stack of blocks over tokens."""
    blocks = getattr(trunk, "blocks", None)
    if isinstance(blocks, (nn.Sequential, nn.ModuleList)) and hasattr(trunk, "patch_embed"):
        sites.add(Site(f"{tower}.patches", sites.output(trunk.patch_embed), layout="batch patch d"))
        sites.widths |= {f"{tower}.patches": trunk.embed_dim, f"{tower}.pooled": trunk.num_features}
        for n, block in enumerate(blocks):
            add_timm_block(sites, f"{tower}.blocks.{n}", block)
        norm = getattr(trunk, "norm", None)
        norm = getattr(trunk, "fc_norm", None) if isinstance(norm, nn.Identity) else norm
        if isinstance(norm, nn.Module):
            sites.add(Site(f"{tower}.ln_post", sites.output(norm), layout="batch token d"))
        return
    last = getattr(trunk, "output_fmt", "NCHW") == "NHWC"  # Swin keeps its channels last
    stem = getattr(trunk, "patch_embed", None) or getattr(trunk, "stem", None)
    if isinstance(stem, nn.Module):
        sites.add(map_site(f"{tower}.patches", sites.output(stem), channels_last=last))
    stages = getattr(trunk, "stages", None) or getattr(trunk, "layers", ())
    inner = [block for stage in stages for block in (getattr(stage, "blocks", None) or [stage])]
    for n, block in enumerate(inner):
        add_feature_map_block(sites, f"{tower}.blocks.{n}", block, channels_last=last)
