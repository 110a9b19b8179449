"""Taps: the ways to reach a tensor inside a live module. Nothing is installed until a context asks.

A tap owns one or several *leaves* (places) and knows how to install itself and how to take itself out
again. What happens to the tensor is the business of the :class:`~mmhooks.hooks.program.Program` that the
active contexts of the calling thread have for the tap; a thread without one passes through untouched.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from copy import deepcopy
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from mmhooks.errors import MMHooksError, MMHooksWarning
from mmhooks.hooks.dispatch import active, epoch, programs_at, refreshed, registry
from mmhooks.hooks.shadow import MARK, Shadow

Emit = Callable[[str, Tensor], Tensor]


class Tap:
    """Base of the taps. ``leaves`` is ``()`` for a tap with a single place; ``owner`` is the live object it is on."""

    leaves: tuple[str, ...] = ()
    owner: Any

    @property
    def key(self) -> Hashable:
        """What it reaches: taps of one key on one module are one tap, whoever made them."""
        return (type(self), id(self.owner), self.leaves)

    def install(self) -> None:
        """Puts the hook or shadow in. It may be called again, also after an interrupt half-way."""
        raise NotImplementedError

    def remove(self) -> None:
        """Takes out all that :meth:`install` put in, or the part that it came to; it may be called again."""
        raise NotImplementedError

    def __deepcopy__(self, memo: dict[int, Any]) -> Tap:
        new = memo[id(self)] = type(self).__new__(type(self))
        vars(new).update((name, deepcopy(value, memo)) for name, value in vars(self).items())
        return registry.shared(new)


class ShadowTap(Tap):
    """A tap that shadows attributes of its owner."""

    def __init__(self, owner: Any, *shadows: Shadow) -> None:
        self.owner, self._shadows = owner, shadows

    def install(self) -> None:
        for shadow in self._shadows:
            shadow.cast(self.owner)

    def remove(self) -> None:
        for shadow in self._shadows:
            shadow.lift(self.owner)


class HookTap(Tap):
    """A tap that is a hook of torch's.

    The module is shadowed too: compiled code looks at the types of modules, not at their hooks, so without it
    Dynamo would take code made for the same module without a hook, or with one that is gone. Modules of one class
    that are hooked differently need a type each, for code that a graph break cuts into pieces. Many types cost
    Python its type caches (0.5 µs a hook at 48), so until something is compiled all hooked modules share one.
    """

    owner: nn.Module

    def __init__(self, module: nn.Module) -> None:
        self.owner = module
        self._own = Shadow("_mmhooks_hooked", _true)

    def install(self) -> None:
        if isinstance(self.owner, torch.jit.ScriptModule):
            raise MMHooksError(
                f"expected a module that runs in Python, got {type(self.owner).__name__}: what torch.jit compiled "
                "cannot be hooked; load the model without jit (open_clip: jit=False), hook it, and script it afterwards"
            )
        shared = not _compiles()
        (_SHARED if shared else self._own).cast(self.owner)
        body = self._body(_refuse if shared else None)
        setattr(body, MARK, self)
        self._register(body)

    def remove(self) -> None:
        # By looking, not by a handle: torch may have been interrupted before it gave one.
        module, others = self.owner, False
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for number, hook in [*hooks.items()] if hooks else ():
                mark = getattr(hook, MARK, None)
                if mark is self:
                    module._forward_pre_hooks_with_kwargs.pop(number, None)
                    hooks.pop(number, None)  # last: an interrupt between leaves what is looked for
                elif mark is not None:
                    others = True
        if self._own.used:
            self._own.lift(module)
        if not others:
            _SHARED.lift(module)

    def _body(self, refuse: Callable[[], None] | None) -> Callable[..., Any]:
        """The hook; it calls ``refuse`` where it is being compiled."""
        raise NotImplementedError

    def _register(self, body: Callable[..., Any]) -> None:
        self.owner.register_forward_pre_hook(body, with_kwargs=True)


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
    ``named``: the site has a name of ours, which says which tensor it is; at a module's path alone, more tensors
    than the first are told of when the module runs.
    """

    def __init__(self, module: nn.Module, first: bool = False, named: bool = True) -> None:
        super().__init__(module)
        self.first, self.named = first, named

    def _register(self, body: Callable[..., Any]) -> None:
        self.owner.register_forward_hook(body, prepend=self.first)

    def _body(self, refuse: Callable[[], None] | None) -> Callable[..., Any]:
        own = self.owner

        def body(module: nn.Module, args: Any, output: Any) -> Any:
            if refuse is not None and is_compiling():
                refuse()
            stack = active.get()  # programs_at, spelled out: this is the hot path of every capture
            program = (stack if stack.epoch == epoch.now else refreshed(stack)).table.get(self)
            if program is None or module is not own:  # a copy of the model takes torch's hooks along
                return None
            if isinstance(output, Tensor):
                return program(output)
            old = _first(output, own)
            if not self.named:
                _tell_of_others(output, own)
            new = program(old)
            return None if new is old else _with_first(output, new)

        return body


