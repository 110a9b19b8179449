"""An output projection by attention head: ``z`` as the module reads it, ``head_out`` as it multiplies.

What a linear module multiplies by need not be its ``weight``: LoRA adds to it, quantised layers keep codes and scales,
offloaded ones keep nothing between calls. So the module is called, and what it does to unit vectors is its matrix.
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
    """A projection's input with the attention heads in a dimension of their own."""
    return View(_Split(heads), _joined)


@dataclass(frozen=True)
class _Split:
    heads: int

    def __call__(self, raw: Tensor) -> Tensor:
        return raw.unflatten(-1, (self.heads, -1))


def _joined(raw: Tensor, value: Tensor) -> Tensor:
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
    """Matrix and bias that a linear module multiplies by as it runs now.

    Args:
        like: an input: its width, type and device.
    """
    if is_plain(module):
        return module.weight, module.bias  # type: ignore[return-value]
    width = like.shape[-1]
    rows = own_forward(module)(
        torch.eye(width + 1, width, dtype=like.dtype, device=like.device)
    )  # the last row is zero
    return (rows[:-1] - rows[-1]).T, rows[-1]


class ByHead(ExplicitForward):
    """``head_out`` of an output projection that is a module and is called.

    The module's own forward gives the output unless ``head_out`` was edited. Of anything but a plain ``nn.Linear``
    the sum over attention heads is held against that output: once for inputs of one shape and type, as long as the
    module's parts, their modes and their hooks stay what they were. Each comparison waits for the device.

    Raises (when it runs):
        MMHooksError: the module is not linear, or a hook of the user's changes what it returns; says which module.
    """

    def __init__(self, module: nn.Module, heads: int) -> None:
        super().__init__(module, ("head_out",), _unused)
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
        if is_compiling():  # a graph is traced once, and nothing is remembered in it
            _check_sum(module, parts, bias, own_forward(module)(*args, **kwargs))
            return
        key = (parts.shape, parts.dtype, torch.is_autocast_enabled(parts.device.type), *_state(module))
        if key not in self._checked and _check_sum(module, parts, bias, own_forward(module)(*args, **kwargs)):
            self._checked.add(key)

    def _with_hooks(self, module: nn.Module, call: Forward) -> Forward:
        """The module's call with the user's own hooks, which must leave alone what attention heads add up to."""

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
                    f"a forward hook on this {type(module).__name__} changes what it returns, so attention heads do not "
                    "add up to it: expected their sum and the bias; read attn.z or attn_out, or remove the hook"
                )
            return out

        return wrapped


_RETURNED: ContextVar[list[tuple[Tensor, int]] | None] = ContextVar("mmhooks_returned", default=None)


def _unused(*_: Any) -> Tensor:
    raise AssertionError("ByHead runs the module's own forward")


def _users_hooks(module: nn.Module) -> bool:
    return any(not hasattr(hook, MARK) for hook in module._forward_hooks.values())


def _version(tensor: Any) -> int:
    return -1 if not isinstance(tensor, Tensor) or tensor.is_inference() else tensor._version


def _state(module: nn.Module) -> Iterator[Hashable]:
    """What decides whether a module is linear, whatever its weights are: classes, modes and hooks of all its parts.

    (Not by ``modules()``, at which a LoRA layer around torch's attention restores its weights.)
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
    """Raises MMHooksError unless the parts add up; False where they are all zero, which says nothing."""
    total = parts.sum(dim=-2)
    total = total if bias is None else total + bias
    largest = parts.abs().amax()
    scale = torch.maximum(out.abs().amax(), largest).clamp_min(1e-12)
    error, size = torch.stack([(total - out).abs().amax() / scale, largest.to(scale)]).tolist()
    allowed = max(1e-4, 4 * torch.finfo(out.dtype).eps)
    if not error <= allowed:
        raise MMHooksError(
            f"attention heads add up to what this {type(module).__name__} returns with a relative error of {error:.2g}, "
            f"expected at most {allowed:.2g}: it is not linear (it quantises its input, or draws dropout), so no head "
            "has a part of its own; read and edit attn.z instead of attn.head_out"
        )
    return size > 0
