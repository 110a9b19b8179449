"""Costs of the calls that studies make, each counted once on the model without weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal
from warnings import catch_warnings, simplefilter

import torch

from mmhooks.models.blueprints import (
    Painter,
    classifier_blueprint,
    clip_blueprint,
    llava_blueprint,
    painter_blueprint,
)
from mmhooks.models.clip.model import HookedCLIP
from mmhooks.models.cost import Cost, cost_of

META = torch.device("meta")
PROMPT_TOKENS = 48  # of a request in LLaVA's template, the picture's own tokens apart


@cache
def _clip(name: str, dtype: torch.dtype) -> Any:
    return clip_blueprint(name, dtype)


@cache
def _hooked(name: str, dtype: torch.dtype) -> Any:
    return HookedCLIP(
        clip_blueprint(name, dtype)
    )  # a model of its own, whose hooks cost no other count anything


@cache
def _painter(source: str, dtype: torch.dtype) -> Painter:
    return painter_blueprint(source, dtype)


@cache
def _llava(source: str, dtype: torch.dtype | None) -> Any:
    return llava_blueprint(source, dtype)


def embed_dim(name: str) -> int:
    """Returns the width of a CLIP's joint space."""
    model = _clip(name, torch.float32)
    with torch.no_grad():
        return model.encode_image(_pixels(model, 1, torch.float32)).shape[1]


def image_cost(name: str, batch: int, dtype: torch.dtype) -> Cost:
    """Returns the cost of encoding a batch of images with a CLIP."""
    model = _clip(name, dtype)
    with torch.no_grad():
        return cost_of(lambda: model.encode_image(_pixels(model, batch, dtype)), model.visual)


def text_cost(name: str, batch: int, dtype: torch.dtype) -> Cost:
    """Returns the cost of encoding a batch of texts with a CLIP, padded to its context as its tokenizer does."""
    model = _clip(name, dtype)
    tokens = torch.zeros(batch, model.context_length, dtype=torch.long, device=META)
    visual = {id(p) for p in model.visual.parameters()}
    weights = sum(p.nbytes for p in model.parameters() if id(p) not in visual)
    with torch.no_grad():
        found = cost_of(lambda: model.encode_text(tokens))
    return replace(found, weights=weights)


def vit_b16_cost(batch: int, dtype: torch.dtype) -> Cost:
    """Returns the cost of a batch through ViT-B/16-224, which measures how similar images are."""
    from transformers import ViTConfig, ViTModel

    with META:
        model: Any = ViTModel(ViTConfig())  # transformers' defaults are this model
    model.to(dtype).eval()
    with torch.no_grad():
        return cost_of(lambda: model(torch.zeros(batch, 3, 224, 224, dtype=dtype, device=META)), model)


def pixel_gradient_cost(name: str, batch: int, dtype: torch.dtype) -> Cost:
    """Returns the cost of one step on the pixels of a batch: forward, and backward to the pixels alone."""
    model = _clip(name, dtype).requires_grad_(False)
    pixels = _pixels(model, batch, dtype).requires_grad_()
    return cost_of(lambda: model.encode_image(pixels).sum().backward(), model.visual)


@dataclass(frozen=True)
class ImageTower:
    """Blocks and attention heads of an image tower, and whether its embedding is read from one token."""

    depth: int
    heads: int
    one_token: bool


def image_tower(name: str) -> ImageTower:
    """Returns the shape of a CLIP's image tower."""
    readout = _hooked(name, torch.float32).readout("image")
    return ImageTower(len(readout.blocks), readout.n_heads, readout.positions is not None)


def decomposition_cost(name: str, batch: int, dtype: torch.dtype, *, class_token: bool = False) -> Cost:
    """Returns the cost of decomposing the embeddings of a batch of images into their direct contributions."""
    from mmhooks.analysis.decomposition.contributions import decompose_batch

    hooked = _hooked(name, dtype)
    pixels = _pixels(hooked.model, batch, dtype)
    with torch.no_grad():
        return cost_of(lambda: decompose_batch(hooked, pixels, class_token=class_token), hooked.model.visual)


def neuron_cost(name: str, batch: int, dtype: torch.dtype, layer: int) -> Cost:
    """Returns the cost of the second-order effects of all neurons of a layer on a batch of images."""
    from mmhooks.analysis.decomposition.neuron_effects import neuron_paths

    hooked = _hooked(name, dtype)
    pixels = _pixels(hooked.model, batch, dtype)
    with torch.no_grad():
        paths = neuron_paths(hooked, layer, None)
        return cost_of(lambda: paths.reach(pixels), hooked.model.visual)


def saliency_costs(name: str, batch: int, dtype: torch.dtype) -> dict[str, Cost]:
    """Returns by method the cost of the heat maps of a batch of images, those of the backward pass included."""
    from mmhooks.analysis.attribution.saliency import METHODS

    hooked = _hooked(name, dtype)
    pixels = _pixels(hooked.model, batch, dtype)
    along = torch.zeros(batch, embed_dim(name), device=META)
    with torch.enable_grad():
        return {
            method: cost_of(lambda run=run: run(hooked, pixels, along), hooked.model.visual)
            for method, run in METHODS.items()
        }


