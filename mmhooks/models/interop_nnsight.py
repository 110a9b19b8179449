"""nnsight over a hooked model: a trace in which our site names are reachable."""

from __future__ import annotations

from typing import Any

from torch import nn

from mmhooks.models.hooked import HookedModel
from mmhooks.models.interop_tree import flowing, plant


class _Tree(nn.Module):
    """Runs the hooked model with every point in the flow."""

    hooked: Any
    _points: Any

    def __init__(self, hooked: HookedModel, names: list[str]) -> None:
        super().__init__()
        object.__setattr__(self, "hooked", hooked)
        object.__setattr__(self, "_points", plant(self, names, nn.Identity))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with flowing(self.hooked, self._points, lambda point: True):
            return self.hooked.forward(*args, **kwargs)


def nnsight_view(hooked: HookedModel, sites: Any) -> Any:
    """``NNsight`` over the site tree: ``view.image.blocks[0].attn.z.output`` inside ``with view.trace(...)``."""
    from nnsight import NNsight

    patterns: Any = [sites] if isinstance(sites, str) or callable(sites) else list(sites)
    names = dict.fromkeys(name for pattern in patterns for name in hooked.sites(pattern))
    return NNsight(_Tree(hooked, list(names)))
