"""Where the towers of vision encoders are: timm's networks, transformers' vision and video models, torchvision's ViT."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from mmhooks.hooks.encoder_kinds import ImageTokens
from mmhooks.hooks.sites import Site, SiteMap
from mmhooks.models.layers.leaves import child
from mmhooks.models.layers.torchvision_block import add_torchvision_block
from mmhooks.models.processing import preprocess_of
from mmhooks.models.towers.timm_trunk import add_timm_trunk
from mmhooks.models.towers.tokens import PATCHES
from mmhooks.models.towers.transformers_tower import (
    add_embed_as_pooled,
    add_projection,
    add_vision_tower,
    final_norm,
)
from mmhooks.models.vision.video_encoders import TransformersVideo


@runtime_checkable
class VisionEncoder(Protocol):
    """A family of encoders; it holds no model, and its methods take one.

    Attributes:
        medium: the tower's name: "image" or "video".
    """

    @property
    def medium(self) -> str: ...

    def matches(self, model: Any) -> bool:
        """Whether a model is of this family."""
        ...

    def sites(self, model: nn.Module) -> SiteMap: ...

    def image_size(self, model: nn.Module) -> tuple[int, int] | None:
        """Height and width of the images that it reads; None if it accepts several."""
        ...

    def encode(self, model: nn.Module, inputs: Tensor) -> Any:
        """One run of the model's own code that passes ``<medium>.embed``."""
        ...

    def preprocess_of(self, model: nn.Module, processor: Any) -> Any:
        """The function from an image or a video to the model's input, of a processor of transformers; None: it has none.

        Raises:
            MMHooksError: the processor is another model's.
        """
        ...


class _Images:
    """What families of image encoders have in common."""

    medium = "image"

    def encode(self, model: nn.Module, inputs: Tensor) -> Any:
        return model(inputs)

    def preprocess_of(self, model: nn.Module, processor: Any) -> Any:
        return preprocess_of(processor, self.image_size(model))

    def image_size(self, model: Any) -> tuple[int, int] | None:
        raise NotImplementedError


class Timm(_Images):
    """timm's networks. ``image.embed`` is what the classifier reads, with or without a classifier; of a distilled ViT, which has
    two, the first one: its class token."""

    def matches(self, model: Any) -> bool:
        return all(hasattr(model, name) for name in ("forward_features", "forward_head", "get_classifier"))

    def sites(self, model: Any) -> SiteMap:
        sites = SiteMap(model)
        add_timm_trunk(sites, "image", model)
        classifier = model.get_classifier()
        tap = sites.input(classifier[0] if isinstance(classifier, tuple) else classifier)
        sites.add(Site("image.pooled", tap, tokens=None, layout="batch d"))
        add_embed_as_pooled(sites, "image")
        return sites

    def image_size(self, model: Any) -> tuple[int, int] | None:
        embed = getattr(model, "patch_embed", None)
        return tuple(embed.img_size) if getattr(embed, "strict_img_size", False) else None  # type: ignore


class TransformersVision(_Images):
    """transformers' vision models, with or without a projection or a classifier behind them.

    ``image.embed`` is the projection's output where there is one (``CLIPVisionModelWithProjection``), else the encoder's
    ``pooler_output``; of an encoder without a pooler, its class token after the norm.
    """

    def matches(self, model: Any) -> bool:
        inner = _encoder(model)
        patches = child(getattr(inner, "embeddings", None), "patch_embedding", "patch_embeddings")
        reads_images = getattr(model, "main_input_name", "") == "pixel_values"
        return reads_images and patches is not None and final_norm(inner) is not None

    def sites(self, model: Any) -> SiteMap:
        sites = SiteMap(model)
        add_vision_tower(sites, "image", _encoder(model))
        projection = child(model, "visual_projection")
        if projection is None:
            add_embed_as_pooled(sites, "image")
        else:
            add_projection(sites, "image", projection)
        return sites

    def image_size(self, model: Any) -> tuple[int, int] | None:
        size = getattr(_encoder(model).embeddings, "image_size", None)
        return (size, size) if isinstance(size, int) else None if size is None else (size[0], size[1])


class Torchvision(_Images):
    """torchvision's VisionTransformer."""

    def matches(self, model: Any) -> bool:
        return all(hasattr(model, name) for name in ("conv_proj", "encoder", "heads", "class_token"))

    def sites(self, model: Any) -> SiteMap:
        sites = SiteMap(model)
        sites.tokens["image"] = ImageTokens(cls=1)
        tap = sites.output(model.conv_proj)
        sites.add(Site("image.patches", tap, layout="batch patch d", view=PATCHES))
        for n, block in enumerate(model.encoder.layers):
            add_torchvision_block(sites, f"image.blocks.{n}", block)
        sites.add(Site("image.ln_post", sites.output(model.encoder.ln), layout="batch token d"))
        sites.add(Site("image.pooled", sites.input(model.heads), tokens=None, layout="batch d"))
        sites.widths["image.pooled"] = model.hidden_dim
        add_embed_as_pooled(sites, "image")
        return sites

    def image_size(self, model: Any) -> tuple[int, int] | None:
        return model.image_size, model.image_size


FAMILIES: tuple[VisionEncoder, ...] = (TransformersVideo(), TransformersVision(), Timm(), Torchvision())


def vision_encoder_of(model: Any) -> VisionEncoder | None:
    """The family of vision encoders that a model belongs to; None if it belongs to none."""
    return next((family for family in FAMILIES if family.matches(model)), None)


def _encoder(model: Any) -> Any:
    """The encoder inside a model with a projection or a classifier."""
    return model if hasattr(model, "embeddings") else getattr(model, "base_model", model)
