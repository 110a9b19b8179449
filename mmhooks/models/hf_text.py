"""Hugging Face's CLIP text models: the conditioners of diffusion pipelines, with the names of our text tower.

transformers 5.6 flattened ``CLIPTextModel``; ``CLIPTextModelWithProjection`` and older versions keep the tower at
``.text_model``. Both are resolved here.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmhooks.errors import MMHooksError
from mmhooks.hooks.attention import LEAVES, attend, project
from mmhooks.hooks.cache import ActivationCache
from mmhooks.hooks.sites import Site, SiteMap
from mmhooks.hooks.taps import Emit, ExplicitForward
from mmhooks.models.blocks import add_attention_site
from mmhooks.models.hooked import HookedModel


class HookedCLIPText(HookedModel):
    """``transformers.CLIPTextModel`` or ``CLIPTextModelWithProjection``, hooked in place.

    Same names and rules as the text tower of :class:`~mmhooks.models.clip.HookedCLIP`.
    """

    def __init__(self, model: nn.Module, *, name: str = "") -> None:
        super().__init__(model, clip_text_sites(model), name=name)

    def forward(self, tokens: Tensor, **kwargs: Any) -> Any:
        """The model's own forward."""
        return self.model(input_ids=tokens, **kwargs)

    def run_with_cache(self, tokens: Tensor, sites: Any = "*", **options: Any) -> tuple[Any, ActivationCache]:
        """The model's output and what flowed at ``sites``; ``options`` as in :meth:`caching`."""
        return self._cached(lambda: self.forward(tokens), sites, options)


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
            f"expected a CLIPTextModel or CLIPTextModelWithProjection, came {type(model).__name__}"
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
    explicit = ExplicitForward(layer.self_attn, LEAVES, attention_forward, inexact=LEAVES)
    for leaf in LEAVES:
        add_attention_site(sites, f"{prefix}.attn.{leaf}", explicit, leaf)
    add("attn_out", sites.output(layer.self_attn))
    add("resid_mid", ExplicitForward(layer, ("resid_mid",), layer_forward), "resid_mid")
    add("ln_2", sites.output(layer.layer_norm2))
    add("mlp.pre", sites.output(layer.mlp.fc1), layout="batch token d_mlp")
    add("mlp.post", sites.input(layer.mlp.fc2), layout="batch token d_mlp")
    add("mlp_out", sites.output(layer.mlp))
    add("resid_post", sites.output(layer, first=True))


def layer_forward(
    layer: Any,
    emit: Emit,
    want: Container[str],
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """transformers' CLIPEncoderLayer, operation by operation, with the middle of the residual stream."""
    attended, _ = layer.self_attn(
        hidden_states=layer.layer_norm1(hidden_states), attention_mask=attention_mask, **kwargs
    )
    middle = emit("resid_mid", hidden_states + attended)
    return middle + layer.mlp(layer.layer_norm2(middle))


def attention_forward(
    module: Any,
    emit: Emit,
    want: Container[str],
    hidden_states: Float[Tensor, "b l d"],
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' CLIPAttention with its insides; causal where no mask says otherwise."""
    heads, length = module.num_heads, hidden_states.shape[1]
    projections = module.q_proj, module.k_proj, module.v_proj
    q, k, v = (p(hidden_states).unflatten(-1, (heads, -1)) for p in projections)
    mask = attention_mask
    if mask is None and kwargs.get("is_causal", module.is_causal):
        mask = hidden_states.new_full((length, length), float("-inf")).triu(1)
    elif mask is not None and mask.dtype == torch.bool:  # here True keeps
        mask = torch.zeros_like(mask, dtype=hidden_states.dtype).masked_fill(~mask, float("-inf"))
    dropout = module.dropout if module.training else 0.0
    z, pattern = attend(q, k, v, emit=emit, want=want, mask=mask, dropout=dropout, scale=module.scale)
    return project(z, module.out_proj.weight, module.out_proj.bias, emit, want), pattern
