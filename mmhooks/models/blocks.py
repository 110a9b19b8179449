"""Sites of open_clip's own transformer blocks, of both kinds."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmhooks.hooks import attention
from mmhooks.hooks.sites import Site, SiteMap
from mmhooks.hooks.taps import Emit, ExplicitForward, Tap

_LAYOUT = {"pattern": "batch head query key", "head_out": "batch token head d"}


def add_openclip_block(sites: SiteMap, prefix: str, block: nn.Module) -> None:
    """All sites of a ResidualAttentionBlock or CustomResidualAttentionBlock."""
    custom = hasattr(block, "ln_attn")
    forward = custom_attention_forward if custom else attention.multihead_forward
    mlp: Any = block.mlp
    attn = ExplicitForward(block.attn, attention.LEAVES, forward, inexact=attention.LEAVES)  # type: ignore[arg-type]
    add_site(sites, f"{prefix}.resid_pre", sites.input(block))
    add_site(sites, f"{prefix}.ln_1", sites.output(block.ln_1))  # type: ignore[arg-type]
    for leaf in attention.LEAVES:
        add_attention_site(sites, f"{prefix}.attn.{leaf}", attn, leaf)
    add_site(sites, f"{prefix}.attn_out", sites.output(block.ls_1))  # type: ignore[arg-type]
    middle = custom_block_forward if custom else block_forward
    add_site(sites, f"{prefix}.resid_mid", ExplicitForward(block, ("resid_mid",), middle), "resid_mid")
    add_site(sites, f"{prefix}.ln_2", sites.output(block.ln_2))  # type: ignore[arg-type]
    add_site(sites, f"{prefix}.mlp.pre", sites.output(mlp.c_fc), layout="batch token d_mlp")
    add_site(
        sites, f"{prefix}.mlp.post", sites.output(mlp.ln if custom else mlp.gelu), layout="batch token d_mlp"
    )
    add_site(sites, f"{prefix}.mlp_out", sites.output(block.ls_2))  # type: ignore[arg-type]
    add_site(sites, f"{prefix}.resid_post", sites.output(block))


def add_attention_site(sites: SiteMap, name: str, tap: Tap, leaf: str) -> None:
    """``q, k, v, z, head_out``: attention heads in the last but one dimension; ``pattern``: in the second."""
    heads, tokens = (-3, 2) if leaf == "pattern" else (-2, 1)
    sites.add(Site(name, tap, leaf, heads, tokens, _LAYOUT.get(leaf, "batch token head d_head")))


def add_site(sites: SiteMap, name: str, tap: Tap, leaf: str = "", layout: str = "batch token d") -> None:
    """A place in the stream of tokens."""
    sites.add(Site(name, tap, leaf, layout=layout))


# -- open_clip's forwards with their insides -------------------------------------------------------------


def block_forward(
    block: Any,
    emit: Emit,
    want: Container[str],
    q_x: Tensor,
    k_x: Tensor | None = None,
    v_x: Tensor | None = None,
    attn_mask: Tensor | None = None,
) -> Tensor:
    """open_clip's ResidualAttentionBlock, operation by operation, with the middle of the residual stream."""
    if hasattr(block, "ln_1_kv"):
        k_x = block.ln_1_kv(k_x) if k_x is not None else None
        v_x = block.ln_1_kv(v_x) if v_x is not None else None
    else:
        k_x = v_x = None
    x = q_x + block.ls_1(block.attention(q_x=block.ln_1(q_x), k_x=k_x, v_x=v_x, attn_mask=attn_mask))
    x = emit("resid_mid", x)
    return x + block.ls_2(block.mlp(block.ln_2(x)))


def custom_block_forward(
    block: Any, emit: Emit, want: Container[str], x: Tensor, attn_mask: Tensor | None = None
) -> Tensor:
    """open_clip's CustomResidualAttentionBlock, likewise."""
    x = x + block.ls_1(block.ln_attn(block.attn(block.ln_1(x), attn_mask=attn_mask)))
    x = emit("resid_mid", x)
    return x + block.ls_2(block.mlp(block.ln_2(x)))


def custom_attention_forward(
    module: Any, emit: Emit, want: Container[str], x: Tensor, attn_mask: Tensor | None = None
) -> Tensor:
    """open_clip's own Attention. ``z`` is what the output projection reads: after head scale and inner norm."""
    heads = module.num_heads
    q, k, v = F.linear(x, module.in_proj_weight, module.in_proj_bias).chunk(3, dim=-1)
    q, k, v = (t.unflatten(-1, (heads, -1)) for t in (q, k, v))
    scale = None
    if module.logit_scale is not None:
        temperature = torch.clamp(module.logit_scale, max=module.logit_scale_max).exp()
        q, k, scale = F.normalize(q, dim=-1) * temperature.view(heads, 1), F.normalize(k, dim=-1), 1.0
    else:
        q, k = module.ln_q(q), module.ln_k(k)
    mask = attention._additive(attn_mask, q, heads)
    dropout = module.attn_drop.p if module.training else 0.0

    def inner(leaf: str, value: Tensor) -> Tensor:
        if leaf != "z":
            return emit(leaf, value)
        if module.head_scale is not None:
            value = value * module.head_scale.view(heads, 1)
        return emit("z", module.ln_inner(value.flatten(-2)).unflatten(-1, (heads, -1)))

    z, _ = attention.attend(q, k, v, emit=inner, want=want, mask=mask, dropout=dropout, scale=scale)
    return module.out_drop(attention.project(z, module.out_proj.weight, module.out_proj.bias, emit, want))
