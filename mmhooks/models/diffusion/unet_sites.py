"""Sites of the cross-attention of a diffusers U-Net: ``q, k, v, pattern, z, out`` of every transformer block.

The processor's own code runs; a torch function mode intercepts the calls that make up attention: one
``scaled_dot_product_attention``, or ``baddbmm``, softmax and ``bmm``. So reading changes no bit: of a fused attention
the pattern is computed beside it, and takes its place only where it was edited.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from mmhooks.errors import MMHooksError
from mmhooks.hooks.attention import attend, by_token
from mmhooks.hooks.intercept import Call, Intercepted
from mmhooks.hooks.sites import Site, SiteMap
from mmhooks.hooks.taps import Emit

LEAVES = ("q", "k", "v", "pattern", "z")
# Those that diffusers installs by itself, with projections fused or not.
PROCESSORS = ("AttnProcessor2_0", "AttnProcessor", "FusedAttnProcessor2_0")
_LAYOUT = {
    "q": "batch pixel head d_head",
    "k": "batch token head d_head",
    "v": "batch token head d_head",
    "pattern": "batch head pixel token",
    "z": "batch pixel head d_head",
}


def add_cross_attention(sites: SiteMap, tower: str, unet: nn.Module) -> list[str]:
    """``<tower>.<block>.cross.*`` for every transformer block of ``unet``; returns the blocks' names."""
    blocks = []
    for path, module in unet.named_modules():
        cross = getattr(module, "attn2", None)
        if isinstance(cross, nn.Module) and getattr(cross, "is_cross_attention", False):
            blocks.append(f"{tower}.{path}")
            tap = CrossAttention(cross, f"{blocks[-1]}.cross")
            for leaf in LEAVES:
                heads, tokens = (-3, 2) if leaf == "pattern" else (-2, 1)
                sites.add(Site(f"{blocks[-1]}.cross.{leaf}", tap, leaf, heads, tokens, _LAYOUT[leaf]))
            sites.add(Site(f"{blocks[-1]}.cross.out", sites.output(cross), layout="batch pixel d"))
    return blocks


class CrossAttention(Intercepted):
    """Intermediate values of one ``diffusers.Attention`` with any of the default processors."""

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__(module, LEAVES, _watch_calls)
        self.name = name

    def install(self) -> None:
        self._check()
        super().install()

    def _call(
        self, module: nn.Module, emit: Emit, want: Any, original: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        self._check()  # it may have been replaced meanwhile
        return super()._call(module, emit, want, original, args, kwargs)

    def _check(self) -> None:
        processor = type(getattr(self.owner, "processor", None)).__name__
        if processor not in PROCESSORS:
            raise MMHooksError(
                f"{self.name}.* is there under {', '.join(PROCESSORS)}, this block runs {processor}; "
                "unet.set_default_attn_processor() restores the default one"
            )


def _watch_calls(module: Any, emit: Emit, want: Mapping[str, Any], args: Any, kwargs: Any) -> Call:
    heads = module.heads

    def by_head(leaf: str, folded: Tensor) -> Tensor:
        """``[b*h l e]``, as in the classic processor, emitted by head and converted back."""
        if leaf not in want:
            return folded
        layout = "b head l e" if leaf == "pattern" else "b l head e"
        shown = rearrange(folded, f"(b head) l e -> {layout}", head=heads)
        return _unchanged_or(
            emit(leaf, shown), shown, folded, lambda t: rearrange(t, f"{layout} -> (b head) l e")
        )

    def call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is F.scaled_dot_product_attention:
            return by_token(emit, want, "z", attend(emit, want, *args, **kwargs)[0])
        if func is torch.baddbmm:
            start, query, key = args
            key = by_head("k", key.transpose(-1, -2)).transpose(-1, -2) if "k" in want else key
            return func(start, by_head("q", query), key, **kwargs)
        if func is torch.bmm:
            pattern, value = args
            return by_head("z", func(by_head("pattern", pattern), by_head("v", value), **kwargs))
        return func(*args, **kwargs)

    return call


def _unchanged_or(new: Tensor, shown: Tensor, original: Tensor, back: Callable[[Tensor], Tensor]) -> Tensor:
    """The original tensor if nothing was changed, which preserves its memory layout."""
    if new is shown and not new.requires_grad:
        return original
    return back(new)
