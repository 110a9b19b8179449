"""Where the towers of transformers' video encoders are: V-JEPA 2 and VideoMAE, with or without a classifier."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mmhooks.hooks.encoder_kinds import ImageTokens
from mmhooks.hooks.sites import Site, SiteMap, View
from mmhooks.models.layers.leaves import child
from mmhooks.models.layers.transformers_layer import add_transformers_layers
from mmhooks.models.processing import VideoPreprocess, video_preprocess_of
from mmhooks.models.towers.transformers_tower import add_embed_as_pooled, encoder_layers


def _mean(raw: Tensor) -> Tensor:
    return raw.mean(1)


def _with_mean(raw: Tensor, new: Tensor) -> Tensor:
    return raw + (new - raw.mean(1))[:, None]


MEAN_TOKEN = View(_mean, _with_mean)  # [b t d] as [b d]; another mean moves all tokens alike


class TransformersVideo:
    """V-JEPA 2 and VideoMAE: videos ``[b frame 3 h w]``, tokens of all frames in one sequence.

    ``video.embed`` is what a classifier reads: V-JEPA 2's attentive pooler, VideoMAE's normed mean or its first token. Of an
    encoder without a classifier, which pools nothing, it is the mean of its tokens. V-JEPA 2's predictor does not run in
    ``encode_video``.
    """

    medium = "video"
    model_types = ("vjepa2", "videomae")

    def matches(self, model: Any) -> bool:
        kind = getattr(getattr(model, "config", None), "model_type", None)
        return kind in self.model_types and not hasattr(model, "decoder") and hasattr(model, "base_model")

    def sites(self, model: Any) -> SiteMap:
        sites, inner = SiteMap(model), _encoder(model)
        sites.tokens["video"] = ImageTokens()  # tubes of all frames, no class token
        sites.add(
            Site("video.patches", sites.output(inner.embeddings.patch_embeddings), layout="batch patch d")
        )
        layers = encoder_layers(inner)
        add_transformers_layers(sites, "video", layers)
        norm = child(inner, "layernorm")
        if norm is not None:
            sites.add(Site("video.ln_post", sites.output(norm), layout="batch token d"))
        width = model.config.hidden_size
        sites.widths |= {"video.patches": width, "video.pooled": width}
        pooler, classifier = child(model, "pooler", "fc_norm"), child(model, "classifier")
        if pooler is not None:
            tap, view = sites.output(pooler), None
        elif classifier is not None:
            tap, view = sites.input(classifier), None
        else:
            tap, view = (
                sites.output(layers[-1], first=True) if norm is None else sites.output(norm),
                MEAN_TOKEN,
            )
        sites.add(Site("video.pooled", tap, tokens=None, layout="batch d", view=view))
        add_embed_as_pooled(sites, "video")
        return sites

    def image_size(self, model: Any) -> tuple[int, int]:
        config = model.config
        size = getattr(config, "crop_size", None) or config.image_size
        return (size, size) if isinstance(size, int) else (size[0], size[1])

    def encode(self, model: Any, inputs: Tensor) -> Any:
        # By position: V-JEPA 2 calls its input by another name.
        skips = isinstance(child(model, "predictor"), nn.Module)
        return model(inputs, skip_predictor=True) if skips else model(inputs)

    def preprocess_of(self, model: Any, processor: Any) -> VideoPreprocess | None:
        return video_preprocess_of(processor, self.image_size(model))


def _encoder(model: Any) -> Any:
    """The module with ``embeddings`` and a stack of layers."""
    inner = model.base_model
    return inner if hasattr(inner, "embeddings") else inner.encoder
