"""A tap for one named field of a module's output, where the first tensor is not the one that is meant."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from torch import nn
from torch.compiler import is_compiling

from mmhooks.hooks.dispatch import programs_at
from mmhooks.hooks.taps import HookTap


class OutputField(HookTap):
    """``output[field]`` of a module that returns a mapping, such as a ModelOutput of transformers."""

    def __init__(self, module: nn.Module, field: str) -> None:
        super().__init__(module)
        self.field = field

    @property
    def key(self) -> Hashable:
        return (type(self), id(self.owner), self.field)

    def _register(self, body: Callable[..., Any]) -> None:
        self.owner.register_forward_hook(body)

    def _body(self, refuse: Callable[[], None] | None) -> Callable[..., Any]:
        def body(module: nn.Module, args: Any, output: Any) -> Any:
            if refuse is not None and is_compiling():
                refuse()
            program = programs_at(self)
            if program is None or module is not self.owner:
                return None
            old = output[self.field]
            new = program(old)
            if new is old:
                return None
            copy = output.copy()
            copy[self.field] = new
            return copy

        return body
