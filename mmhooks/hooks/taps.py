"""Taps: the ways to reach a tensor inside a live module. Nothing is installed until a context asks.

A tap owns one or several *leaves* (places) and knows how to install itself and how to take itself out
again. What happens to the tensor is the business of the :class:`~mmhooks.hooks.program.Program` that the
active contexts of the calling thread have for the tap; a thread without one passes through untouched.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.utils.hooks import RemovableHandle

from mmhooks.errors import MMHooksError
from mmhooks.hooks.dispatch import active, epoch, programs_at, refreshed
from mmhooks.hooks.shadow import Remove, Shadow

Emit = Callable[[str, Tensor], Tensor]


class Tap:
    """Base of the taps. ``leaves`` is ``()`` for a tap with a single place."""

    leaves: tuple[str, ...] = ()

    def install(self) -> Remove:
        """Hooks or swaps; returns the function that undoes exactly this."""
        raise NotImplementedError


class HookTap(Tap):
    """A tap that is a hook of torch's.

    The module is shadowed too: compiled code looks at the types of modules, not at their hooks, so without it
    Dynamo would take code made for the same module without a hook, or with one that is gone. Modules of one class
    that are hooked differently need a type each, for code that a graph break cuts into pieces. Many types cost
    Python its type caches (0.5 µs a hook at 48), so until something is compiled all hooked modules share one.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._own = Shadow("_mmhooks_hooked", _true)

    def install(self) -> Remove:
        shared = not _compiles()
        uncast = (_SHARED if shared else self._own).cast(self.module)
        handle = self._register(_refuse if shared else None)

        def remove() -> None:
            handle.remove()
            uncast()

        return remove

    def _register(self, refuse: Callable[[], None] | None) -> RemovableHandle:
        """Registers the hook; its body calls ``refuse`` where it is being compiled."""
        raise NotImplementedError


def _true(module: nn.Module, below: Any) -> bool:
    return True


_SHARED = Shadow("_mmhooks_hooked", _true)


