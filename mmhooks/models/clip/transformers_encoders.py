"""Dual encoders of transformers: CLIP, SigLIP, SigLIP 2, ChineseCLIP, AltCLIP and MetaCLIP 2.

A family is known by ``config.model_type``, so that subclasses and adapted models are found too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmhooks.errors import ShapeMismatch
from mmhooks.hooks.encoder_kinds import TextTokens
from mmhooks.hooks.sites import SiteMap
from mmhooks.models.clip.readout import Readout
from mmhooks.models.clip.transformers_readout import clip_text_readout, vision_readout
from mmhooks.models.processing import preprocess_of
from mmhooks.models.towers.tokens import SIGLIP_END
from mmhooks.models.towers.transformers_tower import (
    add_embed_as_pooled,
    add_projection,
    add_text_tower,
    add_vision_tower,
)

_CAUSAL = ("clip_text_model", "metaclip_2_text_model", "xclip_text_model")
_LENGTH = 77  # of texts of BERT's kind, which could be longer: that of CLIP's


class TransformersCLIP:
    """``vision_model`` and ``text_model``, each with its projection: CLIP, MetaCLIP 2, ChineseCLIP, AltCLIP."""

    medium = "image"
    model_types = ("clip", "metaclip_2", "chinese_clip", "altclip")

    def matches(self, model: Any) -> bool:
        kind = getattr(getattr(model, "config", None), "model_type", None)
        return kind in self.model_types and hasattr(model, "get_text_features")

    def sites(self, model: Any) -> SiteMap:
        sites = SiteMap(model)
        self._add_medium(sites, model)
        self._add_text(sites, model)
        return sites

    def tower(self, model: Any) -> nn.Module:
        return model.vision_model

    def encode(self, model: Any, tower: str, inputs: Any, normalize: bool) -> Tensor:
        embedded = self._text(model, inputs) if tower == "text" else self._medium(model, inputs)
        return F.normalize(embedded, dim=-1) if normalize else embedded

    def logit_scale(self, model: Any) -> Tensor:
        return model.logit_scale

    def image_size(self, model: Any) -> tuple[int, int] | None:
        size = model.config.vision_config.image_size
        return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))

    def text_length(self, model: Any) -> int:
        config = model.config.text_config
        return min(config.max_position_embeddings, _LENGTH if reads_a_mask(config) else 2**31)

    def preprocess_of(self, model: Any, processor: Any) -> Any:
        return preprocess_of(processor, self.image_size(model))

    def readout(self, model: Any, tower: str) -> Readout:
        return vision_readout(model) if tower == "image" else clip_text_readout(model)

    # -- what relatives change -----------------------------------------------------------------------------

    def _add_medium(self, sites: SiteMap, model: Any) -> None:
        add_vision_tower(sites, "image", model.vision_model)
        add_projection(sites, "image", model.visual_projection)

    def _add_text(self, sites: SiteMap, model: Any) -> None:
        sites.tokens["text"] = _text_tokens(model.config.text_config)
        add_text_tower(sites, "text", model.text_model)
        add_projection(sites, "text", model.text_projection)

    def _medium(self, model: Any, inputs: Any) -> Tensor:
        return pooler_output(model.get_image_features(pixel_values=inputs))

    def _text(self, model: Any, tokens: Tensor) -> Tensor:
        return pooler_output(model.get_text_features(input_ids=tokens, attention_mask=mask_of(model, tokens)))


class TransformersSigLIP(TransformersCLIP):
    """SigLIP: images pooled by attention, texts at the last token; no projection of images."""

    model_types = ("siglip",)

    def _add_medium(self, sites: SiteMap, model: Any) -> None:
        add_vision_tower(sites, "image", model.vision_model)
        add_embed_as_pooled(sites, "image")

    def _add_text(self, sites: SiteMap, model: Any) -> None:
        sites.tokens["text"] = TextTokens(SIGLIP_END, pad=0)
        add_text_tower(sites, "text", model.text_model)
        add_projection(sites, "text", model.text_model.head)

    def _text(self, model: Any, tokens: Tensor) -> Tensor:
        # Trained on texts padded to their full length, without a mask.
        return pooler_output(model.get_text_features(input_ids=tokens))


class TransformersSigLIP2(TransformersSigLIP):
    """SigLIP 2 with images of any size: pixels ``[b 3 h w]`` are cut into the patches that its processor makes."""

    model_types = ("siglip2",)

    def image_size(self, model: Any) -> tuple[int, int] | None:
        return None

    def _medium(self, model: Any, inputs: Tensor) -> Tensor:
        patches, shape = as_patches(inputs, model.config.vision_config.patch_size)
        mask = torch.ones(patches.shape[:2], dtype=torch.long, device=patches.device)
        return pooler_output(
            model.get_image_features(pixel_values=patches, pixel_attention_mask=mask, spatial_shapes=shape)
        )


def _text_tokens(text_config: Any) -> TextTokens:
    """Where texts end: at CLIP's end token (the highest for configurations that say 2, as they did before transformers 4.33),
    or in front of the padding that is masked."""
    if text_config.model_type in _CAUSAL:
        eos = text_config.eos_token_id
        return TextTokens("highest" if eos == 2 else eos)
    return TextTokens(pad=text_config.pad_token_id)


def reads_a_mask(text_config: Any) -> bool:
    """Whether padding has to be masked: not for CLIP, whose tokens look back alone and are read before the padding."""
    return text_config.model_type not in _CAUSAL and getattr(text_config, "pad_token_id", None) is not None


def mask_of(model: Any, tokens: Tensor) -> Tensor | None:
    """The attention mask of padded texts; None where there is nothing to mask."""
    config = model.config.text_config
    return (tokens != config.pad_token_id).long() if reads_a_mask(config) else None


def pooler_output(output: Any) -> Tensor:
    """The features of ``get_image_features`` and its like, which returned them bare before transformers 5."""
    return output if isinstance(output, Tensor) else output.pooler_output


def as_patches(pixels: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Pixels ``[b 3 h w]`` as SigLIP 2 takes them: patches ``[b n 3·size²]`` and their grids ``[b 2]``.

    Raises:
        ShapeMismatch: sides that are no multiples of the patch.

    >>> as_patches(torch.zeros(2, 3, 32, 48), 16)[1]
    tensor([[2, 3],
            [2, 3]])
    """
    if pixels.ndim != 4 or pixels.shape[2] % size or pixels.shape[3] % size:
        raise ShapeMismatch(
            f"expected pixels [n 3 h w] with sides that are multiples of {size}, got {list(pixels.shape)}: "
            "model.preprocess(image) brings an image to such a size"
        )
    b, c, h, w = pixels.shape
    cut = pixels.reshape(b, c, h // size, size, w // size, size).permute(0, 2, 4, 3, 5, 1)
    grid = torch.tensor([h // size, w // size], device=pixels.device)
    return cut.reshape(b, -1, size * size * c), grid.expand(b, 2)
