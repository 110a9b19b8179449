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
from mmhooks.hooks.intercept import Intercepted, residual_middle
from mmhooks.hooks.sites import Pattern, Site, SiteMap
from mmhooks.models.clip.blocks import add_projected_attention
from mmhooks.models.hooked import HookedModel


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

    def add(name: str, tap: Any, tokens: int | None = 1, layout: str = "batch token d") -> None:
        sites.add(Site(f"{tower}.{name}", tap, tokens=tokens, layout=layout))

    add("tokens", sites.output(inner.embeddings.token_embedding))
    for n, layer in enumerate(inner.encoder.layers):
        _add_layer(sites, f"{tower}.blocks.{n}", layer)
    add("ln_final", sites.output(inner.final_layer_norm))
    projection = getattr(model, "text_projection", None)
    if isinstance(projection, nn.Module):
        add("pooled", sites.input(projection), None, "batch d")
        add("embed", sites.output(projection), None, "batch d")


def _add_layer(sites: SiteMap, prefix: str, layer: Any) -> None:
    def add(name: str, tap: Any, leaf: str = "", layout: str = "batch token d") -> None:
        sites.add(Site(f"{prefix}.{name}", tap, leaf, layout=layout))

    add("resid_pre", sites.input(layer, "hidden_states"))
    add("ln_1", sites.output(layer.layer_norm1))
    attn = layer.self_attn
    add_projected_attention(sites, prefix, attn, attn.num_heads, attn.out_proj)
    add("attn_out", sites.output(layer.self_attn))
    add("resid_mid", Intercepted(layer, ("resid_mid",), residual_middle), "resid_mid")
    add("ln_2", sites.output(layer.layer_norm2))
    add("mlp.pre", sites.output(layer.mlp.fc1), layout="batch token d_mlp")
    add("mlp.post", sites.input(layer.mlp.fc2), layout="batch token d_mlp")
    add("mlp_out", sites.output(layer.mlp))
    add("resid_post", sites.output(layer, first=True))
