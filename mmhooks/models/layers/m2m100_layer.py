"""The encoder layer of M2M100 (NLLB): norms in front, projections of its own, an MLP without a module around it."""

from __future__ import annotations

from typing import Any

from mmhooks.hooks.sites import SiteMap
from mmhooks.models.layers.leaves import add_middle, add_mlp, add_outputs, add_projected_attention, add_site


def is_m2m100_layer(layer: Any) -> bool:
    """Whether a layer is of this kind."""
    return hasattr(layer, "self_attn_layer_norm") and hasattr(layer, "fc1")


def add_m2m100_layer(sites: SiteMap, prefix: str, layer: Any) -> None:
    """All its sites."""
    attn = layer.self_attn
    add_site(sites, f"{prefix}.resid_pre", sites.input(layer, "hidden_states"))
    add_outputs(sites, prefix, {"ln_1": layer.self_attn_layer_norm})
    add_projected_attention(sites, prefix, attn, attn.num_heads, attn.out_proj)
    add_outputs(sites, prefix, {"attn_out": attn})
    add_middle(sites, prefix, layer)
    add_outputs(sites, prefix, {"ln_2": layer.final_layer_norm})
    add_mlp(sites, prefix, layer.fc1, layer.fc2)
    add_outputs(sites, prefix, {"mlp_out": layer.fc2})
    add_site(sites, f"{prefix}.resid_post", sites.output(layer, first=True))
