"""Weights of open_clip's residual blocks under the names that transformers' CLIP encoders give them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

_PLACES = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def encoder_layers(blocks: Iterable[Any]) -> dict[str, Tensor]:
    """``encoder.layers.<n>.*`` of a ``CLIPTextModel`` or ``CLIPVisionModel``, from ``ResidualAttentionBlock`` s.

    Nothing is copied: the tensors share memory with the blocks' own.
    """
    state: dict[str, Tensor] = {}
    for n, block in enumerate(blocks):
        own, prefix = block.state_dict(), f"encoder.layers.{n}."
        for kind in ("weight", "bias"):
            state |= {f"{prefix}{theirs}.{kind}": own[f"{ours}.{kind}"] for theirs, ours in _PLACES.items()}
            fused = own[f"attn.in_proj_{kind}"].chunk(3)
            state |= {
                f"{prefix}self_attn.{q}_proj.{kind}": part for q, part in zip("qkv", fused, strict=True)
            }
    return state
