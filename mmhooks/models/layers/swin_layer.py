"""The windowed layer of CLAP's audio tower (Swin): attention inside windows that are laid along the batch."""

from __future__ import annotations

from typing import Any

from mmhooks.hooks.sites import SiteMap
from mmhooks.models.layers.leaves import add_middle, add_mlp, add_outputs, add_projected_attention, add_site


def add_swin_layer(sites: SiteMap, prefix: str, layer: Any) -> None:
    """All its sites; those of the attention have one row a window, ``[batch·window token head d_head]``."""
    inner, out = getattr(layer.attention, "self"), layer.attention.output  # noqa: B009
    add_site(sites, f"{prefix}.resid_pre", sites.input(layer, "hidden_states"))
    add_outputs(sites, prefix, {"ln_1": layer.layernorm_before})
    add_projected_attention(sites, prefix, layer.attention, inner.num_attention_heads, out.dense)
    add_outputs(sites, prefix, {"attn_out": layer.drop_path})  # called once, behind the windows
    add_middle(sites, prefix, layer)
    add_outputs(sites, prefix, {"ln_2": layer.layernorm_after})
    add_mlp(sites, prefix, layer.intermediate.dense, layer.output.dense)
    add_outputs(sites, prefix, {"mlp_out": layer.output})
    add_site(sites, f"{prefix}.resid_post", sites.output(layer, first=True))
