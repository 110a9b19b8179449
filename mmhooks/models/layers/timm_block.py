"""timm's blocks: ViT, EVA and relative-position ViT. Their code is not reimplemented but intercepted."""

from __future__ import annotations

from typing import Any

from torch import nn

from mmhooks.hooks.sites import SiteMap
from mmhooks.models.layers.leaves import (
    LayerWeights,
    add_middle,
    add_mlp,
    add_outputs,
    add_projected_attention,
    add_site,
    child,
    layer_scale,
)


def add_timm_block(sites: SiteMap, prefix: str, block: Any) -> None:
    """Sites of a block of a timm ViT, EVA or relative-position ViT, as far as its structure has them."""
    add_site(sites, f"{prefix}.resid_pre", sites.input(block))
    add_outputs(sites, prefix, {"ln_1": child(block, "norm1")})
    attn = child(block, "attn")
    heads, projection = getattr(attn, "num_heads", 0), child(attn, "proj")
    # Linear, adapted or quantised.
    if attn is not None and heads and projection is not None and hasattr(projection, "in_features"):
        fused = bool(getattr(attn, "fused_attn", False))
        add_projected_attention(sites, prefix, attn, heads, projection, fused=fused)
    add_outputs(sites, prefix, {"attn_out": child(block, "drop_path1")})
    if attn is not None and child(block, "norm2") is not None:  # with parallel branches there is no middle
        add_middle(sites, prefix, block)
    add_outputs(sites, prefix, {"ln_2": child(block, "norm2")})
    mlp = child(block, "mlp")
    # SwiGLU with two first layers has no single place before its non-linearity.
    add_mlp(sites, prefix, child(mlp, "fc1"), child(mlp, "fc2", "w2"))
    add_outputs(sites, prefix, {"mlp_out": child(block, "drop_path2")})
    add_site(sites, f"{prefix}.resid_post", sites.output(block))


def timm_weights(block: Any) -> LayerWeights:
    """The weights of a block; its values come from the same map as queries and keys, so ``value`` is None."""
    return LayerWeights(
        type(block).__name__,
        block.attn.num_heads,
        child(block, "norm1") or nn.Identity(),
        block.attn.proj,
        None,
        child(child(block, "mlp"), "fc2", "w2"),
        layer_scale(block, "ls1", "gamma_1"),
        layer_scale(block, "ls2", "gamma_2"),
    )
