"""HookedVision: an encoder of images or of videos alone, unconverted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmhooks.errors import MMHooksError
from mmhooks.hooks.cache import ActivationCache
from mmhooks.hooks.selection import Tokens
from mmhooks.hooks.sites import Pattern
from mmhooks.models.hooked import HookedModel
from mmhooks.models.vision.encoders import vision_encoder_of


class HookedVision(HookedModel):
    """A vision encoder with named sites ``image.*``, or ``video.*``, hooks and heads.

    ``image.embed`` is the model's own pooled output: what its classifier reads (timm, torchvision), its
    ``pooler_output`` or its projection (transformers).

    Args:
        model: a network of timm, a vision model of transformers (ViT, DINOv2, DINOv3, CLIP's, SigLIP's) or torchvision's
            ViT, or a video model of transformers (V-JEPA 2, VideoMAE), with or without a classifier; available unchanged at
            ``.model``.
        preprocess: an image to pixels ``[3 h w]``, a video to ``[frame 3 h w]``.
        name: for messages and manifests.

    Raises:
        MMHooksError: another model.

    >>> import torch, timm, mmhooks as mm
    >>> model = mm.HookedVision(timm.create_model("test_vit", num_classes=0).eval())
    >>> model.encode_image(torch.randn(2, 3, 160, 160)).shape
    torch.Size([2, 64])
    """

    def __init__(
        self, model: nn.Module, preprocess: Callable[..., Any] | None = None, *, name: str = ""
    ) -> None:
        family = vision_encoder_of(model)
        if family is None:
            raise MMHooksError(
                f"HookedVision: expected a vision encoder of timm, transformers or torchvision, got {type(model).__name__}; "
                "mm.hook(model) picks the class that fits, mm.HookedModel(model) takes any module"
            )
        super().__init__(model, family.sites(model), name=name)
        self.family, self.preprocess = family, preprocess

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Height and width of the images that the model reads; None if it accepts several."""
        return self.family.image_size(self.model)

    def forward(self, images: Float[Tensor, "b ..."]) -> Any:
        """The model's own forward."""
        return self.model(images)

    def encode_image(self, pixels: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        """What flows at ``image.embed`` in a run of the model, after the edits of open contexts."""
        return self._encode("image", pixels)

    def encode_video(self, frames: Float[Tensor, "b f c h w"]) -> Float[Tensor, "b d"]:
        """What flows at ``video.embed`` in a run of the encoder, of V-JEPA 2 without its predictor."""
        return self._encode("video", frames)

    def _encode(self, medium: str, inputs: Tensor) -> Tensor:
        if medium != self.family.medium:
            raise MMHooksError(
                f"expected an input of the tower {self.family.medium} of {type(self.model).__name__}, got one of {medium}; call "
                f"encode_{self.family.medium}"
            )
        with self.caching(f"{medium}.embed", detach=False, strict=False) as cache:
            self.family.encode(self.model, inputs)
        return cache[f"{medium}.embed"]

    def run_with_cache(
        self,
        images: Float[Tensor, "b ..."],
        sites: Pattern | Sequence[Pattern] = "*",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        detach: bool = True,
        tokens: Tokens = None,
        strict: bool = True,
    ) -> tuple[Any, ActivationCache]:
        """The model's own output and the activations at ``sites``, all canonical ones by default.

        Args:
            device, dtype, detach, tokens, strict: as in :meth:`caching`.

        Raises:
            UnknownSite: a name that no site has.
        """
        options = {"device": device, "dtype": dtype, "detach": detach, "tokens": tokens, "strict": strict}
        return self._run_cached(lambda: self.forward(images), sites, options)
