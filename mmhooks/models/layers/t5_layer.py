"""T5's encoder layer: two sublayers, each with its norm, its residual sum and a dropout before it."""

from __future__ import annotations

from typing import Any

from mmhooks.hooks.sites import SiteMap
from mmhooks.models.layers.leaves import add_mlp, add_outputs, add_projected_attention, add_site


def is_t5_layer(layer: Any) -> bool:
    """Whether a layer is of this kind."""
    return hasattr(layer, "layer") and hasattr(layer.layer[0], "SelfAttention")


def add_t5_layer(sites: SiteMap, prefix: str, layer: Any) -> None:
    """All its sites; ``mlp.pre`` is absent, as the first map may be two."""
    first, last = layer.layer[0], layer.layer[-1]
    attn = first.SelfAttention
    add_site(sites, f"{prefix}.resid_pre", sites.input(layer, "hidden_states"))
    add_outputs(sites, prefix, {"ln_1": first.layer_norm})
    add_projected_attention(sites, prefix, attn, attn.n_heads, attn.o)
    add_outputs(sites, prefix, {"attn_out": first.dropout, "resid_mid": first, "ln_2": last.layer_norm})
    add_mlp(sites, prefix, None, last.DenseReluDense.wo)
    add_outputs(sites, prefix, {"mlp_out": last.dropout})
    add_site(sites, f"{prefix}.resid_post", sites.output(layer, first=True))
