"""Activation checkpointing: blocks recomputed in the backward pass run under the same edits as in their forward.

Autograd may recompute in another thread, or while other contexts are open. So every checkpointed block remembers,
for each input tensor, the stack of contexts that was active when it was called, and what ran then: step, texts, sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextvars import Context, copy_context
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from mmhooks.errors import MMHooksError
from mmhooks.hooks import dispatch
from mmhooks.hooks.program import CaptureOp
from mmhooks.hooks.shadow import Shadow
from mmhooks.hooks.taps import ShadowTap

_CHECKPOINT = "_gradient_checkpointing_func"


class Recomputed(ShadowTap):
    """Wraps the call of one checkpointed block while a context is open. It has no places of its own.

    A block of transformers checkpoints its own ``forward``, inside its call, by a function that it holds: there this is wrapped.
    """

    def __init__(self, block: nn.Module) -> None:
        held = hasattr(block, _CHECKPOINT)
        super().__init__(
            block, Shadow(_CHECKPOINT, self._remembering) if held else Shadow("_call_impl", self._wrapped)
        )
        self._stacks: Any = WeakIdKeyDictionary()

    def _remembering(self, module: nn.Module, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        """The checkpointing function, giving it a body that is recomputed as it ran."""

        def remembering(body: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            stack = dispatch.current()
            if not stack.contexts:
                return checkpoint(body, *args, **kwargs)
            variables = copy_context()

            def remembered(*given: Any, **named: Any) -> Any:
                if torch._C._current_graph_task_id() == -1:  # not inside a backward pass
                    return body(*given, **named)
                return _as_before(stack, variables, partial(body, *given, **named))

            output = checkpoint(remembered, *args, **kwargs)
            _guard(output, stack)
            return output

        return remembering

    def _wrapped(self, module: nn.Module, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            given = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
            if given is None:
                return call(*args, **kwargs)
            if torch._C._current_graph_task_id() == -1:  # not inside a backward pass
                stack = dispatch.current()
                if not stack.contexts:
                    return call(*args, **kwargs)
                self._stacks[given] = stack, copy_context()
                output = call(*args, **kwargs)
                _guard(output, stack)
                return output
            known = self._stacks.get(given)
            if known is None:
                return call(*args, **kwargs)
            stack, variables = known
            return _as_before(stack, variables, partial(call, *args, **kwargs))

        return wrapped


def _as_before(stack: dispatch.Stack, variables: Context, run: Callable[[], Any]) -> Any:
    """Runs a body under the contexts and the variables of its forward."""

    def under() -> Any:
        with dispatch.under_stack(stack):
            return run()

    return variables.copy().run(under)  # a copy: one context cannot be entered by two threads


def _guard(output: Any, stack: dispatch.Stack) -> None:
    """Raises if the contexts have closed when the output's gradient arrives, just before the block is recomputed."""
    first = output if isinstance(output, Tensor) else output[0]
    if not isinstance(first, Tensor) or not first.requires_grad:
        return

    # A cache may close: it keeps what the forward gave, and so does encode_image of a vision encoder's own.
    needed = [c for c in stack.contexts if any(not isinstance(op, CaptureOp) for op in c.ops)]

    def check(grad: Tensor) -> None:
        if not all(context.is_open for context in needed):
            raise MMHooksError(
                "backward() of a checkpointed block after its context closed would recompute it without the edits of "
                "its forward; call backward() within the with block"
            )

    first.register_hook(check)


def can_checkpoint(model: nn.Module) -> list[nn.Module]:
    """Modules with a checkpointing flag, under the names that open_clip, timm and transformers give it."""
    # A layer of transformers has the flag on its class until it is turned on.
    names = ("grad_checkpointing", "gradient_checkpointing")
    return [m for m in model.modules() if any(isinstance(getattr(m, n, None), bool) for n in names)]


def checkpointed(candidates: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """The blocks that currently run under activation checkpointing."""
    for module in candidates:
        if vars(module).get("grad_checkpointing"):
            for child in module.children():
                if isinstance(child, (nn.ModuleList, nn.Sequential)):
                    yield from child
        elif vars(module).get("gradient_checkpointing"):
            yield module
