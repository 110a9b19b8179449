"""How transformers' CLIP and SigLIP compute their embeddings from the residual stream; see :mod:`.readout`."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from mmhooks.errors import NoExactSum
from mmhooks.hooks.intercept import is_multihead
from mmhooks.models.clip.linearized import Frozen, check_norm
from mmhooks.models.clip.readout import (
    Positions,
    Readout,
    class_token_or_average,
    matrix_of,
    multihead_pooling,
    one_token,
)
from mmhooks.models.layers.encoder_layer import encoder_weights, is_encoder_layer
from mmhooks.models.layers.leaves import LayerWeights
from mmhooks.models.towers.transformers_tower import encoder_layers, pools_before_norm


def vision_readout(model: Any) -> Readout:
    """The readout of ``model.vision_model``: CLIP's class token, or SigLIP's pooling by attention.

    Raises:
        NoExactSum: a convolutional tower, or another pooling.
    """
    vision = model.vision_model
    blocks, norm = _blocks(vision, "image"), vision.post_layernorm
    check_norm(norm, "the image tower's final norm")
    if pools_before_norm(vision):
        matrix, bias = matrix_of(model.visual_projection)
        return class_token_or_average("image", blocks, "tok", 1, norm, True, matrix, bias)
    pool: Any = getattr(vision, "head", None)
    if not is_multihead(getattr(pool, "attention", nn.Identity())):
        raise NoExactSum(
            f"the image tower pools by {type(pool).__name__}; a sum is known for CLIP's class token and SigLIP's pooling by "
            "attention"
        )

    def freeze(stream: Float[Tensor, "b t d"]) -> Frozen:
        return multihead_pooling(pool.attention, norm, pool.probe[0].detach(), stream)

    return Readout("image", blocks, freeze, None, "vision_model.head.mlp", _one_query, True)


def _one_query(out: Float[Tensor, "b 1 e"]) -> Float[Tensor, "b e"]:
    return out[:, 0].float()


def clip_text_readout(model: Any) -> Readout:
    """The readout of ``model.text_model`` at the token that it pools: CLIP's end of text, or SigLIP's last.

    Raises:
        NoExactSum: an encoder of BERT's kind.
    """
    text = model.text_model
    if not hasattr(text, "final_layer_norm"):
        raise NoExactSum(
            f"the text tower is a {type(text).__name__} of Hugging Face: its LayerNorms stand in the residual stream, so its "
            "embedding is no sum of direct contributions; take a CLIP or a SigLIP"
        )
    blocks, norm = _blocks(text, "text"), text.final_layer_norm
    check_norm(norm, "the text tower's final norm")
    last = hasattr(text, "head")
    matrix, bias = matrix_of(text.head if last else model.text_projection)
    positions = _last if last else end_of_text(getattr(text, "eos_token_id", 2))
    return Readout("text", blocks, one_token(norm, matrix, bias), positions)


def end_of_text(eos: int) -> Positions:
    """The position that CLIP pools: the first ``eos``; the highest token for configurations that say 2, as they did before
    transformers 4.33."""

    def positions(tokens: Tensor) -> Int[Tensor, " b"]:
        return tokens.argmax(-1) if eos == 2 else (tokens == eos).int().argmax(-1)

    return positions


def _last(tokens: Tensor) -> Int[Tensor, " b"]:
    return tokens.new_full((len(tokens),), tokens.shape[1] - 1)


def _blocks(tower: Any, name: str) -> list[LayerWeights]:
    layers = list(encoder_layers(tower)) if hasattr(tower, "encoder") else []
    odd = sorted({type(layer).__name__ for layer in layers if not is_encoder_layer(layer)})
    if odd or not layers or any(hasattr(layer, "message_attn") for layer in layers):
        raise NoExactSum(
            f"the {name} tower is a {type(tower).__name__}: expected a stack of layers that add to one stream of tokens, "
            "got another structure, so its embedding is no sum of direct contributions; take a CLIP or a SigLIP"
        )
    return [encoder_weights(layer) for layer in layers]
