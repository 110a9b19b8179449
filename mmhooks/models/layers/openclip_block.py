"""open_clip's two kinds of transformer blocks."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from torch import Tensor, nn

from mmhooks.hooks.attention import LEAVES, multihead_forward
from mmhooks.hooks.intercept import Intercepted, NativeForward, multihead_calls, residual_middle
from mmhooks.hooks.sites import SiteMap
from mmhooks.hooks.taps import Emit, Tap
from mmhooks.models.layers.leaves import (
    MLP_LAYOUT,
    LayerWeights,
    add_attention_site,
    add_outputs,
    add_projected_attention,
    add_site,
    layer_scale,
)


def add_openclip_block(sites: SiteMap, prefix: str, block: Any) -> None:
    """All sites of a ResidualAttentionBlock or CustomResidualAttentionBlock."""
    custom = hasattr(block, "ln_attn")
    mlp: Any = block.mlp
    add_site(sites, f"{prefix}.resid_pre", sites.input(block))
    add_outputs(sites, prefix, {"ln_1": block.ln_1})
    if custom:
        add_projected_attention(sites, prefix, block.attn, block.attn.num_heads, block.attn.out_proj)
    else:
        add_multihead(sites, prefix, block.attn)
    add_outputs(sites, prefix, {"attn_out": block.ls_1})
    middle: Tap = Intercepted(block, ("resid_mid",), residual_middle)
    if not custom:  # a function mode would disable torch's fast path of attention
        middle = NativeForward(block, ("resid_mid",), block_forward, type(block).forward, residual_middle)
    add_site(sites, f"{prefix}.resid_mid", middle, "resid_mid")
    add_outputs(sites, prefix, {"ln_2": block.ln_2})
    add_site(sites, f"{prefix}.mlp.pre", sites.output(mlp.c_fc), layout=MLP_LAYOUT)
    add_site(sites, f"{prefix}.mlp.post", sites.output(mlp.ln if custom else mlp.gelu), layout=MLP_LAYOUT)
    add_outputs(sites, prefix, {"mlp_out": block.ls_2})
    add_site(sites, f"{prefix}.resid_post", sites.output(block))


def openclip_weights(block: Any) -> LayerWeights:
    """The weights of either kind of block."""
    custom = hasattr(block, "ln_attn")
    return LayerWeights(
        type(block).__name__,
        block.attn.num_heads,
        block.ln_1,
        block.attn.out_proj if custom else block.attn,
        None if custom else block.attn,
        block.mlp.c_proj,
        layer_scale(block, "ls_1"),
        layer_scale(block, "ls_2"),
    )


def add_multihead(sites: SiteMap, prefix: str, attn: nn.Module) -> None:
    """``attn.*`` of ``nn.MultiheadAttention``, or of a wrapper around it."""
    native = nn.MultiheadAttention.forward
    tap = NativeForward(
        attn, LEAVES, multihead_forward, native, multihead_calls, inexact=LEAVES, watch_is_exact=True
    )
    for leaf in LEAVES:
        add_attention_site(sites, f"{prefix}.attn.{leaf}", tap, leaf)


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
