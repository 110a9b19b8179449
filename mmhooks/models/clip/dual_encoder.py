"""What a family of dual encoders says of its models: their towers, entry points, sizes, and how embeddings are read out."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from mmhooks.hooks.sites import SiteMap
from mmhooks.models.clip.readout import Readout, image_readout, text_readout
from mmhooks.models.clip.sites import openclip_sites
from mmhooks.models.processing import preprocess_of


@runtime_checkable
class DualEncoder(Protocol):
    """A family; it holds no model, and its methods take one.

    Attributes:
        medium: the tower beside "text": "image", "audio" or "video".
    """

    @property
    def medium(self) -> str: ...

    def matches(self, model: Any) -> bool:
        """Whether a model is of this family."""
        ...

    def sites(self, model: nn.Module) -> SiteMap: ...

    def tower(self, model: nn.Module) -> nn.Module:
        """The module of the tower beside the text's, whose first layer says the type of its input."""
        ...

    def encode(self, model: nn.Module, tower: str, inputs: Any, normalize: bool) -> Tensor:
        """Embeddings ``[b d]`` by the model's own code, of unit norm if asked."""
        ...

    def logit_scale(self, model: nn.Module) -> Tensor: ...

    def image_size(self, model: nn.Module) -> tuple[int, int] | None:
        """Height and width of the images that it reads; None if it accepts several."""
        ...

    def text_length(self, model: nn.Module) -> int:
        """The number of tokens that texts are padded to."""
        ...

    def preprocess_of(self, model: nn.Module, processor: Any) -> Any:
        """The function from an image (a video, a sound) to the tower's input, of a processor of transformers; None if
        the processor has no part for it.

        Raises:
            MMHooksError: the processor is another model's.
        """
        ...

    def readout(self, model: nn.Module, tower: str) -> Readout:
        """From the residual stream to the embedding.

        Raises:
            NoExactSum: the embedding is no sum of what the layers write; says why.
        """
        ...


class OpenCLIP:
    """open_clip's ``CLIP``, ``CustomTextCLIP`` and ``CoCa``."""

    medium = "image"

    def matches(self, model: Any) -> bool:
        return hasattr(model, "visual") and hasattr(model, "encode_image")

    def sites(self, model: nn.Module) -> SiteMap:
        return openclip_sites(model)

    def tower(self, model: Any) -> nn.Module:
        return model.visual

    def encode(self, model: Any, tower: str, inputs: Any, normalize: bool) -> Tensor:
        return (model.encode_image if tower == "image" else model.encode_text)(inputs, normalize=normalize)

    def logit_scale(self, model: Any) -> Tensor:
        return model.logit_scale

    def image_size(self, model: Any) -> tuple[int, int] | None:
        visual = model.visual
        embed = getattr(getattr(visual, "trunk", None), "patch_embed", None)
        fixed = hasattr(visual, "positional_embedding") or bool(getattr(embed, "strict_img_size", False))
        size = getattr(visual, "image_size", None) if fixed else None
        if size is None:
            return None
        return (int(size), int(size)) if isinstance(size, int) else (int(size[0]), int(size[1]))

    def text_length(self, model: Any) -> int:
        return getattr(model, "text", model).context_length

    def preprocess_of(self, model: Any, processor: Any) -> Any:
        return preprocess_of(processor, self.image_size(model))

    def readout(self, model: nn.Module, tower: str) -> Readout:
        return image_readout(model) if tower == "image" else text_readout(model)