class ModuleInput(HookTap):
    """The first tensor a module is called with, or its argument ``keyword``."""

    def __init__(self, module: nn.Module, keyword: str = "") -> None:
        super().__init__(module)
        self.keyword = keyword

    @property
    def key(self) -> Hashable:
        return (type(self), id(self.owner), self.keyword)

    def _body(self, refuse: Callable[[], None] | None) -> Callable[..., Any]:
        # kwargs has a default: while another thread is between torch's two registrations of a hook with
        # kwargs, torch may call the body without them (that thread has no program here anyway).
        def body(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
            if refuse is not None and is_compiling():
                refuse()
            program = programs_at(self)
            if program is None or kwargs is None or module is not self.owner:
                return None
            if args:
                new = program(args[0])
                return None if new is args[0] else ((new, *args[1:]), kwargs)
            key = self.keyword or next(iter(kwargs))
            new = program(kwargs[key])
            return None if new is kwargs[key] else (args, {**kwargs, key: new})

        return body


class ModuleArgument(HookTap):
    """One argument of a module, by name, however it is passed; ``key``: an entry of a dict that is passed.

    An argument that is left out or None does not fire.
    """

    def __init__(self, module: nn.Module, argument: str, key: str = "") -> None:
        super().__init__(module)
        self.argument, self.key_in_dict = argument, key
        self._position = list(signature(module.forward).parameters).index(argument)

    @property
    def key(self) -> Hashable:
        return (type(self), id(self.owner), self.argument, self.key_in_dict)

    def _body(self, refuse: Callable[[], None] | None) -> Callable[..., Any]:
        def body(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
            if refuse is not None and is_compiling():
                refuse()
            program = programs_at(self)
            if program is None or kwargs is None or module is not self.owner:
                return None
            positional = self._position < len(args)
            given = args[self._position] if positional else kwargs.get(self.argument)
            if given is None:
                return None
            old = given.get(self.key_in_dict) if self.key_in_dict else given
            new = old if old is None else program(old)
            if new is old:
                return None
            new = {**given, self.key_in_dict: new} if self.key_in_dict else new
            if positional:
                return (*args[: self._position], new, *args[self._position + 1 :]), kwargs
            return args, {**kwargs, self.argument: new}

        return body


class ExplicitForward(ShadowTap):
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
        super().__init__(module, Shadow("forward", self._forward))
        self.leaves = tuple(leaves)
        self._explicit, self._inexact = forward, frozenset(inexact)

    def _forward(self, module: nn.Module, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            programs = programs_at(self)
            if programs is None or module is not self.owner:
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

        if self._exact(module, programs):
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

    def _exact(self, module: nn.Module, programs: Any) -> bool:
        """Whether the explicit forward has the bits of the original for these leaves."""
        return self._inexact.isdisjoint(programs)

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


def _first(output: Any, module: nn.Module) -> Tensor:
    values = tuple(output.values()) if isinstance(output, dict) else output
    if not isinstance(values, (tuple, list)) or not values or not isinstance(values[0], Tensor):
        shown = type(output).__name__
        if isinstance(values, (tuple, list)):
            shown += f" of {', '.join(type(v).__name__ for v in values) or 'nothing'}"
        raise MMHooksError(
            f"expected {type(module).__name__} to return a tensor, or a tuple, list or dict that starts with one, got "
            f"{shown}; hook a module inside it that returns a tensor"
        )
    return values[0]


def _tell_of_others(output: Any, module: nn.Module) -> None:
    values = output.values() if isinstance(output, dict) else output
    others = sum(1 for _ in _tensors(values)) - 1
    if others > 0:
        warnings.warn(
            f"{type(module).__name__} returns {others + 1} tensors; a hook, edit or cache at its path gets the first "
            "alone, and the others flow on as they are. Hook the modules inside it that make the others",
            MMHooksWarning,
            stacklevel=2,
        )


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)


def _with_first(output: Any, new: Tensor) -> Any:
    if isinstance(output, dict):  # also transformers' ModelOutput
        copy = output.copy()
        copy[next(iter(output))] = new
        return copy
    if isinstance(output, list):
        return [new, *output[1:]]
    rest = (new, *output[1:])
    return type(output)(*rest) if hasattr(output, "_fields") else rest
