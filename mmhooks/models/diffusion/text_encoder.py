"""Hugging Face's CLIP text models: the conditioners of diffusion pipelines, with the site names of our text tower.

transformers 5.6 flattened ``CLIPTextModel``; ``CLIPTextModelWithProjection`` and older versions keep the tower at
``.text_model``. Both are resolved here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmhooks.errors import MMHooksError
from mmhooks.hooks.cache import ActivationCache
from mmhooks.hooks.sites import Pattern, SiteMap
from mmhooks.models.hooked import HookedModel
from mmhooks.models.towers.transformers_tower import add_projection, add_text_tower


class HookedCLIPText(HookedModel):
    """``transformers.CLIPTextModel`` or ``CLIPTextModelWithProjection``, hooked in place.

    Same names and rules as the text tower of :class:`~mmhooks.models.clip.model.HookedCLIP`.
    """

    def __init__(self, model: nn.Module, *, name: str = "") -> None:
        super().__init__(model, clip_text_sites(model), name=name)

    def forward(self, tokens: Tensor, **kwargs: Any) -> Any:
        """The model's own forward."""
        return self.model(input_ids=tokens, **kwargs)

    def run_with_cache(
        self,
        tokens: Tensor,
        sites: Pattern | Sequence[Pattern] = "*",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        detach: bool = True,
        strict: bool = True,
        **inputs: Any,
    ) -> tuple[Any, ActivationCache]:
        """The model's output and the activations at ``sites``.

        Args:
            device, dtype, detach, strict: as in :meth:`caching`.
            inputs: further arguments of the model's forward: ``attention_mask``, ``position_ids``, ...
        """
        options = {"device": device, "dtype": dtype, "detach": detach, "strict": strict}
        return self._run_cached(lambda: self.forward(tokens, **inputs), sites, options)


def clip_text_sites(model: nn.Module) -> SiteMap:
    """Site map of a Hugging Face CLIP text model."""
    sites = SiteMap(model)
    add_clip_text(sites, "text", model)
    return sites


def add_clip_text(sites: SiteMap, tower: str, model: nn.Module) -> None:
    """Sites ``<tower>.tokens`` to ``<tower>.ln_final``, and ``pooled`` and ``embed`` where it has a projection."""
    inner: Any = getattr(model, "text_model", model)
    if not hasattr(inner, "final_layer_norm") or not hasattr(inner, "encoder"):
        raise MMHooksError(
            f"expected a CLIPTextModel or CLIPTextModelWithProjection, got {type(model).__name__}"
        )
    add_text_tower(sites, tower, inner)
    projection = getattr(model, "text_projection", None)
    if isinstance(projection, nn.Module):
        add_projection(sites, tower, projection)