def _compiles() -> bool:
    """Whether ``torch.compile`` was called in this process; True where torch no longer says so."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    return dynamo is not None and bool(getattr(dynamo, "cached_backends", True))


def _refuse() -> None:
    raise MMHooksError(
        "this code is compiled for the first time inside a context that was opened before any torch.compile; call "
        "torch.compile (or torch.export) first, then open the context"
    )


class ModuleOutput(HookTap):
    """What a module returns: the tensor, or the first tensor of a tuple, list or model output.

    ``first``: before the hooks that the module has already. transformers' record hidden states with hooks of
    their own, which stay after the first call that asks for them, and would show the value from before an edit.
    """

    def __init__(self, module: nn.Module, first: bool = False) -> None:
        super().__init__(module)
        self.first = first

    def _register(self, refuse: Callable[[], None] | None) -> RemovableHandle:
        own = self.module

        def body(module: nn.Module, args: Any, output: Any) -> Any:
            if refuse is not None and is_compiling():
                refuse()
            stack = active.get()  # programs_at, spelled out: this is the hot path of every capture
            program = (stack if stack.epoch == epoch.now else refreshed(stack)).table.get(self)
            if program is None or module is not own:  # a copy of the model takes torch's hooks along
                return None
            if isinstance(output, Tensor):
                return program(output)
            old = _first(output)
            new = program(old)
            return None if new is old else _with_first(output, new)

        return own.register_forward_hook(body, prepend=self.first)


class ModuleInput(HookTap):
    """The first tensor a module is called with, or its argument ``keyword``."""

    def __init__(self, module: nn.Module, keyword: str = "") -> None:
        super().__init__(module)
        self.keyword = keyword

    def _register(self, refuse: Callable[[], None] | None) -> RemovableHandle:
        # kwargs has a default: while another thread is between torch's two registrations of a hook with
        # kwargs, torch may call the body without them (that thread has no program here anyway).
        def body(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
            if refuse is not None and is_compiling():
                refuse()
            program = programs_at(self)
            if program is None or kwargs is None or module is not self.module:
                return None
            if args:
                new = program(args[0])
                return None if new is args[0] else ((new, *args[1:]), kwargs)
            key = self.keyword or next(iter(kwargs))
            new = program(kwargs[key])
            return None if new is kwargs[key] else (args, {**kwargs, key: new})

        return self.module.register_forward_pre_hook(body, with_kwargs=True)


class ModuleArgument(HookTap):
    """One argument of a module, by name, however it is passed; ``key``: an entry of a dict that is passed.

    An argument that is left out or None does not fire.
    """

    def __init__(self, module: nn.Module, argument: str, key: str = "") -> None:
        super().__init__(module)
        self.argument, self.key = argument, key
        self._position = list(signature(module.forward).parameters).index(argument)

    def _register(self, refuse: Callable[[], None] | None) -> RemovableHandle:
        def body(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
            if refuse is not None and is_compiling():
                refuse()
            program = programs_at(self)
            if program is None or kwargs is None or module is not self.module:
                return None
            positional = self._position < len(args)
            given = args[self._position] if positional else kwargs.get(self.argument)
            if given is None:
                return None
            old = given.get(self.key) if self.key else given
            new = old if old is None else program(old)
            if new is old:
                return None
            new = {**given, self.key: new} if self.key else new
            if positional:
                return (*args[: self._position], new, *args[self._position + 1 :]), kwargs
            return args, {**kwargs, self.argument: new}

        return self.module.register_forward_pre_hook(body, with_kwargs=True)


class ParameterProduct(Tap):
    """``x @ parameter`` where no module owns the product: leaf ``in`` is ``x``, leaf ``out`` the product.

    While installed, reading the parameter gives an object that multiplies like it; ``state_dict`` and
    ``parameters()`` do not change, and the module's own code runs as it is.
    """

    leaves = ("in", "out")

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module = module
        self._shadow = Shadow(name, self._stand)

    def install(self) -> Remove:
        return self._shadow.cast(self.module)

    def _stand(self, module: nn.Module, parameter: Any) -> Any:
        return _Stand(self, parameter)


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
    """A module's ``forward`` shadowed by one that shows its insides; only threads with a program take it.

    Args:
        module: whose ``forward`` is shadowed.
        leaves: the places that ``forward`` emits.
        forward: ``forward(module, emit, want, *args, **kwargs)``; calls ``emit(leaf, tensor) -> tensor`` at
            each place in ``want`` and goes on with what comes back.
        inexact: leaves for whose sake ``forward`` leaves the bits of the original. Contexts that only read
            those get the original's output, and the explicit one is computed aside.
    """

    def __init__(
        self,
        module: nn.Module,
        leaves: Sequence[str],
        forward: Callable[..., Any],
        *,
        inexact: Sequence[str] = (),
    ) -> None:
        self.module, self.leaves = module, tuple(leaves)
        self._explicit, self._inexact = forward, frozenset(inexact)
        self._shadow = Shadow("forward", self._forward)

    def install(self) -> Remove:
        return self._shadow.cast(self.module)

    def _forward(self, module: nn.Module, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            programs = programs_at(self)
            if programs is None:
                return original(*args, **kwargs)
            return self._run(module, programs, original, args, kwargs)

        return forward

    def _run(self, module: nn.Module, programs: Any, original: Any, args: Any, kwargs: Any) -> Any:
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

        if self._inexact.isdisjoint(programs):
            return self._call(module, emit, programs, original, args, kwargs)
        dice = _dice(module)
        if all(program.detached for program in programs.values()):
            with torch.no_grad():
                self._call(module, emit, programs, original, args, kwargs)
        else:
            output = self._call(module, emit, programs, original, args, kwargs)
            if changed:
                return output
        dice()
        return original(*args, **kwargs)

    def _call(
        self, module: nn.Module, emit: Emit, want: Any, original: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        return self._explicit(module, emit, want, *args, **kwargs)


def _dice(module: nn.Module) -> Callable[[], None]:
    """Puts the random numbers back, so that a look aside does not change what dropout draws afterwards."""
    if not module.training:
        return lambda: None
    cpu = torch.get_rng_state()
    device = next((p.device for p in module.parameters() if p.is_cuda), None)
    cuda = None if device is None else torch.cuda.get_rng_state(device)

    def back() -> None:
        torch.set_rng_state(cpu)
        if cuda is not None and device is not None:
            torch.cuda.set_rng_state(cuda, device)

    return back


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
