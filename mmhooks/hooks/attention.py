"""Explicit attention that exposes its intermediate values: ``q, k, v, pattern, z, head_out``.

Layouts are TransformerLens's: ``q, k, v, z [batch token head d_head]``, ``pattern [batch head query key]``,
``head_out [batch token head d]``, where ``head_out.sum(head) + bias`` is the attention's output. torch passes the weights
of ``nn.MultiheadAttention`` to one fused function, so no module owns these values; :func:`multihead_forward` recomputes
them. The fused and the explicit path differ by rounding (below 1e-6 in fp32), so contexts that only read get the fused
output.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from mmhooks.errors import MMHooksError
from mmhooks.hooks.kinds import Positions, computed_for
from mmhooks.hooks.taps import Emit

LEAVES = ("q", "k", "v", "pattern", "z", "head_out")
SCORES = LEAVES[:4]  # inputs and pattern of softmax attention; z and head_out belong to the output projection


def multihead_forward(
    module: nn.MultiheadAttention,
    emit: Emit,
    want: Mapping[str, Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``nn.MultiheadAttention.forward``, emitting its intermediate values."""
    if module.batch_first:
        same = query is key and key is value
        query = query.transpose(0, 1)
        key, value = (query, query) if same else (key.transpose(0, 1), value.transpose(0, 1))
    separate = not module._qkv_same_embed_dim
    out, weights = multihead(
        emit, want, query, key, value, module.embed_dim, module.num_heads, module.in_proj_weight,
        module.in_proj_bias, module.bias_k, module.bias_v, module.add_zero_attn, module.dropout,
        module.out_proj.weight, module.out_proj.bias, training=module.training, need_weights=need_weights,
        key_padding_mask=key_padding_mask, attn_mask=attn_mask, average_attn_weights=average_attn_weights,
        use_separate_proj_weight=separate,
        q_proj_weight=module.q_proj_weight, k_proj_weight=module.k_proj_weight, v_proj_weight=module.v_proj_weight,
    )  # fmt: skip
    return out.transpose(0, 1) if module.batch_first else out, weights


