"""VideoMAE's layer: norms in front, the attention's projection and the MLP's last map in modules of their own."""

from __future__ import annotations

from typing import Any

from mmhooks.hooks.sites import SiteMap
from mmhooks.models.layers.leaves import (
    add_middle,
    add_mlp,
    add_outputs,
    add_projected_attention,
    add_site,
    child,
)


def is_videomae_layer(layer: Any) -> bool:
    """Whether a layer is of this kind."""
    attn = child(layer, "attention")
    return (
        hasattr(layer, "layernorm_before")
        and child(attn, "attention") is not None
        and hasattr(layer, "intermediate")
    )


def add_videomae_layer(sites: SiteMap, prefix: str, layer: Any) -> None:
    """All its sites. ``mlp_out`` is what is added to the stream: ``layer.output`` adds it itself."""
    attn, out = layer.attention, layer.output
    add_site(sites, f"{prefix}.resid_pre", sites.input(layer, "hidden_states"))
    add_outputs(sites, prefix, {"ln_1": layer.layernorm_before})
    add_projected_attention(sites, prefix, attn, attn.attention.num_attention_heads, attn.output.dense)
    add_outputs(sites, prefix, {"attn_out": attn})
    add_middle(sites, prefix, layer)
    add_outputs(sites, prefix, {"ln_2": layer.layernorm_after})
    add_mlp(sites, prefix, layer.intermediate.dense, out.dense)
    add_outputs(sites, prefix, {"mlp_out": out.dropout})
    add_site(sites, f"{prefix}.resid_post", sites.output(layer, first=True))
