"""nnsight view of a hooked model: traces in which our site names are available."""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from nnsight import NNsight
from torch import Tensor, nn

from mmhooks.errors import MMHooksError, ShapeMismatch
from mmhooks.models.interop.tree import Hooked, flowing, plant


class _Tree(nn.Module):
    """Runs the hooked model with every point in the flow."""

    hooked: Any
    _points: Any

    def __init__(self, hooked: Hooked, names: list[str]) -> None:
        super().__init__()
        object.__setattr__(self, "hooked", hooked)
        object.__setattr__(self, "_points", plant(self, names, nn.Identity))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with flowing(self.hooked, self._points, lambda point: True):
            return self.hooked.forward(*args, **kwargs)


class SiteView(NNsight):
    """What :meth:`HookedModel.as_nnsight` returns. Several ``tracer.invoke(...)`` of a trace run as one batch."""

    def _batch_size(self, *inputs: Any, **kwargs: Any) -> int:
        """Number of rows of an invoke; 0 without input."""
        tensors = [value for value in (*inputs, *kwargs.values()) if isinstance(value, Tensor)]
        return len(tensors[0]) if tensors else int(bool(inputs))

    def _batch(self, invokes: list[tuple[Any, Any]], fn: Any) -> tuple[Any, Any]:
        """Concatenates the invokes' inputs.

        Raises:
            MMHooksError: invokes of different inputs, or of anything but tensors.
            ShapeMismatch: images and texts of one invoke that differ in number: its rows are the same in both towers.
        """
        if len(invokes) < 2:
            return super()._batch(invokes, fn)
        takes = signature(self._module.hooked.forward)  # type: ignore[union-attr]
        given = [
            {k: v for k, v in takes.bind(*args, **kwargs).arguments.items() if v is not None}
            for args, kwargs in invokes
        ]
        kinds = [tuple(one) for one in given]
        if len(set(kinds)) > 1 or not all(isinstance(v, Tensor) for one in given for v in one.values()):
            raise MMHooksError(
                "the invokes of one trace run as one batch: expected the same inputs in each, all of them tensors, got "
                f"{'; '.join(', '.join(f'{k} ({type(v).__name__})' for k, v in one.items()) for one in given)}; "
                "use a trace for each"
            )
        for one in given:
            if len({len(v) for v in one.values()}) > 1:
                raise ShapeMismatch(
                    "an invoke beside others has one row for each of its inputs, got "
                    f"{', '.join(f'{len(v)} {k}' for k, v in one.items())}; use a trace for each"
                )
        return (), {name: torch.cat([one[name] for one in given]) for name in given[0]}


def nnsight_view(hooked: Hooked, sites: Any) -> SiteView:
    """``NNsight`` over the site tree: ``view.image.blocks[0].attn.z.output`` inside ``with view.trace(...)``."""
    patterns: Any = [sites] if isinstance(sites, str) or callable(sites) else list(sites)
    names = dict.fromkeys(name for pattern in patterns for name in hooked.sites(pattern))
    return SiteView(_Tree(hooked, list(names)))