def multihead(
    emit: Emit,
    want: Mapping[str, Any],
    query: Float[Tensor, "lq b d"],
    key: Float[Tensor, "lk b dk"],
    value: Float[Tensor, "lk b dv"],
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``torch.nn.functional.multi_head_attention_forward`` on the weights it is given, emitting intermediate values."""
    if (
        bias_k is not None
        or bias_v is not None
        or add_zero_attn
        or static_k is not None
        or static_v is not None
    ):
        raise MMHooksError(
            "expected attention over the tokens only, got nn.MultiheadAttention with bias_k, bias_v, add_zero_attn or "
            "static keys, whose intermediate values are not supported; hook the module itself by its native path"
        )  # fmt: skip
    same = query is key and key is value
    query, key, value = (t.transpose(0, 1) for t in (query, key, value))
    bias = in_proj_bias
    if not use_separate_proj_weight and same:
        q, k, v = F.linear(query, in_proj_weight, bias).chunk(3, dim=-1)  # type: ignore[arg-type]
    else:
        weights: Any = (
            (q_proj_weight, k_proj_weight, v_proj_weight)
            if in_proj_weight is None or use_separate_proj_weight
            else in_proj_weight.chunk(3)
        )
        biases = (None, None, None) if bias is None else bias.chunk(3)
        q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
    mask = _additive(attn_mask, q, num_heads)
    if key_padding_mask is not None:
        padding = _additive(key_padding_mask, q, num_heads)[:, None, None, :]
        mask = padding if mask is None else mask + padding
    q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q, k, v))
    dropout = dropout_p if training else 0.0
    z, pattern = attend(emit, want, q, k, v, mask, dropout, weights=need_weights)
    z = z.transpose(1, 2)
    if "z" in want:
        z = emit("z", z)
    out = project(z, out_proj_weight, out_proj_bias, emit, want).transpose(0, 1)
    return out, pattern.mean(dim=1) if pattern is not None and average_attn_weights else pattern


def attend(
    emit: Emit,
    want: Mapping[str, Any],
    query: Float[Tensor, "b h lq e"],
    key: Float[Tensor, "b hk lk e"],
    value: Float[Tensor, "b hk lk e"],
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    weights: bool = False,
    rows: bool = True,
) -> tuple[Float[Tensor, "b h lq e"], Tensor | None]:
    """torch's ``scaled_dot_product_attention``, emitting ``q, k, v`` and ``pattern`` where wanted.

    The pattern is computed beside the fused attention and replaces it only if it was edited or gradients are needed
    through it, so reading changes no bit of the output. Where it is only read, and only at some queries, it is computed
    at these alone.

    Args:
        attn_mask: as torch takes it here: additive, or bool, where True keeps.
        weights: also return the pattern.
        rows: whether the queries are the site's tokens, so that some of them can be left out.
    """
    q, k, v = (by_token(emit, want, leaf, t) for leaf, t in (("q", query), ("k", key), ("v", value)))
    pattern = None
    if weights or "pattern" in want:
        aside = not weights and want["pattern"].detached
        with torch.no_grad() if aside else nullcontext():
            if rows and aside and (chosen := _kept_queries(want["pattern"], q, k)) is not None:
                with computed_for(q.shape[2]):
                    emit("pattern", softmax_scores(q, k, attn_mask, is_causal, scale, chosen))
                edited = pattern = None
            else:
                pattern = softmax_scores(q, k, attn_mask, is_causal, scale)
                edited = emit("pattern", pattern) if "pattern" in want else pattern
        if edited is not None and (weights or edited is not pattern or edited.requires_grad):
            values = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1) if enable_gqa else v
            return F.dropout(edited, dropout_p) @ values.to(edited.dtype), edited
    options: dict[str, Any] = {"enable_gqa": True} if enable_gqa else {}
    z = F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, **options)
    return z, None


def _kept_queries(program: Any, q: Float[Tensor, "b h lq e"], k: Float[Tensor, "b hk lk e"]) -> Positions:
    """The queries whose rows of the pattern its only reader keeps; None: all of them, or more happens to it."""
    choose = getattr(program, "rows", None)
    if choose is None or q.shape[2] == 1 or torch.compiler.is_compiling():
        return None
    chosen = choose(q[..., :1].expand(*q.shape[:-1], k.shape[2]))  # a view of the pattern's shape
    return chosen if chosen is not None and chosen.numel() else None


def by_token(emit: Emit, want: Mapping[str, Any], leaf: str, given: Tensor) -> Tensor:
    """Emits ``[b h l e]`` as ``[b l h e]``; returns the same tensor if nothing changed, which preserves its layout."""
    if leaf not in want:
        return given
    shown = given.transpose(1, 2)
    new = emit(leaf, shown)
    return given if new is shown and not new.requires_grad else new.transpose(1, 2)


def softmax_scores(
    q: Float[Tensor, "b h lq e"],
    k: Float[Tensor, "b hk lk e"],
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    rows: Positions = None,
) -> Float[Tensor, "b h lr lk"]:
    """The pattern of ``scaled_dot_product_attention``, with its zeros for a query that may attend to no key.

    Args:
        k: by query head, or by key head, each of which several query heads in a row share.
        rows: only these queries; None: all.
    """
    if is_causal:
        queries = torch.arange(q.shape[2], device=q.device) if rows is None else rows
        mask = queries[..., None] >= torch.arange(k.shape[2], device=q.device)
        mask = mask if mask.dim() == 2 else mask[:, None]
    elif mask is not None and rows is not None and mask.dim() >= 2 and mask.shape[-2] > 1:
        mask = _queries_of(mask[(None,) * (4 - mask.dim())], rows)
    q = q if rows is None else _queries_of(q, rows)
    q = q * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    shared = q.shape[1] // k.shape[1]
    folded = q if shared == 1 else q.unflatten(1, (-1, shared)).flatten(2, 3)  # without repeating keys
    scores = (folded @ k.transpose(-1, -2)).view(*q.shape[:3], k.shape[2])
    if mask is None:
        return scores.softmax(dim=-1)
    # Softmax over no keys is NaN; left padding creates such rows.
    if mask.dtype == torch.bool:
        hidden = ~mask
        lowest = torch.finfo(scores.dtype).min
        return scores.masked_fill(hidden, lowest).softmax(dim=-1).masked_fill(hidden, 0.0)
    scores = scores + mask
    blind = (scores == float("-inf")).all(dim=-1, keepdim=True)
    return scores.masked_fill(blind, 0.0).softmax(dim=-1).masked_fill(blind, 0.0)


def _queries_of(
    value: Float[Tensor, "b h lq x"] | Bool[Tensor, "b h lq x"], rows: Int[Tensor, "*b m"]
) -> Tensor:
    """The values of some queries: the same ones of every row of the batch, or some of each."""
    if rows.dim() == 1:
        return value.index_select(2, rows)
    value = value.expand(len(rows), -1, -1, -1)
    return value.gather(2, rows[:, None, :, None].expand(-1, value.shape[1], -1, value.shape[3]))


def project(
    z: Float[Tensor, "b l h e"],
    weight: Float[Tensor, "d he"],
    bias: Tensor | None,
    emit: Emit,
    want: Mapping[str, Any],
) -> Float[Tensor, "b l d"]:
    """The output projection; split by attention head only if ``head_out`` is wanted."""
    if "head_out" not in want:
        return F.linear(z.flatten(-2), weight, bias)
    out = emit("head_out", split_by_head(z, weight)).sum(dim=-2)
    return out if bias is None else out + bias


def split_by_head(z: Float[Tensor, "*b h e"], weight: Float[Tensor, "d he"]) -> Float[Tensor, "*b h d"]:
    """The contribution of each attention head to a linear projection's output."""
    return torch.einsum("...he,dhe->...hd", z, weight.unflatten(-1, z.shape[-2:]))


def _additive(mask: Tensor | None, q: Tensor, heads: int) -> Any:
    """A mask of nn.MultiheadAttention (bool: True hides; ``[lq lk]`` or ``[b*h lq lk]``) in additive form."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask, float("-inf"))
    mask = mask.to(q.dtype)
    return mask.unflatten(0, (-1, heads)) if mask.dim() == 3 else mask
