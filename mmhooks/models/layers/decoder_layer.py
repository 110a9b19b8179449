"""The decoder layer with gated MLP and, often, grouped-query attention: Llama, Mistral, Qwen, Gemma.

``norm → attention → (norm) → sum → norm → gated MLP → (norm) → sum``. Under grouped queries several query heads share one
key and one value: ``attn.k`` and ``attn.v`` are by key head, ``attn.q``, ``pattern``, ``z`` and ``head_out`` by query head.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from mmhooks.hooks.attention import SCORES
from mmhooks.hooks.intercept import Call, Intercepted, attention_scores
from mmhooks.hooks.projection import ProjectionByHead, heads_view
from mmhooks.hooks.sites import SiteMap
from mmhooks.hooks.taps import Emit
from mmhooks.models.layers.leaves import (
    MLP_LAYOUT,
    add_attention_site,
    add_middle,
    add_outputs,
    add_site,
    child,
)


def is_decoder_layer(layer: Any) -> bool:
    """Whether a layer is of this kind."""
    attn, mlp = child(layer, "self_attn"), child(layer, "mlp")
    parts = [child(layer, "input_layernorm"), *(child(attn, name) for name in ("q_proj", "k_proj", "o_proj"))]
    parts += [child(mlp, name) for name in ("gate_proj", "up_proj", "down_proj")]
    return None not in parts and all(hasattr(attn, name) for name in ("head_dim", "num_key_value_groups"))


def add_decoder_layer(sites: SiteMap, prefix: str, layer: Any) -> None:
    """All sites of one layer. ``attn_out`` and ``mlp_out`` are what is added to the stream: in Gemma 2 and 3, behind the
    norms that follow attention and MLP."""
    attn, mlp = layer.self_attn, layer.mlp
    behind = child(layer, "pre_feedforward_layernorm") is not None  # Gemma 2 and 3: norms on both sides
    heads = attn.o_proj.in_features // attn.head_dim
    groups = attn.num_key_value_groups
    add_site(sites, f"{prefix}.resid_pre", sites.input(layer, "hidden_states"))
    add_outputs(sites, prefix, {"ln_1": layer.input_layernorm})
    scores = Intercepted(attn, SCORES, partial(grouped_scores, heads, groups))
    for leaf in SCORES:
        add_attention_site(sites, f"{prefix}.attn.{leaf}", scores, leaf)
    add_attention_site(sites, f"{prefix}.attn.z", sites.input(attn.o_proj), "", heads_view(heads))
    add_attention_site(sites, f"{prefix}.attn.head_out", ProjectionByHead(attn.o_proj, heads), "head_out")
    add_outputs(sites, prefix, {"attn_out": layer.post_attention_layernorm if behind else attn})
    add_middle(sites, prefix, layer)
    add_outputs(
        sites, prefix, {"ln_2": child(layer, "pre_feedforward_layernorm", "post_attention_layernorm")}
    )
    for leaf, module in (("gate", mlp.gate_proj), ("pre", mlp.up_proj)):
        add_site(sites, f"{prefix}.mlp.{leaf}", sites.output(module), layout=MLP_LAYOUT)
    add_site(sites, f"{prefix}.mlp.post", sites.input(mlp.down_proj), layout=MLP_LAYOUT)
    add_outputs(sites, prefix, {"mlp_out": child(layer, "post_feedforward_layernorm") or mlp})
    # First, before the hooks by which transformers records hidden states.
    add_site(sites, f"{prefix}.resid_post", sites.output(layer, first=True))


def grouped_scores(
    heads: int, groups: int, module: nn.Module, emit: Emit, want: Any, args: Any, kwargs: Any
) -> Call:
    """``q, k, v`` and ``pattern`` of attention whose keys and values transformers may have repeated, or whose only query it
    may have packed by key head, before the kernel: places always show the layouts above.

    Args:
        heads, groups: query heads, and query heads per key head.
    """
    if groups == 1:
        return attention_scores(module, emit, want, args, kwargs)
    keys = heads // groups

    def shown(leaf: str, value: Tensor) -> Tensor:
        """Emits ``q, k, v`` ``[b l h e]`` or the pattern ``[b h l k]``, which the kernel may have in another layout."""
        if leaf == "pattern":
            packed, maps = value.shape[1] == keys, _unpacked(heads, groups)
        elif leaf == "q":
            packed, maps = value.shape[2] == keys, _unpacked_query(heads, groups)
        else:
            packed, maps = value.shape[2] == heads, _by_key_head(groups)
        return _emit_as(emit, leaf, value, *maps) if packed else emit(leaf, value)

    return attention_scores(module, shown, want, args, kwargs, heads)


Map = Callable[[Tensor], Tensor]


def _emit_as(emit: Emit, leaf: str, value: Tensor, show: Map, back: Map) -> Tensor:
    """Emits another layout of ``value``; the same tensor if nothing changed."""
    given = show(value)
    new = emit(leaf, given)
    return value if new is given and not new.requires_grad else back(new)


def _by_key_head(groups: int) -> tuple[Map, Map]:
    """``[b l kv*rep e]``, each key head ``rep`` times in a row, as ``[b l kv e]``."""
    return lambda raw: raw[:, :, ::groups], lambda new: new.repeat_interleave(groups, dim=2)


def _unpacked_query(heads: int, groups: int) -> tuple[Map, Map]:
    """``[b rep kv e]``, one query by key head, as ``[b 1 h e]``."""
    return (
        lambda raw: raw.transpose(1, 2).reshape(len(raw), 1, heads, -1),
        lambda new: new.reshape(len(new), heads // groups, groups, -1).transpose(1, 2),
    )


def _unpacked(heads: int, groups: int) -> tuple[Map, Map]:
    """The pattern ``[b kv rep k]`` of one query as ``[b h 1 k]``."""
    return (
        lambda raw: raw.reshape(len(raw), heads, 1, -1),
        lambda new: new.reshape(len(new), heads // groups, groups, -1),
    )
