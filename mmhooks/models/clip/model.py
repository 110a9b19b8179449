"""HookedCLIP: a dual encoder of open_clip or transformers, unconverted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmhooks.errors import MMHooksError
from mmhooks.hooks.cache import ActivationCache
from mmhooks.hooks.encoder_kinds import running_texts
from mmhooks.hooks.sites import Pattern
from mmhooks.models.clip.dual_encoder import DualEncoder, OpenCLIP
from mmhooks.models.clip.other_media import Align, Clap, XClip
from mmhooks.models.clip.readout import Readout
from mmhooks.models.clip.transformers_encoders import (
    TransformersCLIP,
    TransformersSigLIP,
    TransformersSigLIP2,
)
from mmhooks.models.hooked import HookedModel
from mmhooks.models.placement import input_dtype, loaded


class CLIPOutput(NamedTuple):
    """Raw embeddings of one run, None for a tower that did not run or that the model lacks."""

    image: Tensor | None
    text: Tensor | None
    audio: Tensor | None = None
    video: Tensor | None = None


FAMILIES: tuple[DualEncoder, ...] = (
    OpenCLIP(),
    TransformersCLIP(),
    TransformersSigLIP(),
    TransformersSigLIP2(),
    Align(),
    Clap(),
    XClip(),
)


def dual_encoder_of(model: Any) -> DualEncoder | None:
    """The family of dual encoders that a model belongs to; None if it belongs to none."""
    return next((family for family in FAMILIES if family.matches(model)), None)


class HookedCLIP(HookedModel):
    """A dual encoder with named sites, hooks and heads.

    Args:
        model: open_clip's ``CLIP``, ``CustomTextCLIP`` or ``CoCa``, or a dual encoder of transformers (``CLIPModel``,
            ``SiglipModel``, ...); available unchanged at ``.model``.
        tokenizer, preprocess: texts to tokens ``[n l]``, and an image to pixels ``[3 h w]``; ``mm.hook(model,
            processor=...)`` makes both of a processor of transformers.
        name: for messages and manifests.
        autocast: run ``encode_image`` and ``encode_text`` under ``torch.autocast`` of this type, as open_clip means
            its precisions ``amp`` and ``amp_bf16``; the weights stay in fp32.

    >>> import torch, mmhooks as mm
    >>> from mmhooks.models.embedded.mini import build
    >>> model = mm.HookedCLIP(build().eval())
    >>> z, cache = model.run_with_cache(torch.randn(2, 3, 64, 64), sites=["image.blocks.*.resid_post"])
    >>> cache.stack("image.blocks.*.resid_post").shape
    torch.Size([6, 2, 65, 192])
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Callable[..., Any] | None = None,
        preprocess: Callable[..., Any] | None = None,
        *,
        name: str = "",
        autocast: torch.dtype | None = None,
    ) -> None:
        family = dual_encoder_of(model)
        if family is None:
            raise MMHooksError(
                f"HookedCLIP: expected a dual encoder of open_clip or transformers, got {type(model).__name__}; "
                "mm.hook(model) picks the class that fits, mm.HookedModel(model) takes any module"
            )
        super().__init__(model, family.sites(model), name=name)
        self.family = family
        self.tokenizer, self.preprocess = tokenizer, preprocess
        self.autocast = autocast

    @property
    def dtype(self) -> torch.dtype:
        """The type of pixels: the image tower's, since texts are integers."""
        return input_dtype(self.family.tower(self.model))

    @property
    def logit_scale(self) -> Tensor:
        """The model's own parameter: the logarithm of the factor on cosine similarities."""
        return self.family.logit_scale(self.model)

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Height and width of the images that the model reads; None if it accepts several."""
        return self.family.image_size(self.model)

    def readout(self, tower: str) -> Readout:
        """How a tower computes its embedding from the residual stream.

        Raises:
            NoExactSum: the embedding is no sum of what the layers write; says why.
        """
        return self.family.readout(self.model, tower)

    def encode_image(self, pixels: Float[Tensor, "b c h w"], normalize: bool = False) -> Float[Tensor, "b d"]:
        """The model's own image embeddings; raw by default."""
        return self._encode("image", pixels, normalize)

    def encode_text(self, tokens: Int[Tensor, "b l"], normalize: bool = False) -> Float[Tensor, "b d"]:
        """The model's own text embeddings; raw by default."""
        with loaded(self.model):
            return self._encode("text", tokens, normalize)

    def encode_audio(
        self, features: Float[Tensor, "b c t f"], normalize: bool = False
    ) -> Float[Tensor, "b d"]:
        """Embeddings of sounds, of CLAP; raw by default."""
        return self._encode("audio", features, normalize)

    def encode_video(
        self, frames: Float[Tensor, "b f c h w"], normalize: bool = False
    ) -> Float[Tensor, "b d"]:
        """Embeddings of videos, of X-CLIP; raw by default."""
        return self._encode("video", frames, normalize)

    def _encode(self, tower: str, inputs: Tensor, normalize: bool) -> Tensor:
        if tower not in ("text", self.family.medium):
            raise MMHooksError(
                f"expected an input of the towers {self.family.medium} and text of {type(self.model).__name__}, got one of "
                f"{tower}; call encode_{self.family.medium}"
            )
        autocast = nullcontext() if self.autocast is None else torch.autocast(self.device.type, self.autocast)
        with autocast, running_texts(inputs) if tower == "text" else nullcontext():
            return self.family.encode(self.model, tower, inputs, normalize)

    def forward(
        self,
        images: Tensor | None = None,
        texts: Tensor | None = None,
        *,
        audio: Tensor | None = None,
        videos: Tensor | None = None,
    ) -> CLIPOutput:
        """Both towers, or the one that has an input."""
        given = {"image": images, "text": texts, "audio": audio, "video": videos}
        encode = {
            "image": self.encode_image,
            "text": self.encode_text,
            "audio": self.encode_audio,
            "video": self.encode_video,
        }
        if all(inputs is None for inputs in given.values()):
            raise MMHooksError("expected images [b 3 h w], texts [b l], or both, got neither")
        return CLIPOutput(**{t: None if x is None else encode[t](x) for t, x in given.items()})

    def run_with_cache(
        self,
        images: Tensor | None = None,
        texts: Tensor | None = None,
        sites: Pattern | Sequence[Pattern] = "*",
        *,
        audio: Tensor | None = None,
        videos: Tensor | None = None,
        **options: Any,
    ) -> tuple[CLIPOutput, ActivationCache]:
        """Runs the towers that have an input and caches the activations at ``sites``.

        Args:
            images: pixels ``[b 3 h w]``.
            texts: tokens ``[b l]``.
            audio, videos: features of sounds ``[b c t f]`` (CLAP), frames ``[b f 3 h w]`` (X-CLIP).
            sites: names, globs or predicates (TransformerLens's ``names_filter``); all canonical ones by default.
            options: ``device, dtype, detach, tokens, strict`` of :meth:`caching`.

        Returns:
            ``(CLIPOutput(image, text), cache)``; embeddings are raw, a tower that did not run is None.

        Raises:
            UnknownSite: a name that no site has.
            HookDidNotFire: a name or glob none of whose sites ran, for instance ``text.*`` without texts.
        """
        return self._run_cached(
            lambda: self.forward(images, texts, audio=audio, videos=videos), sites, options
        )
