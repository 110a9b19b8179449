"""Activation checkpointing: blocks recomputed in the backward pass run under the same edits as in their forward.

Autograd may recompute in another thread, or while other contexts are open. So every checkpointed block remembers,
for each input tensor, the stack of contexts that was active when it was called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from mmhooks.errors import MMHooksError
from mmhooks.hooks import dispatch
from mmhooks.hooks.shadow import Shadow
from mmhooks.hooks.taps import ShadowTap


class Recomputed(ShadowTap):
    """Wraps the call of one checkpointed block while a context is open. It has no places of its own."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__(block, Shadow("_call_impl", self._wrapped))
        self._stacks: Any = WeakIdKeyDictionary()

    def _wrapped(self, module: nn.Module, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            given = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
            if given is None:
                return call(*args, **kwargs)
            if torch._C._current_graph_task_id() == -1:  # not inside a backward pass
                stack = dispatch.current()
                if not stack.contexts:
                    return call(*args, **kwargs)
                self._stacks[given] = stack
                output = call(*args, **kwargs)
                _guard(output, stack)
                return output
            stack = self._stacks.get(given)
            if stack is None:
                return call(*args, **kwargs)
            with dispatch.under_stack(stack):
                return call(*args, **kwargs)

        return wrapped


def _guard(output: Any, stack: dispatch.Stack) -> None:
    """Raises if the contexts have closed when the output's gradient arrives, just before the block is recomputed."""
    first = output if isinstance(output, Tensor) else output[0]
    if not isinstance(first, Tensor) or not first.requires_grad:
        return

    def check(grad: Tensor) -> None:
        if not all(context.is_open for context in stack.contexts):
            raise MMHooksError(
                "backward() of a checkpointed block after its context closed would recompute it without the edits of "
                "its forward; call backward() within the with block"
            )

    first.register_hook(check)


def can_checkpoint(model: nn.Module) -> list[nn.Module]:
    """Modules with a checkpointing flag, under the names that open_clip, timm and transformers give it."""
    return [m for m in model.modules() if {"grad_checkpointing", "gradient_checkpointing"} & vars(m).keys()]


def checkpointed(candidates: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """The blocks that currently run under activation checkpointing."""
    for module in candidates:
        if vars(module).get("grad_checkpointing"):
            for child in module.children():
                if isinstance(child, (nn.ModuleList, nn.Sequential)):
                    yield from child
        elif vars(module).get("gradient_checkpointing"):
            yield module
