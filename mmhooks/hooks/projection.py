"""An output projection split by attention head: ``z`` is its input, ``head_out`` the contribution of each head.

The matrix of a linear module need not be its ``weight``: LoRA adds to it, quantised layers store codes and scales,
offloaded ones hold nothing between calls. So the matrix is obtained by calling the module on unit vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.compiler import is_compiling

from mmhooks.errors import MMHooksError
from mmhooks.hooks.attention import split_by_head
from mmhooks.hooks.dispatch import programs_at
from mmhooks.hooks.shadow import MARK, Shadow, own_forward
from mmhooks.hooks.sites import View
from mmhooks.hooks.taps import Emit, ExplicitForward

Forward = Callable[..., Tensor]


def heads_view(heads: int) -> View:
    """A view of a projection's input with the attention heads in a separate dimension."""
    return View(_SplitHeads(heads), _merge_heads)


@dataclass(frozen=True)
class _SplitHeads:
    heads: int

    def __call__(self, raw: Tensor) -> Tensor:
        return raw.unflatten(-1, (self.heads, -1))


def _merge_heads(raw: Tensor, value: Tensor) -> Tensor:
    return value.flatten(-2)


def is_plain(module: nn.Module) -> bool:
    """Whether the module's forward is ``x @ module.weight.T + module.bias`` and nothing else."""
    return (
        isinstance(module, nn.Linear)
        and getattr(own_forward(module), "__func__", None) is nn.Linear.forward
        and type(module.weight) in (Tensor, nn.Parameter)  # not a quantised or sharded one
    )


def linear_map(
    module: nn.Module, like: Float[Tensor, "*b e"]
) -> tuple[Float[Tensor, "d e"], Float[Tensor, " d"] | None]:
    """Matrix and bias that a linear module currently applies.

    Args:
        like: an input with the right width, dtype and device.
    """
    if is_plain(module):
        return module.weight, module.bias  # type: ignore[return-value]
    width = like.shape[-1]
    rows = own_forward(module)(
        torch.eye(width + 1, width, dtype=like.dtype, device=like.device)
    )  # the last row is zero
    return (rows[:-1] - rows[-1]).T, rows[-1]


class ProjectionByHead(ExplicitForward):
    """``head_out`` of an output projection that is a called module.

    The module's own forward computes the output unless ``head_out`` was edited. For anything but a plain ``nn.Linear``
    the sum over attention heads is compared with that output, once per input shape and dtype as long as the module's
    parts, their modes and their hooks stay the same. Each comparison synchronises with the device.

    Raises (when it runs):
        MMHooksError: the module is not linear, or a user's hook changes its output; says which module.
    """

    def __init__(self, module: nn.Module, heads: int) -> None:
        super().__init__(module, ("head_out",), _never_called)
        self.heads = heads
        self._checked: set[Hashable] = set()
        self._shadows = (*self._shadows, Shadow("_call_impl", self._with_hooks))

    def _call(
        self, module: nn.Module, emit: Emit, want: Any, original: Forward, args: Any, kwargs: Any
    ) -> Tensor:
        x = args[0]
        with torch.no_grad() if want["head_out"].detached else nullcontext():
            weight, bias = linear_map(module, x)
            parts = split_by_head(x.unflatten(-1, (self.heads, -1)), weight)
            if not is_plain(module):
                self._check(module, parts, bias, args, kwargs)
            edited = emit("head_out", parts)
        if edited is parts and not edited.requires_grad:
            out = original(*args, **kwargs)
        else:
            out = edited.sum(dim=-2)
            out = out if bias is None else out + bias
        returned = _RETURNED.get()
        if returned is not None:
            returned.append((out, _version(out)))
        return out

    def _check(self, module: nn.Module, parts: Tensor, bias: Tensor | None, args: Any, kwargs: Any) -> None:
        if is_compiling():  # a graph is traced once and cannot remember past checks
            _check_sum(module, parts, bias, own_forward(module)(*args, **kwargs))
            return
        key = (parts.shape, parts.dtype, torch.is_autocast_enabled(parts.device.type), *_state(module))
        if key not in self._checked and _check_sum(module, parts, bias, own_forward(module)(*args, **kwargs)):
            self._checked.add(key)

    def _with_hooks(self, module: nn.Module, call: Forward) -> Forward:
        """Wraps the module's call to check that the user's own hooks do not change the sum of the attention heads."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if module is not self.owner or programs_at(self) is None or not _users_hooks(module):
                return call(*args, **kwargs)
            returned: list[tuple[Tensor, int]] = []
            token = _RETURNED.set(returned)
            try:
                out = call(*args, **kwargs)
            finally:
                _RETURNED.reset(token)
            if returned and (out is not returned[-1][0] or _version(out) != returned[-1][1]):
                raise MMHooksError(
                    f"expected the output of this {type(module).__name__} to be the sum of its attention heads and the "
                    "bias, got one changed by a forward hook; read attn.z or attn_out, or remove the hook"
                )
            return out

        return wrapped


_RETURNED: ContextVar[list[tuple[Tensor, int]] | None] = ContextVar("mmhooks_returned", default=None)


def _never_called(*_: Any) -> Tensor:
    raise AssertionError("ProjectionByHead runs the module's own forward")


def _users_hooks(module: nn.Module) -> bool:
    return any(not hasattr(hook, MARK) for hook in module._forward_hooks.values())


def _version(tensor: Any) -> int:
    return -1 if not isinstance(tensor, Tensor) or tensor.is_inference() else tensor._version


def _state(module: nn.Module) -> Iterator[Hashable]:
    """Everything besides weights that determines whether a module is linear: classes, modes and hooks of its parts.

    (Not by ``modules()``, which makes a LoRA layer around torch's attention restore its weights.)
    """
    kind = type(module)
    hooks = len(module._forward_hooks), len(module._forward_pre_hooks)
    yield kind.__module__, kind.__qualname__, module.training, hooks, "forward" in vars(module)
    for child in module._modules.values():
        if child is not None:
            yield from _state(child)


def _check_sum(
    module: nn.Module, parts: Float[Tensor, "*b h d"], bias: Tensor | None, out: Float[Tensor, "*b d"]
) -> bool:
    """Raises MMHooksError unless the parts add up to ``out``; False if all are zero, which proves nothing."""
    total = parts.sum(dim=-2)
    total = total if bias is None else total + bias
    largest = parts.abs().amax()
    scale = torch.maximum(out.abs().amax(), largest).clamp_min(1e-12)
    error, size = torch.stack([(total - out).abs().amax() / scale, largest.to(scale)]).tolist()
    allowed = max(1e-4, 4 * torch.finfo(out.dtype).eps)
    if not error <= allowed:
        raise MMHooksError(
            f"expected attention heads to add up to the output of this {type(module).__name__} within {allowed:.2g}, got "
            f"a relative error of {error:.2g}: it is not linear (it quantises its input, or applies dropout), so its "
            "output cannot be split by head; read and edit attn.z instead of attn.head_out"
        )
    return size > 0
