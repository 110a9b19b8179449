"""HookedCLIP: any open_clip model with both towers, unconverted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmhooks.errors import MMHooksError
from mmhooks.hooks.cache import ActivationCache
from mmhooks.hooks.sites import Pattern
from mmhooks.models.clip.sites import openclip_sites
from mmhooks.models.hooked import HookedModel
from mmhooks.models.placement import input_dtype, loaded


class CLIPOutput(NamedTuple):
    """Raw embeddings of one run, None for a tower that did not run."""

    image: Tensor | None
    text: Tensor | None


class HookedCLIP(HookedModel):
    """An open_clip model with named sites, hooks and heads.

    Args:
        model: ``CLIP``, ``CustomTextCLIP`` or ``CoCa``; available unchanged at ``.model``.
        tokenizer, preprocess: kept for the user's convenience.
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
        if not hasattr(model, "visual") or not hasattr(model, "encode_image"):
            raise MMHooksError(f"HookedCLIP: expected an open_clip model, got {type(model).__name__}")
        super().__init__(model, openclip_sites(model), name=name)
        self.tokenizer, self.preprocess = tokenizer, preprocess
        self.autocast = autocast

    @property
    def dtype(self) -> torch.dtype:
        """The type of pixels: the image tower's, since texts are integers."""
        return input_dtype(self.model.visual)  # type: ignore[arg-type]

    @property
    def logit_scale(self) -> Tensor:
        """The model's own parameter: the logarithm of the factor on cosine similarities."""
        return self.model.logit_scale  # type: ignore[return-value]

    def encode_image(self, pixels: Float[Tensor, "b c h w"], normalize: bool = False) -> Float[Tensor, "b d"]:
        """The model's own ``encode_image``; raw embeddings by default."""
        with self._precision():
            return self.model.encode_image(pixels, normalize=normalize)  # type: ignore[operator]

    def encode_text(self, tokens: Int[Tensor, "b l"], normalize: bool = False) -> Float[Tensor, "b d"]:
        """The model's own ``encode_text``; raw embeddings by default."""
        with self._precision(), loaded(self.model):
            return self.model.encode_text(tokens, normalize=normalize)  # type: ignore[operator]

    def _precision(self) -> AbstractContextManager[Any]:
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, self.autocast)

    def forward(self, images: Tensor | None = None, texts: Tensor | None = None) -> CLIPOutput:
        """Both towers, or the one that has an input."""
        if images is None and texts is None:
            raise MMHooksError("expected images [b 3 h w], texts [b l], or both, got neither")
        return CLIPOutput(
            None if images is None else self.encode_image(images),
            None if texts is None else self.encode_text(texts),
        )

    def run_with_cache(
        self,
        images: Tensor | None = None,
        texts: Tensor | None = None,
        sites: Pattern | Sequence[Pattern] = "*",
        **options: Any,
    ) -> tuple[CLIPOutput, ActivationCache]:
        """Runs the towers that have an input and caches the activations at ``sites``.

        Args:
            images: pixels ``[b 3 h w]``.
            texts: tokens ``[b l]``.
            sites: names, globs or predicates (TransformerLens's ``names_filter``); all canonical ones by default.
            options: ``device, dtype, detach, tokens, strict`` of :meth:`caching`.

        Returns:
            ``(CLIPOutput(image, text), cache)``; embeddings are raw, a tower that did not run is None.

        Raises:
            UnknownSite: a name that no site has.
            HookDidNotFire: a name or glob none of whose sites ran, for instance ``text.*`` without texts.
        """
        return self._run_cached(lambda: self.forward(images, texts), sites, options)
