"""torchvision's transformer block: norms in front, torch's attention, and an MLP that is a ``Sequential``."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from torch import Tensor, nn

from mmhooks.hooks.intercept import NativeForward, residual_middle
from mmhooks.hooks.sites import SiteMap
from mmhooks.hooks.taps import Emit
from mmhooks.models.layers.leaves import add_mlp, add_outputs, add_site
from mmhooks.models.layers.openclip_block import add_multihead


def add_torchvision_block(sites: SiteMap, prefix: str, block: Any) -> None:
    """All sites of an EncoderBlock."""
    first, *_, last = [m for m in block.mlp if isinstance(m, nn.Linear)]
    add_site(sites, f"{prefix}.resid_pre", sites.input(block))
    add_outputs(sites, prefix, {"ln_1": block.ln_1})
    add_multihead(sites, prefix, block.self_attention)
    add_outputs(sites, prefix, {"attn_out": block.dropout})
    # A function mode would disable torch's fast path of attention.
    middle = NativeForward(block, ("resid_mid",), block_forward, type(block).forward, residual_middle)
    add_site(sites, f"{prefix}.resid_mid", middle, "resid_mid")
    add_outputs(sites, prefix, {"ln_2": block.ln_2})
    add_mlp(sites, prefix, first, last)
    add_outputs(sites, prefix, {"mlp_out": block.mlp})
    add_site(sites, f"{prefix}.resid_post", sites.output(block))


def block_forward(block: Any, emit: Emit, want: Container[str], input: Tensor) -> Tensor:
    """torchvision's EncoderBlock, operation by operation, with the middle of the residual stream."""
    x = block.ln_1(input)
    x, _ = block.self_attention(x, x, x, need_weights=False)
    x = emit("resid_mid", block.dropout(x) + input)
    return x + block.mlp(block.ln_2(x))
