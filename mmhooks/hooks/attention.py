"""Attention with its insides in the open: ``q, k, v, pattern, z, head_out`` of ``nn.MultiheadAttention``.

torch hands its weights to one fused function, so no module owns these places. Layouts are TransformerLens's:
``q, k, v, z [batch token head d_head]``, ``pattern [batch head query key]``, ``head_out [batch token head d]``
with ``head_out.sum(head) + bias`` the attention's output. Fused and explicit path differ by rounding
(below 1e-6 in fp32), so contexts that only read get the fused output.
"""

from __future__ import annotations

import math
from collections.abc import Container
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from mmhooks.hooks.taps import Emit

LEAVES = ("q", "k", "v", "pattern", "z", "head_out")


def multihead_forward(
    module: nn.MultiheadAttention,
    emit: Emit,
    want: Container[str],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``nn.MultiheadAttention.forward``, emitting its insides."""
    same = query is key and key is value
    if not module.batch_first:
        query, key, value = (t.transpose(0, 1) for t in (query, key, value))
    heads = module.num_heads
    bias = module.in_proj_bias
    if module._qkv_same_embed_dim and same:
        q, k, v = F.linear(query, module.in_proj_weight, bias).chunk(3, dim=-1)
    else:
        weights = (
            module.in_proj_weight.chunk(3)
            if module._qkv_same_embed_dim
            else (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
        )
        biases = (None, None, None) if bias is None else bias.chunk(3)
        q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
    mask = _additive(attn_mask, q, heads)
    if key_padding_mask is not None:
        padding = _additive(key_padding_mask, q, heads)[:, None, None, :]  # type: ignore[index]
        mask = padding if mask is None else mask + padding
    dropout = module.dropout if module.training else 0.0
    z, pattern = attend(
        *(t.unflatten(-1, (heads, -1)) for t in (q, k, v)),
        emit=emit,
        want=want,
        mask=mask,
        dropout=dropout,
        weights=need_weights,
    )
    out = project(z, module.out_proj.weight, module.out_proj.bias, emit, want)
    if not module.batch_first:
        out = out.transpose(0, 1)
    if not need_weights:
        return out, None
    assert pattern is not None
    return out, pattern.mean(dim=1) if average_attn_weights else pattern


def attend(
    q: Float[Tensor, "b lq h e"],
    k: Float[Tensor, "b lk h e"],
    v: Float[Tensor, "b lk h e"],
    *,
    emit: Emit,
    want: Container[str],
    mask: Tensor | None = None,
    dropout: float = 0.0,
    weights: bool = False,
    scale: float | None = None,
) -> tuple[Float[Tensor, "b lq h e"], Tensor | None]:
    """Softmax attention; emits ``q, k, v``, ``pattern`` and ``z`` where wanted, and is fused where it can be."""
    q, k, v = (emit(leaf, t) for leaf, t in (("q", q), ("k", k), ("v", v)))
    pattern = None
    if weights or "pattern" in want:
        scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
        scores = torch.einsum("bqhe,bkhe->bhqk", q * scale, k)
        pattern = (scores if mask is None else scores + mask).softmax(dim=-1)
        pattern = emit("pattern", pattern)
        z = torch.einsum("bhqk,bkhe->bqhe", F.dropout(pattern, dropout), v)
    else:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        z = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale).transpose(
            1, 2
        )
    return emit("z", z), pattern


def project(
    z: Float[Tensor, "b l h e"],
    weight: Float[Tensor, "d he"],
    bias: Tensor | None,
    emit: Emit,
    want: Container[str],
) -> Float[Tensor, "b l d"]:
    """The output projection; split by attention head only if ``head_out`` is wanted."""
    if "head_out" not in want:
        return F.linear(z.flatten(-2), weight, bias)
    by_head = weight.unflatten(-1, z.shape[-2:])
    out = emit("head_out", torch.einsum("blhe,dhe->blhd", z, by_head)).sum(dim=-2)
    return out if bias is None else out + bias


def _additive(mask: Tensor | None, q: Tensor, heads: int) -> Any:
    """Masks as torch takes them (bool: True hides; ``[lq lk]`` or ``[b*h lq lk]``), made additive."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask, float("-inf"))
    mask = mask.to(q.dtype)
    return mask.unflatten(0, (-1, heads)) if mask.dim() == 3 else mask
