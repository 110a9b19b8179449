"""Taps: the ways to reach a tensor inside a live module. Nothing is installed until a context needs it.

A tap owns one or several *leaves* (places) and knows how to install and remove itself. What happens to the tensor is
determined by the :class:`~mmhooks.hooks.program.Program` that the calling thread's contexts have for the tap; in a
thread without one, tensors pass through unchanged.
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
    """Base class of taps. ``leaves`` is ``()`` for a tap with a single place; ``owner`` is the object it is installed on."""

    leaves: tuple[str, ...] = ()
    owner: Any

    @property
    def key(self) -> Hashable:
        """Identifies the place: taps with equal keys are one tap, even if several models created them."""
        return (type(self), id(self.owner), self.leaves)

    def install(self) -> None:
        """Installs the hook or shadow. Idempotent, also after an interrupt."""
        raise NotImplementedError

    def remove(self) -> None:
        """Removes everything that :meth:`install` added, even if it was interrupted. Idempotent."""
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
            shadow.install(self.owner)

    def remove(self) -> None:
        for shadow in self._shadows:
            shadow.remove(self.owner)


class HookTap(Tap):
    """A tap that is a torch hook.

    The module is shadowed too, which changes its type: compiled code is guarded by the types of modules, not by their
    hooks, so otherwise Dynamo would reuse code compiled for the module without a hook, or with a removed one. Modules
    of one class that are hooked differently need a type each, for code split by graph breaks. Many types defeat
    Python's type caches (0.5 µs per hook at 48), so until something is compiled all hooked modules share one shadow.
    """

    owner: nn.Module

    def __init__(self, module: nn.Module) -> None:
        self.owner = module
        self._own = Shadow("_mmhooks_hooked", _true)

    def install(self) -> None:
        if isinstance(self.owner, torch.jit.ScriptModule):
            raise MMHooksError(
                f"expected a module that runs in Python, got {type(self.owner).__name__}: modules compiled by torch.jit "
                "cannot be hooked; load the model without jit (open_clip: jit=False), hook it, and script it afterwards"
            )
        shared = not _compiles()
        (_SHARED if shared else self._own).install(self.owner)
        body = self._body(_refuse_compilation if shared else None)
        setattr(body, MARK, self)
        self._register(body)

    def remove(self) -> None:
        # Searched for, not removed by a handle: an interrupt may have come before torch returned one.
        module, others = self.owner, False
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for number, hook in [*hooks.items()] if hooks else ():
                mark = getattr(hook, MARK, None)
                if mark is self:
                    module._forward_pre_hooks_with_kwargs.pop(number, None)
                    hooks.pop(number, None)  # last, so that after an interrupt it can still be found
                elif mark is not None:
                    others = True
        if self._own.used:
            self._own.remove(module)
        if not others:
            _SHARED.remove(module)

    def _body(self, refuse: Callable[[], None] | None) -> Callable[..., Any]:
        """The hook function; it calls ``refuse`` when it is being compiled."""
        raise NotImplementedError

    def _register(self, body: Callable[..., Any]) -> None:
        self.owner.register_forward_pre_hook(body, with_kwargs=True)


def _true(module: nn.Module, below: Any) -> bool:
    return True


_SHARED = Shadow("_mmhooks_hooked", _true)


def _compiles() -> bool:
    """Whether ``torch.compile`` was called in this process; True if this torch version does not tell."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    return dynamo is not None and bool(getattr(dynamo, "cached_backends", True))


def _refuse_compilation() -> None:
    raise MMHooksError(
        "torch.compile was first called inside a context that was opened before it; call torch.compile (or "
        "torch.export) first, then open the context"
    )


class ModuleOutput(HookTap):
    """A module's output: the tensor, or the first tensor of a tuple, list or model output.

    ``first``: run before the module's existing hooks. transformers records hidden states with hooks of its own, which
    stay after the first call that asks for them and would otherwise see the value before an edit.
    ``named``: the site has a canonical name, which says which tensor it is; at a plain module path, a warning tells of
    further tensors when the module runs.
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
            stack = active.get()  # programs_at, inlined: this is the hot path of every capture
            program = (stack if stack.epoch == epoch.now else refreshed(stack)).table.get(self)
            if program is None or module is not own:  # torch's hooks are copied with a model
                return None
            if isinstance(output, Tensor):
                return program(output)
            old = _first(output, own)
            if not self.named:
                _warn_of_other_outputs(output, own)
            new = program(old)
            return None if new is old else _with_first(output, new)

        return body


class ModuleInput(HookTap):
    """The first tensor passed to a module, or its argument ``keyword``."""

    def __init__(self, module: nn.Module, keyword: str = "") -> None:
        super().__init__(module)
        self.keyword = keyword

    @property
    def key(self) -> Hashable:
        return (type(self), id(self.owner), self.keyword)

    def _body(self, refuse: Callable[[], None] | None) -> Callable[..., Any]:
        # kwargs has a default: torch registers a hook with kwargs in two steps, and between them it may call the
        # body from another thread without kwargs (which has no program here anyway).
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
    """One argument of a module, by name, whether passed by position or keyword; ``key``: an entry of a dict argument.

    It does not fire for an argument that is omitted or None.
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
    """Shadows a module's ``forward`` by one that exposes intermediate values; only threads with a program run it.

    Args:
        module: whose ``forward`` is shadowed.
        leaves: the places that ``forward`` emits.
        forward: ``forward(module, emit, want, *args, **kwargs)``; calls ``emit(leaf, tensor) -> tensor`` at
            each place in ``want`` and continues with the result.
        inexact: leaves for which ``forward`` differs from the original in the last bits. Contexts that only read
            them get the original's output; the explicit forward is run in addition.
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
            # A tensor exposed in grad mode may be differentiated: the output must be computed from it.
            if new is not value or (new.requires_grad and not program.detached):
                changed = True
            return new

        if self._exact(module, programs):
            return self._call(module, emit, programs, original, args, kwargs)
        restore_rng = _preserve_rng_state(module)
        if all(program.detached for program in programs.values()):
            with torch.no_grad():
                self._call(module, emit, programs, original, args, kwargs)
        else:
            output = self._call(module, emit, programs, original, args, kwargs)
            if changed:
                return output
        restore_rng()
        return original(*args, **kwargs)

    def _exact(self, module: nn.Module, programs: Any) -> bool:
        """Whether the explicit forward is bit-equal to the original for these leaves."""
        return self._inexact.isdisjoint(programs)

    def _call(
        self, module: nn.Module, emit: Emit, want: Any, original: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        return self._explicit(module, emit, want, *args, **kwargs)


def _preserve_rng_state(module: nn.Module) -> Callable[[], None]:
    """Saves the random state and returns a function that restores it, so that an additional run of the explicit forward
    does not change what dropout draws afterwards."""
    if not module.training:
        return lambda: None
    cpu = torch.get_rng_state()
    device = next((p.device for p in module.parameters() if p.is_cuda), None)
    cuda = None if device is None else torch.cuda.get_rng_state(device)

    def restore() -> None:
        torch.set_rng_state(cpu)
        if cuda is not None and device is not None:
            torch.cuda.set_rng_state(cuda, device)

    return restore


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


def _warn_of_other_outputs(output: Any, module: nn.Module) -> None:
    values = output.values() if isinstance(output, dict) else output
    others = sum(1 for _ in _tensors(values)) - 1
    if others > 0:
        warnings.warn(
            f"{type(module).__name__} returns {others + 1} tensors; a hook, edit or cache at its path sees only the "
            "first, and the others pass through unchanged. Hook the modules inside it that compute the others",
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
