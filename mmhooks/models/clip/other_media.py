"""Dual encoders of transformers with other towers: ALIGN's EfficientNet, CLAP's audio, X-CLIP's video."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mmhooks.errors import NoExactSum
from mmhooks.hooks.output_field import OutputField
from mmhooks.hooks.sites import Site, SiteMap, View
from mmhooks.models.clip.readout import Readout
from mmhooks.models.clip.transformers_encoders import TransformersCLIP, mask_of, pooler_output
from mmhooks.models.clip.transformers_readout import clip_text_readout
from mmhooks.models.layers.feature_map_block import add_feature_map_block, map_site
from mmhooks.models.layers.swin_layer import add_swin_layer
from mmhooks.models.layers.transformers_layer import add_transformers_layers
from mmhooks.models.towers.transformers_tower import (
    add_embed_as_pooled,
    add_projection,
    add_vision_tower,
)


def _flat(raw: Tensor) -> Tensor:
    return raw.flatten(1)


def _unflat(raw: Tensor, new: Tensor) -> Tensor:
    return new.reshape(raw.shape)


class Align(TransformersCLIP):
    """ALIGN: an EfficientNet without a projection, and a BERT with one."""

    model_types = ("align",)

    def image_size(self, model: Any) -> tuple[int, int] | None:
        return None

    def readout(self, model: Any, tower: str) -> Readout:
        return _text_only(model, tower, "an EfficientNet: convolutions, no residual stream of tokens")

    def _add_medium(self, sites: SiteMap, model: Any) -> None:
        vision = model.vision_model
        sites.add(map_site("image.patches", sites.output(vision.embeddings)))
        for n, block in enumerate(vision.encoder.blocks):
            add_feature_map_block(sites, f"image.blocks.{n}", block)
        tap = sites.output(vision.pooler)
        sites.add(Site("image.pooled", tap, tokens=None, layout="batch d", view=View(_flat, _unflat)))
        add_embed_as_pooled(sites, "image")


class Clap(TransformersCLIP):
    """CLAP: features of a sound ``[b channel time frequency]``, as its processor makes them, and texts.

    The model's own ``get_audio_features`` normalises; embeddings here are what its projections give, ``normalize=True``
    those of the model.
    """

    medium = "audio"
    model_types = ("clap",)

    def tower(self, model: Any) -> nn.Module:
        return model.audio_model

    def logit_scale(self, model: Any) -> Tensor:
        """That of sounds to texts."""
        return model.logit_scale_a

    def image_size(self, model: Any) -> tuple[int, int] | None:
        return None

    def preprocess_of(self, model: Any, processor: Any) -> Any:
        return None  # sounds have a rate, so the processor is called by the user

    def readout(self, model: Any, tower: str) -> Readout:
        return _text_only(model, tower, "a Swin: windows and merged patches, no one residual stream")

    def _add_medium(self, sites: SiteMap, model: Any) -> None:
        encoder = model.audio_model.audio_encoder
        sites.add(Site("audio.patches", sites.output(encoder.patch_embed), layout="batch patch d"))
        for n, layer in enumerate(layer for stage in encoder.layers for layer in stage.blocks):
            add_swin_layer(sites, f"audio.blocks.{n}", layer)
        sites.add(Site("audio.ln_post", sites.output(encoder.norm), layout="batch token d"))
        add_projection(sites, "audio", model.audio_projection)
        sites.widths["audio.embed"] = model.audio_projection.linear2.out_features

    def _add_text(self, sites: SiteMap, model: Any) -> None:
        super()._add_text(sites, model)
        sites.widths["text.embed"] = model.text_projection.linear2.out_features

    def _medium(self, model: Any, inputs: Tensor) -> Tensor:
        # A fused model's processor repeats one channel where a sound is short, and gives four parts where it is long.
        longer = (inputs[:, :1] != inputs).flatten(1).any(1, keepdim=True)
        return model.audio_projection(model.audio_model(inputs, is_longer=longer).pooler_output)

    def _text(self, model: Any, tokens: Tensor) -> Tensor:
        output = model.text_model(input_ids=tokens, attention_mask=mask_of(model, tokens))
        return model.text_projection(output.pooler_output)


class XClip(TransformersCLIP):
    """X-CLIP: frames ``[b frame 3 h w]`` through a CLIP whose layers pass messages between frames, and a transformer over
    the frames (``video.mit.blocks.N``). Sites of the frames' tower have one row a frame.

    Texts are embedded without the prompt that X-CLIP's ``forward`` adds for each video.
    """

    medium = "video"
    model_types = ("xclip",)

    def readout(self, model: Any, tower: str) -> Readout:
        return _text_only(
            model, tower, "X-CLIP's: layers mix frames by messages, and a second transformer follows"
        )

    def _add_medium(self, sites: SiteMap, model: Any) -> None:
        add_vision_tower(sites, "video", model.vision_model)
        projection = model.visual_projection
        sites.add(Site("video.frames", sites.output(projection), tokens=None, layout="batch·frame d"))
        add_transformers_layers(sites, "video.mit", model.mit.encoder.layers)
        tap = OutputField(model.mit, "pooler_output")
        sites.add(Site("video.embed", tap, tokens=None, layout="batch d"))
        sites.widths["video.embed"] = projection.out_features

    def _medium(self, model: Any, inputs: Tensor) -> Tensor:
        return pooler_output(model.get_video_features(pixel_values=inputs))


def _text_only(model: Any, tower: str, why: str) -> Readout:
    if tower == "text":
        return clip_text_readout(model)
    raise NoExactSum(f"the {tower} tower is {why}, so its embedding is no sum of direct contributions")
