"""The encoder layer of transformers with norms in front: CLIP, SigLIP, ViT, DINOv2, DINOv3 and their relatives.

One structure under several names: ``norm → attention → (scale) → sum → norm → MLP → (scale) → sum``.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from mmhooks.errors import MMHooksError
from mmhooks.hooks.sites import SiteMap
from mmhooks.models.layers.leaves import (
    LayerWeights,
    add_addends,
    add_middle,
    add_mlp,
    add_outputs,
    add_projected_attention,
    add_site,
    child,
    layer_scale,
)

# The same part under the names that the architectures give it.
_ATTENTION = ("self_attn", "attention")
_PROJECTION = ("out_proj", "o_proj", "proj", "projection_layer")
_VALUE = ("v_proj", "value")
_NORM_1 = ("layer_norm1", "layernorm_before", "norm1")
_NORM_2 = ("layer_norm2", "layernorm_after", "norm2")
_FIRST, _LAST = ("fc1", "up_proj"), ("fc2", "down_proj")


def is_encoder_layer(layer: Any) -> bool:
    """Whether a layer is of this kind."""
    attn = child(layer, *_ATTENTION)
    return child(layer, *_NORM_1) is not None and child(attn, *_PROJECTION) is not None


def add_encoder_layer(sites: SiteMap, prefix: str, layer: Any) -> None:
    """All sites of one layer. ``attn_out`` and ``mlp_out`` are what is added to the stream: behind a layer scale."""
    attn, mlp = child(layer, *_ATTENTION), child(layer, "mlp")
    projection = child(attn, *_PROJECTION)
    assert attn is not None and projection is not None
    add_site(sites, f"{prefix}.resid_pre", sites.input(layer, "hidden_states"))
    add_outputs(sites, prefix, {"ln_1": child(layer, *_NORM_1)})
    add_projected_attention(sites, prefix, attn, attention_heads(attn), projection)
    scaled = isinstance(getattr(layer, "lambda_1", None), nn.Parameter)  # InternVL: a scale that is no module
    if scaled:
        add_addends(sites, prefix, layer)
    else:
        add_outputs(sites, prefix, {"attn_out": child(layer, "layer_scale1") or attn})
    if (
        child(layer, "message_attn") is None and not scaled
    ):  # X-CLIP appends a token to the stream before its sum
        add_middle(sites, prefix, layer)
    add_outputs(sites, prefix, {"ln_2": child(layer, *_NORM_2)})
    gate = child(mlp, "gate_proj")
    if gate is not None:
        add_site(sites, f"{prefix}.mlp.gate", sites.output(gate), layout="batch token d_mlp")
    add_mlp(sites, prefix, child(mlp, *_FIRST), child(mlp, *_LAST))
    if not scaled:
        add_outputs(sites, prefix, {"mlp_out": child(layer, "layer_scale2") or mlp})
    # First, before the hooks by which transformers records hidden states.
    add_site(sites, f"{prefix}.resid_post", sites.output(layer, first=True))


def attention_heads(attn: nn.Module) -> int:
    """The number of attention heads, under any of its names.

    Raises:
        MMHooksError: none of them is there.
    """
    for name in ("num_heads", "num_attention_heads"):
        if isinstance(getattr(attn, name, None), int):
            return getattr(attn, name)
    raise MMHooksError(f"expected an attention that says its number of heads, got {type(attn).__name__}")


def encoder_weights(layer: Any) -> LayerWeights:
    """The weights of one layer."""
    attn, mlp = child(layer, *_ATTENTION), child(layer, "mlp")
    norm, projection = child(layer, *_NORM_1), child(attn, *_PROJECTION)
    assert attn is not None and norm is not None and projection is not None
    return LayerWeights(
        type(layer).__name__,
        attention_heads(attn),
        norm,
        projection,
        child(attn, *_VALUE),
        child(mlp, *_LAST),
        layer_scale(layer, "layer_scale1", "lambda_1"),
        layer_scale(layer, "layer_scale2", "lambda_2"),
    )
