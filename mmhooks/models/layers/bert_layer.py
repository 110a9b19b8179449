"""BERT's layer, with its LayerNorms in the residual stream: BERT, RoBERTa, XLM-RoBERTa."""

from __future__ import annotations

from typing import Any

from mmhooks.hooks.sites import SiteMap
from mmhooks.models.layers.leaves import MLP_LAYOUT, add_outputs, add_projected_attention, add_site


def is_bert_layer(layer: Any) -> bool:
    """Whether a layer is of this kind."""
    return hasattr(getattr(layer, "attention", None), "self") and hasattr(layer, "intermediate")


def add_bert_layer(sites: SiteMap, prefix: str, layer: Any) -> None:
    """Its sites. The stream runs through the norms, so there is no ``resid_mid``: ``ln_1`` takes its place."""
    add_site(sites, f"{prefix}.resid_pre", sites.input(layer, "hidden_states"))
    inner, out = getattr(layer.attention, "self"), layer.attention.output  # noqa: B009
    add_projected_attention(sites, prefix, layer.attention, inner.num_attention_heads, out.dense)
    add_outputs(sites, prefix, {"attn_out": out.dense, "ln_1": out.LayerNorm})
    add_site(sites, f"{prefix}.mlp.pre", sites.output(layer.intermediate.dense), layout=MLP_LAYOUT)
    add_site(sites, f"{prefix}.mlp.post", sites.output(layer.intermediate), layout=MLP_LAYOUT)
    add_outputs(sites, prefix, {"mlp_out": layer.output.dense, "ln_2": layer.output.LayerNorm})
    add_site(sites, f"{prefix}.resid_post", sites.output(layer, first=True))