def classifier_cost(source: str, batch: int, dtype: torch.dtype) -> Cost:
    """Returns the cost of labelling a batch of images with an image classifier of ``transformers``."""
    model = classifier_blueprint(source, dtype)
    side = model.config.image_size
    with torch.no_grad():
        return cost_of(lambda: model(torch.zeros(batch, 3, side, side, dtype=dtype, device=META)), model)


def head_cost(kind: Literal["sae", "ncl"], width: int, features: int, k: int) -> tuple[Cost, int]:
    """Returns the cost of one training step of a head, and how many pairs a step takes."""
    import mmhooks as mm
    from mmhooks.heads.training.ncl_objective import NCLObjective
    from mmhooks.heads.training.sae_objective import SAEObjective

    head: Any = (
        (mm.TopKSAE(width, features, k) if kind == "sae" else mm.NCL(width, features)).to(META).train()
    )
    objective: Any = SAEObjective() if kind == "sae" else NCLObjective()
    batch = objective.default_batch_size
    image, text = torch.zeros(2, batch, width, device=META)
    dead = torch.zeros(
        features, dtype=torch.bool
    )  # a step revives dead features: a small part, and not in every step
    return cost_of(lambda: objective.loss(head, image, text, dead).loss.backward(), head), batch


def condition_width(source: str, dtype: torch.dtype) -> int:
    """Returns the width of a pipeline's text conditioning."""
    return _painter(source, dtype).unet.config.cross_attention_dim


def condition_cost(source: str, batch: int, dtype: torch.dtype) -> Cost:
    """Returns the cost of encoding a batch of prompts with a pipeline's text encoder."""
    encoder = _painter(source, dtype).text_encoder
    length = encoder.config.max_position_embeddings
    tokens = torch.zeros(batch, length, dtype=torch.long, device=META)
    with torch.no_grad():
        return cost_of(lambda: encoder(input_ids=tokens), encoder)


def denoising_cost(source: str, batch: int, dtype: torch.dtype, *, guided: bool) -> Cost:
    """Returns the cost of one denoising step of a batch of images: twice as many latents with guidance."""
    painter = _painter(source, dtype)
    unet, rows = painter.unet, batch * (2 if guided else 1)
    latents = torch.zeros(rows, unet.config.in_channels, painter.side, painter.side, dtype=dtype, device=META)
    length = painter.text_encoder.config.max_position_embeddings
    texts = torch.zeros(rows, length, unet.config.cross_attention_dim, dtype=dtype, device=META)
    with torch.no_grad():
        return cost_of(lambda: unet(latents, torch.zeros((), device=META), texts), unet)


def decoding_cost(source: str, batch: int, dtype: torch.dtype) -> Cost:
    """Returns the cost of turning a batch of latents into images."""
    painter = _painter(source, dtype)
    vae = painter.vae
    latents = torch.zeros(
        batch, vae.config.latent_channels, painter.side, painter.side, dtype=dtype, device=META
    )
    with torch.no_grad():
        return cost_of(lambda: vae.decode(latents), vae)


def answer_costs(
    source: str, batch: int, dtype: torch.dtype | None, new_tokens: int
) -> tuple[Cost, Cost, str]:
    """Returns the costs of reading a batch of pictures and requests, and of one new token, half-way through an answer,
    for each of the batch; and the type that the model computes in."""
    from transformers.utils import logging

    model = _llava(source, dtype)
    core, kind = model.model, model.dtype
    plan = model.config.vision_config
    pictures = torch.zeros(batch, 3, plan.image_size, plan.image_size, dtype=kind, device=META)

    def read(length: int) -> Any:
        text = torch.zeros(batch, length, model.config.text_config.hidden_size, dtype=kind, device=META)
        out = core.language_model(inputs_embeds=text, use_cache=True)
        model.lm_head(out.last_hidden_state[:, -1:])
        return out.past_key_values

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with torch.no_grad(), catch_warnings():
            simplefilter("ignore", FutureWarning)  # past_key_values gets another name in transformers 5.40
            prompt = model.config.image_seq_length + PROMPT_TOKENS
            reading = cost_of(lambda: (core.get_image_features(pixel_values=pictures), read(prompt)), model)
            cache = read(prompt + new_tokens // 2)
            kept = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))

            def one() -> None:
                token = torch.zeros(batch, 1, model.config.text_config.hidden_size, dtype=kind, device=META)
                out = core.language_model(inputs_embeds=token, past_key_values=cache, use_cache=True)
                model.lm_head(out.last_hidden_state)

            # A new token does not read the image tower.
            writing = cost_of(one, core.language_model, model.lm_head, inputs=kept)
    finally:
        logging.set_verbosity(level)
    return reading, writing, str(kind).removeprefix("torch.")


def _pixels(model: Any, batch: int, dtype: torch.dtype) -> torch.Tensor:
    side = model.visual.image_size
    height, width = side if isinstance(side, tuple) else (side, side)
    return torch.zeros(batch, 3, height, width, dtype=dtype, device=META)
