"""Blocks of convolutional and windowed networks: a feature map goes in and another one comes out."""

from __future__ import annotations

from torch import nn

from mmhooks.hooks.sites import Site, SiteMap, feature_map
from mmhooks.hooks.taps import Tap


def add_feature_map_block(
    sites: SiteMap, prefix: str, block: nn.Module, *, channels_last: bool = False
) -> None:
    """``resid_pre`` and ``resid_post``; there is no stream of tokens inside."""
    for leaf, tap in (("resid_pre", sites.input(block)), ("resid_post", sites.output(block))):
        sites.add(map_site(f"{prefix}.{leaf}", tap, channels_last=channels_last))


def map_site(name: str, tap: Tap, *, channels_last: bool = False) -> Site:
    """A site with a feature map, channels first unless said otherwise (Swin)."""
    if channels_last:
        return Site(name, tap, tokens=None, layout="batch height width channel")
    return feature_map(name, tap)
