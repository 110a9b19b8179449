"""Taps: the ways to reach a tensor inside a live module. Nothing is installed until a context asks.

A tap owns one or several *leaves* (places) and knows how to install itself and how to take itself out
again. What happens to the tensor is the business of the :class:`~mmhooks.hooks.program.Program` that the
active contexts of the calling thread have for the tap; a thread without one passes through untouched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmhooks.hooks.dispatch import active, epoch, programs_at, refreshed

Remove = Callable[[], None]
Emit = Callable[[str, Tensor], Tensor]


class Tap:
    """Base of the taps. ``leaves`` is ``()`` for a tap with a single place."""

    leaves: tuple[str, ...] = ()

    def install(self) -> Remove:
        """Hooks or swaps; returns the function that undoes exactly this."""
        raise NotImplementedError


class ModuleOutput(Tap):
    """What a module returns: the tensor, or the first tensor of a tuple, list or model output."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def install(self) -> Remove:
        def body(module: nn.Module, args: Any, output: Any) -> Any:
            stack = active.get()  # programs_at, spelled out: this is the hot path of every capture
            program = (stack if stack.epoch == epoch.now else refreshed(stack)).table.get(self)
            if program is None:
                return None
            if isinstance(output, Tensor):
                return program(output)
            old = _first(output)
            new = program(old)
            return None if new is old else _with_first(output, new)

        return self.module.register_forward_hook(body).remove


class ModuleInput(Tap):
    """The first tensor a module is called with, or its argument ``keyword``."""

    def __init__(self, module: nn.Module, keyword: str = "") -> None:
        self.module, self.keyword = module, keyword

    def install(self) -> Remove:
        # kwargs has a default: while another thread is between torch's two registrations of a hook with
        # kwargs, torch may call the body without them (that thread has no program here anyway).
        def body(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
            program = programs_at(self)
            if program is None or kwargs is None:
                return None
            if args:
                new = program(args[0])
                return None if new is args[0] else ((new, *args[1:]), kwargs)
            key = self.keyword or next(iter(kwargs))
            new = program(kwargs[key])
            return None if new is kwargs[key] else (args, {**kwargs, key: new})

        return self.module.register_forward_pre_hook(body, with_kwargs=True).remove


class ParameterProduct(Tap):
    """``x @ parameter`` where no module owns the product: leaf ``in`` is ``x``, leaf ``out`` the product.

    While installed, an object that multiplies by the parameter stands in the module's ``__dict__``, which
    Python looks at before ``nn.Module`` looks at its parameters; ``state_dict`` and ``parameters()`` do not
    change, and the module's own code runs as it is.
    """

    leaves = ("in", "out")

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name = module, name

    def install(self) -> Remove:
        self.module.__dict__[self.name] = _Stand(self, self.module._parameters[self.name])
        return lambda: self.module.__dict__.pop(self.name, None) and None


class _Stand:
    """Stands for the parameter of a :class:`ParameterProduct`."""

    def __init__(self, tap: ParameterProduct, parameter: Any) -> None:
        self._tap, self._parameter = tap, parameter

    def __getattr__(self, name: str) -> Any:
        return getattr(self._parameter, name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.Tensor.__matmul__, torch.Tensor.matmul, torch.matmul) and isinstance(args[1], cls):
            x, stand = args[0], args[1]
            programs = programs_at(stand._tap)
            if programs is None:
                return x @ stand._parameter
            if "in" in programs:
                x = programs["in"](x)
            product = x @ stand._parameter
            return programs["out"](product) if "out" in programs else product
        plain = [a._parameter if isinstance(a, cls) else a for a in args]
        return func(*plain, **{k: v._parameter if isinstance(v, cls) else v for k, v in kwargs.items()})


class ExplicitForward(Tap):
    """A module's ``forward`` swapped for one that shows its insides; only threads with a program take it.

    Args:
        module: whose ``forward`` is swapped (through the instance's ``__dict__``).
        leaves: the places that ``forward`` emits.
        forward: ``forward(module, emit, want, *args, **kwargs)``; calls ``emit(leaf, tensor) -> tensor`` at
            each place in ``want`` and goes on with what comes back.
        exact: ``forward`` is bit-equal to the original. Where it is not, contexts that only read get the
            original's output, and the explicit one is computed aside.
    """

    def __init__(
        self,
        module: nn.Module,
        leaves: Sequence[str],
        forward: Callable[..., Any],
        *,
        exact: bool,
    ) -> None:
        self.module, self.leaves = module, tuple(leaves)
        self._explicit, self._exact = forward, exact

    def install(self) -> Remove:
        space = self.module.__dict__
        before = space.get("forward")
        original = self.module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            programs = programs_at(self)
            if programs is None:
                return original(*args, **kwargs)
            return self._run(programs, original, args, kwargs)

        space["forward"] = forward

        def remove() -> None:
            if before is None:
                space.pop("forward", None)
            else:
                space["forward"] = before

        return remove

    def _run(self, programs: Any, original: Any, args: Any, kwargs: Any) -> Any:
        changed = False

        def emit(leaf: str, value: Tensor) -> Tensor:
            nonlocal changed
            program = programs.get(leaf)
            if program is None:
                return value
            new = program(value)
            # A tensor handed out in grad mode may be differentiated: the output must come from it.
            if new is not value or (new.requires_grad and not program.detached):
                changed = True
            return new

        if not self._exact and all(program.detached for program in programs.values()):
            with torch.no_grad():
                self._explicit(self.module, emit, programs, *args, **kwargs)
            return original(*args, **kwargs)
        output = self._explicit(self.module, emit, programs, *args, **kwargs)
        return output if changed or self._exact else original(*args, **kwargs)


def _first(output: Any) -> Tensor:
    if isinstance(output, (tuple, list)):
        return output[0]
    if isinstance(output, dict):
        return next(iter(output.values()))
    raise TypeError(
        f"a site needs a tensor, or a tuple that starts with one; the module returned {type(output).__name__}"
    )


def _with_first(output: Any, new: Tensor) -> Any:
    if isinstance(output, dict):  # also transformers' ModelOutput
        copy = output.copy()
        copy[next(iter(output))] = new
        return copy
    if isinstance(output, list):
        return [new, *output[1:]]
    rest = (new, *output[1:])
    return type(output)(*rest) if hasattr(output, "_fields") else rest
