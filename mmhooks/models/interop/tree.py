"""The sites of a hooked model as a tree of identity modules, for toolkits that hook modules.

``image.blocks.3.attn.z`` becomes a child of a child of ...: where another toolkit puts hooks on it, the value
of the site runs through it, inside our context. The tree holds no weights; the model is not part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn


@runtime_checkable
class Hooked(Protocol):
    """What a view needs of the hooked model that it shows."""

    model: nn.Module

    @property
    def device(self) -> torch.device: ...
    def sites(self, pattern: Any = ...) -> list[str]: ...
    def hooks(self, *, fwd_hooks: Any, strict: bool) -> AbstractContextManager[Any]: ...
    def forward(self, *args: Any, **kwargs: Any) -> Any: ...


def plant(root: nn.Module, names: Iterable[str], point: Callable[[], nn.Module]) -> dict[str, nn.Module]:
    """Adds a point for every name below ``root``, which may hold others already; returns name -> point.

    >>> list(plant(nn.Module(), ["image.embed", "image.embed.sae.latents"], nn.Identity))
    ['image.embed', 'image.embed.sae.latents']
    """
    points = {name: point() for name in names}
    branches = {name.rsplit(".", depth)[0] for name in points for depth in range(1, name.count(".") + 1)}
    for name in sorted({*branches, *points}, key=lambda n: n.count(".")):
        parent, _, last = name.rpartition(".")
        owner = root.get_submodule(parent) if parent else root
        there = owner._modules.get(last)
        if there is not None and name not in points:
            continue  # a branch that was planted before
        below = {n[len(name) + 1 :].partition(".")[0] for n in points if n.startswith(name + ".")}
        counts = {str(n) for n in range(len(below))}
        node = points.get(name) or (nn.ModuleList() if below and below == counts else nn.Module())
        for key, child in (there._modules if there is not None else {}).items():
            node.add_module(key, child)
        owner.add_module(last, node)
    return points


@contextmanager
def flowing(
    hooked: Hooked, points: dict[str, nn.Module], wanted: Callable[[nn.Module], bool]
) -> Iterator[None]:
    """Inside, the values of the wanted points' sites run through the points."""

    def through(point: nn.Module) -> Callable[..., Any]:
        def run(value: Tensor, *, hook: Any) -> Tensor:
            return point(value)

        return run

    live = [(name, through(point)) for name, point in points.items() if wanted(point)]
    with hooked.hooks(fwd_hooks=live, strict=False):
        yield
