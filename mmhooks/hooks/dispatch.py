"""The stack of open contexts of each thread or task, which determines the edits that a tap applies.

A hook on a module fires in every thread. It asks :func:`programs_at`, which reads a ``contextvars`` variable: in a
thread or task that opened no context there is no program, and the tensor passes through unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from itertools import count
from threading import RLock
from typing import Any, Protocol, runtime_checkable
from weakref import WeakValueDictionary

import torch

from mmhooks.hooks.program import Binding, Op

Compile = Callable[[list[Op]], dict[Any, Any]]


@runtime_checkable
class Tap(Protocol):
    """The part of :class:`mmhooks.hooks.taps.Tap` that this module needs."""

    @property
    def key(self) -> Hashable: ...
    def install(self) -> None: ...
    def remove(self) -> None: ...


class OpenContext:
    """The operations and taps of an open context. The stack holds this and not the user's context, so that a context
    dropped without being closed can be garbage-collected and noticed."""

    __slots__ = ("bindings", "is_open", "ops", "taps", "watch")

    def __init__(self, ops: list[Op], bindings: list[Binding], taps: Iterable[Tap]) -> None:
        self.ops, self.bindings, self.taps = ops, bindings, dict.fromkeys(taps)
        self.is_open = True
        self.watch: Any = None  # weak reference that reports when the user's context is gone


_NO_CHANGE = nullcontext()


def outside_inference_mode() -> AbstractContextManager[Any]:
    """A block that creates ordinary tensors even in inference mode; free of cost outside that mode."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else _NO_CHANGE


class Stack:
    """Open contexts, outermost first, and the merged program of every tap they use.

    ``compile`` builds the programs from their operations.
    """

    __slots__ = ("compile", "contexts", "epoch", "outer", "table")

    def __init__(
        self, contexts: tuple[OpenContext, ...], epoch: int, compile: Compile, outer: Stack | None = None
    ) -> None:
        self.contexts, self.epoch, self.compile, self.outer = contexts, epoch, compile, outer
        # Not in inference mode: tensors created for a program may be needed by a forward in grad mode.
        with outside_inference_mode():
            self.table: dict[Any, Any] = compile([op for c in contexts for op in c.ops])


class epoch:
    """Counter that changes whenever a context closes; a stack of an older epoch then drops its closed contexts."""

    now = 0


_numbers = count(1)  # unique across threads


_NOTHING = Stack((), 0, lambda ops: {})
active: ContextVar[Stack] = ContextVar("mmhooks", default=_NOTHING)


def programs_at(tap: Tap) -> Any:
    """The calling thread's program at ``tap``: one program (single place), ``{leaf: program}``, or None."""
    stack = active.get()
    if stack.epoch != epoch.now:
        stack = refreshed(stack)
    return stack.table.get(tap)


def refreshed(stack: Stack) -> Stack:
    """The stack without contexts that have closed."""
    # A context may be closed by another thread, or be inherited by a task that outlives it.
    still_open = tuple(c for c in stack.contexts if c.is_open)
    if len(still_open) != len(stack.contexts):
        stack = Stack(still_open, epoch.now, stack.compile) if still_open else _NOTHING
        active.set(stack)
    elif stack is not _NOTHING:
        stack.epoch = epoch.now
    return stack


def push(context: OpenContext, compile: Compile) -> None:
    """Adds ``context`` to the calling thread's or task's stack and recompiles its programs."""
    stack = refreshed(active.get())
    active.set(Stack((*stack.contexts, context), epoch.now, compile, stack))


def close_context(context: OpenContext) -> None:
    """Deactivates a context in every thread and task, and removes it from the calling thread's stack.

    Safe under interrupts: completed steps stay done, and it may be called again.
    """
    try:
        context.is_open = False
    finally:
        epoch.now = next(_numbers)
    for binding in context.bindings:
        binding.live = False
    stack = active.get()
    if context in stack.contexts:
        outer = stack.outer
        if outer is not None and outer.contexts == stack.contexts[:-1] and stack.contexts[-1] is context:
            active.set(refreshed(outer))  # compiled already
        else:
            refreshed(stack)


def current() -> Stack:
    """The stack of the calling thread or task."""
    return refreshed(active.get())


class under_stack:
    """Runs a block under ``stack`` instead of the thread's own, for the recomputation of a checkpointed block."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack

    def __enter__(self) -> None:
        self.token = active.set(self.stack)

    def __exit__(self, *_: object) -> None:
        active.reset(self.token)


class TapRegistry:
    """All taps of this process, one per place of a module, even if several hooked models wrap that module, so that each
    place has one program in the order of the contexts. Installs the taps that open contexts need.

    What is installed follows from which contexts are open, and every step may be repeated. So whatever an interrupt, or
    a finaliser that closes a context while another one opens, leaves behind is corrected by the next open or close.
    """

    def __init__(self) -> None:
        self._lock = RLock()
        self._known: WeakValueDictionary[Any, Tap] = WeakValueDictionary()
        self._contexts: dict[OpenContext, None] = {}  # open, or not yet cleaned up
        self._installed: dict[Tap, None] = {}

    def shared(self, tap: Tap) -> Any:
        """The registered tap of the same place if there is one, else ``tap``, now registered."""
        with self._lock:
            return self._known.setdefault(tap.key, tap)

    def install(self, context: OpenContext) -> None:
        with self._lock:
            for other in [c for c in self._contexts if not c.is_open]:
                self.release(other)
            self._contexts[context] = None
            for tap in context.taps:
                if tap not in self._installed:
                    tap.install()
                    self._installed[tap] = None

    def release(self, context: OpenContext) -> None:
        """Removes the taps that no other open context needs."""
        with self._lock:
            if context not in self._contexts:
                return
            others = [c for c in self._contexts if c.is_open and c is not context]
            for tap in context.taps:
                if not others or not any(tap in other.taps for other in others):
                    self._installed.pop(tap, None)
                    tap.remove()
            self._contexts.pop(context, None)

    def __len__(self) -> int:
        return len(self._installed)


registry = TapRegistry()
