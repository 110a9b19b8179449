"""TransformerLens over a hooked model: the same weights, our sites as its HookPoints."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformer_lens import HookedRootModule
from transformer_lens.hook_points import HookPoint

from mmhooks.models.hooked import HookedModel
from mmhooks.models.interop_tree import flowing, plant


class LensView(HookedRootModule):
    """What :meth:`HookedModel.as_transformer_lens` returns.

    ``run_with_hooks``, ``run_with_cache``, ``add_hook`` and ``hooks`` are TransformerLens's own; they act on
    ``forward(images, texts)``, ``encode_image`` and ``encode_text`` of this view. A HookPoint without hooks costs
    nothing. The view has no parameters of its own: they stay where they are, in ``view.hooked.model``.
    """

    hooked: Any
    _points: Any

    def __init__(self, hooked: HookedModel) -> None:
        super().__init__()
        object.__setattr__(self, "hooked", hooked)  # not as a submodule: setup() writes on those
        object.__setattr__(self, "_points", plant(self, hooked.sites(), HookPoint))
        self.setup()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The hooked model's ``forward``."""
        with flowing(self.hooked, self._points, _has_hooks):
            return self.hooked.forward(*args, **kwargs)

    def encode_image(self, pixels: Tensor, normalize: bool = False) -> Tensor:
        """The hooked model's ``encode_image``."""
        with flowing(self.hooked, self._points, _has_hooks):
            return self.hooked.encode_image(pixels, normalize=normalize)

    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        """The hooked model's ``encode_text``."""
        with flowing(self.hooked, self._points, _has_hooks):
            return self.hooked.encode_text(tokens, normalize=normalize)


def _has_hooks(point: nn.Module) -> bool:
    return bool(
        point._forward_hooks or point._forward_pre_hooks or point._backward_hooks or point._backward_pre_hooks
    )
