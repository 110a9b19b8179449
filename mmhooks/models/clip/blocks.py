"""Sites of open_clip's two kinds of transformer blocks."""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

from torch import Tensor, nn

from mmhooks.hooks.attention import LEAVES, SCORES, multihead_forward
from mmhooks.hooks.intercept import (
    Intercepted,
    NativeForward,
    attention_scores,
    multihead_calls,
    residual_middle,
)
from mmhooks.hooks.projection import ProjectionByHead, heads_view
from mmhooks.hooks.sites import Site, SiteMap, View
from mmhooks.hooks.taps import Emit, Tap

_LAYOUT = {"pattern": "batch head query key", "head_out": "batch token head d"}


def add_openclip_block(sites: SiteMap, prefix: str, block: nn.Module) -> None:
    """All sites of a ResidualAttentionBlock or CustomResidualAttentionBlock."""
    custom = hasattr(block, "ln_attn")
    mlp: Any = block.mlp
    add_site(sites, f"{prefix}.resid_pre", sites.input(block))
    add_site(sites, f"{prefix}.ln_1", sites.output(block.ln_1))  # type: ignore[arg-type]
    if custom:
        add_projected_attention(sites, prefix, block.attn, block.attn.num_heads, block.attn.out_proj)  # type: ignore
    else:
        _add_multihead(sites, prefix, block.attn)  # type: ignore[arg-type]
    add_site(sites, f"{prefix}.attn_out", sites.output(block.ls_1))  # type: ignore[arg-type]
    middle: Tap = Intercepted(block, ("resid_mid",), residual_middle)
    if not custom:  # a function mode would disable torch's fast path of attention
        middle = NativeForward(block, ("resid_mid",), block_forward, _native(block), residual_middle)
    add_site(sites, f"{prefix}.resid_mid", middle, "resid_mid")
    add_site(sites, f"{prefix}.ln_2", sites.output(block.ln_2))  # type: ignore[arg-type]
    add_site(sites, f"{prefix}.mlp.pre", sites.output(mlp.c_fc), layout="batch token d_mlp")
    add_site(
        sites, f"{prefix}.mlp.post", sites.output(mlp.ln if custom else mlp.gelu), layout="batch token d_mlp"
    )
    add_site(sites, f"{prefix}.mlp_out", sites.output(block.ls_2))  # type: ignore[arg-type]
    add_site(sites, f"{prefix}.resid_post", sites.output(block))


def _add_multihead(sites: SiteMap, prefix: str, attn: nn.Module) -> None:
    """``attn.*`` of ``nn.MultiheadAttention``, or of a wrapper around it."""
    native = nn.MultiheadAttention.forward
    tap = NativeForward(
        attn, LEAVES, multihead_forward, native, multihead_calls, inexact=LEAVES, watch_is_exact=True
    )
    for leaf in LEAVES:
        add_attention_site(sites, f"{prefix}.attn.{leaf}", tap, leaf)


def add_projected_attention(
    sites: SiteMap, prefix: str, scope: nn.Module, heads: int, projection: nn.Module, *, fused: bool = True
) -> None:
    """``attn.*`` if the output projection is a module called by ``scope``, running the model's own code.

    Args:
        fused: whether the attention before it can be intercepted; if not, only the projection's sites are added.
    """
    scores = Intercepted(scope, SCORES, attention_scores)
    for leaf in SCORES if fused else ():
        add_attention_site(sites, f"{prefix}.attn.{leaf}", scores, leaf)
    add_attention_site(sites, f"{prefix}.attn.z", sites.input(projection), "", heads_view(heads))
    add_attention_site(sites, f"{prefix}.attn.head_out", ProjectionByHead(projection, heads), "head_out")


def _native(module: nn.Module) -> Callable[..., Any]:
    return type(module).forward


def add_attention_site(sites: SiteMap, name: str, tap: Tap, leaf: str, view: View | None = None) -> None:
    """``q, k, v, z, head_out``: attention heads in the second to last dimension; ``pattern``: in the second."""
    heads, tokens = (-3, 2) if leaf == "pattern" else (-2, 1)
    sites.add(Site(name, tap, leaf, heads, tokens, _LAYOUT.get(leaf, "batch token head d_head"), view))


def add_site(sites: SiteMap, name: str, tap: Tap, leaf: str = "", layout: str = "batch token d") -> None:
    """Adds a site with tokens."""
    sites.add(Site(name, tap, leaf, layout=layout))


# -- open_clip's forward, explicit -------------------------------------------------------------


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
