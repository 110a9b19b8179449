"""Encoders of transformers: vision towers (CLIP, SigLIP, ViT, DINOv2, DINOv3) and text towers (CLIP, SigLIP, BERT).

A tower of one model is a tower of many: LLaVA's eyes are a CLIP's. The functions here take the encoder's module and the
name that its sites begin with.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from mmhooks.errors import MMHooksError
from mmhooks.hooks.encoder_kinds import ImageTokens
from mmhooks.hooks.sites import Site, SiteMap
from mmhooks.models.layers.leaves import child
from mmhooks.models.layers.transformers_layer import add_transformers_layers
from mmhooks.models.towers.tokens import FIRST_TOKEN, PATCHES

_CLASS_TOKENS = ("class_embedding", "cls_token", "distillation_token")


def add_vision_tower(sites: SiteMap, tower: str, model: Any) -> None:
    """``<tower>.patches`` to ``<tower>.pooled`` of a vision encoder.

    ``pooled`` is what the encoder calls ``pooler_output``; of an encoder without a pooler, its class token.

    Raises:
        MMHooksError: no encoder of this structure.
    """
    add_vision_stack(sites, tower, model)
    norm = final_norm(model)
    assert norm is not None
    pool = child(model, "head", "pooler")
    first = None if pools_before_norm(model) or pool is not None else FIRST_TOKEN
    tap = sites.output(norm if pool is None else pool)
    sites.add(Site(f"{tower}.pooled", tap, tokens=None, layout="batch d", view=first))
    width = getattr(child(pool, "dense"), "out_features", None) or getattr(norm, "normalized_shape", [0])[-1]
    if width:
        sites.widths[f"{tower}.pooled"] = width


def add_vision_stack(sites: SiteMap, tower: str, model: Any) -> None:
    """``<tower>.patches``, the layers and ``<tower>.ln_post`` of a vision encoder whose pooled output nobody reads.

    ``ln_post`` is ``[batch d]`` where the class token is taken before the norm (CLIP), else ``[batch token d]``.

    Raises:
        MMHooksError: no encoder of this structure.
    """
    embeddings, norm = child(model, "embeddings"), final_norm(model)
    patches = child(embeddings, "patch_embedding", "patch_embeddings")
    if patches is None or norm is None:
        raise MMHooksError(
            f"expected a vision encoder of transformers with patch embeddings and a final norm, got "
            f"{type(model).__name__}; hook it with mm.HookedModel(model)"
        )
    layers = encoder_layers(model)
    # X-CLIP's attention sees a message beside the tokens of a frame.
    if child(layers[0], "message_attn") is None:
        sites.tokens[tower] = _image_tokens(embeddings)
    view = PATCHES if _is_convolution(patches) else None
    sites.add(Site(f"{tower}.patches", sites.output(patches), layout="batch patch d", view=view))
    add_transformers_layers(sites, tower, layers)
    if pools_before_norm(model):
        sites.add(Site(f"{tower}.ln_post", sites.output(norm), tokens=None, layout="batch d"))
    else:
        sites.add(Site(f"{tower}.ln_post", sites.output(norm), layout="batch token d"))


def _image_tokens(embeddings: Any) -> ImageTokens:
    """Class tokens, then registers, then patches: the order of all encoders with these parameters."""
    found = {name: getattr(embeddings, name, None) for name in (*_CLASS_TOKENS, "register_tokens")}
    registers = found.pop("register_tokens")
    classes = sum(isinstance(token, nn.Parameter) for token in found.values())
    return ImageTokens(cls=classes, registers=0 if registers is None else registers.shape[-2])


def add_text_tower(sites: SiteMap, tower: str, model: Any) -> None:
    """``<tower>.tokens`` to ``<tower>.ln_final`` of a text encoder; BERT's kind has no final norm."""
    inner = child(model, "roberta") or model  # AltCLIP: a RoBERTa, and a norm and a map after it
    embeddings = child(inner, "embeddings")
    tokens = child(embeddings, "token_embedding", "word_embeddings")
    if tokens is None:
        raise MMHooksError(
            f"expected a text encoder of transformers, got {type(model).__name__} without token embeddings; hook it with "
            "mm.HookedModel(model)"
        )
    sites.add(Site(f"{tower}.tokens", sites.output(tokens), layout="batch token d"))
    add_transformers_layers(sites, tower, encoder_layers(inner))
    norm = child(model, "final_layer_norm", "pre_LN")
    if norm is not None:
        sites.add(Site(f"{tower}.ln_final", sites.output(norm), layout="batch token d"))


def add_projection(sites: SiteMap, tower: str, projection: nn.Module) -> None:
    """``pooled`` and ``embed``: what a projection reads and gives."""
    sites.add(Site(f"{tower}.pooled", sites.input(projection), tokens=None, layout="batch d"))
    sites.add(Site(f"{tower}.embed", sites.output(projection), tokens=None, layout="batch d"))


def add_embed_as_pooled(sites: SiteMap, tower: str) -> None:
    """``embed`` of a tower without a projection: the same place as ``pooled``."""
    sites.add(replace(sites.canonical[f"{tower}.pooled"], name=f"{tower}.embed"))
    if f"{tower}.pooled" in sites.widths:
        sites.widths[f"{tower}.embed"] = sites.widths[f"{tower}.pooled"]


def encoder_layers(model: Any) -> nn.ModuleList:
    """The stack of layers of an encoder, under any of the names it has in transformers.

    Raises:
        MMHooksError: there is none.
    """
    for owner in (getattr(model, "encoder", None), getattr(model, "model", None), model):
        found = child(owner, "layers", "layer")
        if isinstance(found, nn.ModuleList):
            return found
    raise MMHooksError(f"expected an encoder with a list of layers, got {type(model).__name__}")


def _is_convolution(patches: Any) -> bool:
    """Whether it gives a feature map: a convolution, or a stem in its place with a weight of its shape."""
    weight = getattr(patches, "weight", None)
    return isinstance(patches, nn.Conv2d) or (isinstance(weight, Tensor) and weight.dim() == 4)


def final_norm(model: Any) -> nn.Module | None:
    """The norm behind a vision encoder's last layer."""
    return child(model, "post_layernorm", "layernorm", "norm")


def pools_before_norm(model: Any) -> bool:
    """Whether the class token is taken before the final norm: CLIP and its descendants."""
    return child(model, "pre_layrnorm", "pre_layernorm") is not None
