"""A layer of transformers, of whichever kind it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from mmhooks.hooks.sites import SiteMap
from mmhooks.models.layers.bert_layer import add_bert_layer, is_bert_layer
from mmhooks.models.layers.decoder_layer import add_decoder_layer, is_decoder_layer
from mmhooks.models.layers.encoder_layer import add_encoder_layer, is_encoder_layer
from mmhooks.models.layers.leaves import add_site
from mmhooks.models.layers.m2m100_layer import add_m2m100_layer, is_m2m100_layer
from mmhooks.models.layers.t5_layer import add_t5_layer, is_t5_layer
from mmhooks.models.layers.videomae_layer import add_videomae_layer, is_videomae_layer

Is, Add = Callable[[Any], bool], Callable[[SiteMap, str, Any], None]
KINDS: tuple[tuple[Is, Add], ...] = (
    (is_bert_layer, add_bert_layer),
    (is_decoder_layer, add_decoder_layer),
    (is_m2m100_layer, add_m2m100_layer),
    (is_t5_layer, add_t5_layer),
    (is_videomae_layer, add_videomae_layer),
    (is_encoder_layer, add_encoder_layer),
)


def add_transformers_layers(sites: SiteMap, tower: str, layers: Iterable[Any]) -> None:
    """The sites of all layers of a tower, under ``<tower>.blocks.N``."""
    for n, layer in enumerate(layers):
        add_transformers_layer(sites, f"{tower}.blocks.{n}", layer)


def add_transformers_layer(sites: SiteMap, prefix: str, layer: Any) -> None:
    """The sites of one layer; of an unknown kind, only where the residual stream enters and leaves it."""
    for is_kind, add in KINDS:
        if is_kind(layer):
            add(sites, prefix, layer)
            return
    add_site(sites, f"{prefix}.resid_pre", sites.input(layer, "hidden_states"))
    add_site(sites, f"{prefix}.resid_post", sites.output(layer, first=True))
