"""Insides of foreign modules, seen while their own code runs: no forward is written again.

Attention of timm and of Hugging Face comes in many variants (rotary, relative, gated, normalised). All of
them end in ``scaled_dot_product_attention`` and one linear projection; a block's first addition to what it was
called with is the middle of the residual stream. Inside :class:`Intercepted`, a torch function mode looks at
these calls of the module's own ``forward``; only there, and only where a context asked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from mmhooks.hooks.attention import attend, project
from mmhooks.hooks.taps import Emit, ExplicitForward

Call = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]
_SUMS = (Tensor.__add__, Tensor.add, torch.add)


class _Watch(TorchFunctionMode):
    def __init__(self, call: Call) -> None:
        super().__init__()
        self._call = call

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._call(func, args, kwargs or {})


class Intercepted(ExplicitForward):
    """The module's own ``forward`` with some of its torch calls looked at.

    Args:
        watch: ``watch(module, emit, want, args, kwargs) -> call(func, args, kwargs)``, which makes the calls.
    """

    def _call(
        self, module: nn.Module, emit: Emit, want: Any, original: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        with _Watch(self._explicit(module, emit, want, args, kwargs)):
            return original(*args, **kwargs)


def residual_middle(module: nn.Module, emit: Emit, want: Container[str], args: Any, kwargs: Any) -> Call:
    """``resid_mid``: the first sum of a block that has the block's own input as a term."""
    stream = args[0] if args else next(iter(kwargs.values()))
    done = False

    def call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal done
        out = func(*args, **kwargs)
        if not done and func in _SUMS and any(a is stream for a in args[:2]):
            done = True
            return emit("resid_mid", out)
        return out

    return call


def fused_attention(heads: int, projection: nn.Linear) -> Callable[..., Call]:
    """``q, k, v`` as they enter the scores, ``pattern``, ``z`` as the projection reads it, ``head_out``."""

    def watch(module: nn.Module, emit: Emit, want: Container[str], args: Any, kwargs: Any) -> Call:
        def call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if func is F.scaled_dot_product_attention:
                return _attend(emit, want, *args, **kwargs)
            if func is F.linear and len(args) > 1 and args[1] is projection.weight:
                z = emit("z", args[0].unflatten(-1, (heads, -1)))
                return project(z, projection.weight, projection.bias, emit, want)
            return func(*args, **kwargs)

        return call

    return watch


def _attend(
    emit: Emit,
    want: Container[str],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch's ``scaled_dot_product_attention`` on ``[b h l e]``, with our names in between."""
    q, k, v = (
        t if leaf not in want else emit(leaf, t.transpose(1, 2)).transpose(1, 2)
        for leaf, t in (("q", query), ("k", key), ("v", value))
    )
    if "pattern" not in want:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if enable_gqa:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    mask = attn_mask
    if is_causal:
        mask = q.new_full((q.shape[2], k.shape[2]), float("-inf")).triu(1)
    elif mask is not None and mask.dtype == torch.bool:  # here True keeps
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, float("-inf"))
    z, _ = attend(
        *(t.transpose(1, 2) for t in (q, k, v)),
        emit=lambda leaf, t: emit(leaf, t) if leaf == "pattern" else t,
        want=want,
        mask=mask,
        dropout=dropout_p,
        scale=1 / math.sqrt(q.shape[-1]) if scale is None else scale,
    )
    return z.transpose(1, 2)
