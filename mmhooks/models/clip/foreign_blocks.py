"""Sites of transformer blocks that are not open_clip's own: timm's, and those of Hugging Face text encoders.

Their code is not reimplemented: values without a module of their own are read through :mod:`mmhooks.hooks.intercept`.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from mmhooks.hooks.intercept import Intercepted, residual_middle
from mmhooks.hooks.sites import SiteMap
from mmhooks.models.clip.blocks import add_projected_attention, add_site

_MLP = "batch token d_mlp"


def add_timm_block(sites: SiteMap, prefix: str, block: Any) -> None:
    """Sites of a block of a timm ViT, EVA or relative-position ViT, as far as its structure has them."""
    add_site(sites, f"{prefix}.resid_pre", sites.input(block))
    _outputs(sites, prefix, {"ln_1": _child(block, "norm1")})
    attn = _child(block, "attn")
    heads, projection = getattr(attn, "num_heads", 0), _child(attn, "proj")
    # Linear, adapted or quantised.
    if attn is not None and heads and projection is not None and hasattr(projection, "in_features"):
        add_projected_attention(
            sites, prefix, attn, heads, projection, fused=bool(getattr(attn, "fused_attn", False))
        )
    _outputs(sites, prefix, {"attn_out": _child(block, "drop_path1")})
    if (
        attn is not None and _child(block, "norm2") is not None
    ):  # blocks with parallel branches have no middle
        add_middle(sites, prefix, block)
    _outputs(sites, prefix, {"ln_2": _child(block, "norm2")})
    mlp = _child(block, "mlp")
    first, last = _child(mlp, "fc1"), _child(mlp, "fc2") or _child(mlp, "w2")
    if first is not None:  # SwiGLU with two first layers has no single place before its non-linearity
        add_site(sites, f"{prefix}.mlp.pre", sites.output(first), layout=_MLP)
    if last is not None:
        add_site(sites, f"{prefix}.mlp.post", sites.input(last), layout=_MLP)
    _outputs(sites, prefix, {"mlp_out": _child(block, "drop_path2")})
    add_site(sites, f"{prefix}.resid_post", sites.output(block))


def add_hf_layer(sites: SiteMap, prefix: str, layer: Any) -> None:
    """A layer of a Hugging Face text encoder: BERT-like, M2M100 (NLLB), T5; others get only the residual stream."""
    add_site(sites, f"{prefix}.resid_pre", sites.input(layer, "hidden_states"))
    if hasattr(getattr(layer, "attention", None), "self") and hasattr(layer, "intermediate"):
        _bert(sites, prefix, layer)
    elif hasattr(layer, "self_attn_layer_norm") and hasattr(layer, "fc1"):
        _m2m100(sites, prefix, layer)
    elif hasattr(layer, "layer") and hasattr(layer.layer[0], "SelfAttention"):
        _t5(sites, prefix, layer)
    add_site(sites, f"{prefix}.resid_post", sites.output(layer))


def _bert(sites: SiteMap, prefix: str, layer: Any) -> None:
    inner, out = getattr(layer.attention, "self"), layer.attention.output  # noqa: B009
    add_projected_attention(
        sites, prefix, layer.attention, inner.num_attention_heads, out.dense, fused=_sdpa(inner)
    )
    _outputs(sites, prefix, {"attn_out": out.dense, "ln_1": out.LayerNorm})
    add_site(sites, f"{prefix}.mlp.pre", sites.output(layer.intermediate.dense), layout=_MLP)
    add_site(sites, f"{prefix}.mlp.post", sites.output(layer.intermediate), layout=_MLP)
    _outputs(sites, prefix, {"mlp_out": layer.output.dense, "ln_2": layer.output.LayerNorm})


def _m2m100(sites: SiteMap, prefix: str, layer: Any) -> None:
    attn = layer.self_attn
    _outputs(sites, prefix, {"ln_1": layer.self_attn_layer_norm})
    add_projected_attention(sites, prefix, attn, attn.num_heads, attn.out_proj, fused=_sdpa(attn))
    _outputs(sites, prefix, {"attn_out": attn})
    add_middle(sites, prefix, layer)
    _outputs(sites, prefix, {"ln_2": layer.final_layer_norm})
    add_site(sites, f"{prefix}.mlp.pre", sites.output(layer.fc1), layout=_MLP)
    add_site(sites, f"{prefix}.mlp.post", sites.input(layer.fc2), layout=_MLP)
    _outputs(sites, prefix, {"mlp_out": layer.fc2})


def _t5(sites: SiteMap, prefix: str, layer: Any) -> None:
    first, last = layer.layer[0], layer.layer[-1]
    attn = first.SelfAttention
    _outputs(sites, prefix, {"ln_1": first.layer_norm})
    add_projected_attention(sites, prefix, attn, attn.n_heads, attn.o, fused=_sdpa(attn))
    _outputs(sites, prefix, {"attn_out": first.dropout, "resid_mid": first, "ln_2": last.layer_norm})
    add_site(sites, f"{prefix}.mlp.post", sites.input(last.DenseReluDense.wo), layout=_MLP)
    _outputs(sites, prefix, {"mlp_out": last.dropout})


def add_middle(sites: SiteMap, prefix: str, block: nn.Module) -> None:
    add_site(sites, f"{prefix}.resid_mid", Intercepted(block, ("resid_mid",), residual_middle), "resid_mid")


def _outputs(sites: SiteMap, prefix: str, modules: dict[str, nn.Module | None]) -> None:
    for leaf, module in modules.items():
        if module is not None:
            add_site(sites, f"{prefix}.{leaf}", sites.output(module))


def _child(module: Any, name: str) -> nn.Module | None:
    child = getattr(module, name, None)
    return child if isinstance(child, nn.Module) else None


def _sdpa(module: Any) -> bool:
    return getattr(getattr(module, "config", None), "_attn_implementation", "") == "sdpa"
