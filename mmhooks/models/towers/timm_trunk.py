"""timm's networks: stacks of blocks over tokens (ViT, EVA, DINOv2, DINOv3) and stages of feature maps (ConvNeXt, Swin)."""

from __future__ import annotations

from typing import Any

from torch import nn

from mmhooks.hooks.encoder_kinds import ImageTokens
from mmhooks.hooks.sites import Site, SiteMap
from mmhooks.models.layers.feature_map_block import add_feature_map_block, map_site
from mmhooks.models.layers.timm_block import add_timm_block

# Class tokens and registers in front of the patches in all blocks; CaiT and XCiT, say, add them behind the blocks.
_IN_FRONT = {"VisionTransformer", "Eva", "Beit", "VisionTransformerRelPos"}


def add_timm_trunk(sites: SiteMap, tower: str, trunk: Any) -> None:
    """``<tower>.patches``, its blocks, and ``<tower>.ln_post`` where the network is a stack of blocks over tokens."""
    front = getattr(trunk, "num_prefix_tokens", None)
    if front is not None and _IN_FRONT & {kind.__name__ for kind in type(trunk).__mro__}:
        registers = 0 if getattr(trunk, "reg_token", None) is None else trunk.reg_token.shape[1]
        sites.tokens[tower] = ImageTokens(cls=front - registers, registers=registers)
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
