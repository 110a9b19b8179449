"""Who sees which edits: the stack of open contexts, bound to the thread or task that opened them.

A handle on a module fires for every thread. Its body asks :func:`programs_at`, which looks into a
``contextvars`` variable: in a thread or task that opened no context there is nothing, and the tensor passes.
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
    """What is installed for a context: :class:`mmhooks.hooks.taps.Tap`, which builds on this module."""

    @property
    def key(self) -> Hashable: ...
    def install(self) -> None: ...
    def remove(self) -> None: ...


class Opened:
    """What an open context does and needs. The stack holds this, never the user's context: one that is dropped
    without being closed can tell."""

    __slots__ = ("bindings", "is_open", "ops", "taps", "watch")

    def __init__(self, ops: list[Op], bindings: list[Binding], taps: Iterable[Tap]) -> None:
        self.ops, self.bindings, self.taps = ops, bindings, dict.fromkeys(taps)
        self.is_open = True
        self.watch: Any = None  # what notices that the user's context is gone


_AS_IT_IS = nullcontext()


def outside_inference_mode() -> AbstractContextManager[Any]:
    """A block whose tensors may be used in grad mode later, wherever it runs; costs nothing outside of that mode."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else _AS_IT_IS


class Stack:
    """Open contexts, outermost first, and the merged program of every tap that they use.

    ``compile`` makes the programs of their operations; the stack knows nothing of what these do.
    """

    __slots__ = ("compile", "contexts", "epoch", "outer", "table")

    def __init__(
        self, contexts: tuple[Opened, ...], epoch: int, compile: Compile, outer: Stack | None = None
    ) -> None:
        self.contexts, self.epoch, self.compile, self.outer = contexts, epoch, compile, outer
        # Not in inference mode: what is made for a program here may be needed by a forward in grad mode.
        with outside_inference_mode():
            self.table: dict[Any, Any] = compile([op for c in contexts for op in c.ops])


class epoch:
    """Changes whenever a context closes; a stack of another epoch checks whether one of its own was closed."""

    now = 0


_numbers = count(1)  # never the same twice, whichever thread draws them


_NOTHING = Stack((), 0, lambda ops: {})
active: ContextVar[Stack] = ContextVar("mmhooks", default=_NOTHING)


def programs_at(tap: Tap) -> Any:
    """What the calling thread's contexts do at ``tap``: a program (single place), leaf -> program, or None."""
    stack = active.get()
    if stack.epoch != epoch.now:
        stack = refreshed(stack)
    return stack.table.get(tap)


def refreshed(stack: Stack) -> Stack:
    # A context may be closed by another thread, or be inherited by a task that outlives it.
    still_open = tuple(c for c in stack.contexts if c.is_open)
    if len(still_open) != len(stack.contexts):
        stack = Stack(still_open, epoch.now, stack.compile) if still_open else _NOTHING
        active.set(stack)
    elif stack is not _NOTHING:
        stack.epoch = epoch.now
    return stack


def push(context: Opened, compile: Compile) -> None:
    """Opens ``context`` inside those of the calling thread or task, and merges their programs by ``compile``."""
    stack = refreshed(active.get())
    active.set(Stack((*stack.contexts, context), epoch.now, compile, stack))


def shut(context: Opened) -> None:
    """Ends what a context does, in every thread and task, and takes it out of the calling thread's stack.

    Interrupts may come at any point: whatever was done stays done, and it may be called again.
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
            active.set(refreshed(outer))  # as it was compiled then
        else:
            refreshed(stack)


def current() -> Stack:
    """The stack of the calling thread or task."""
    return refreshed(active.get())


class bound:
    """Runs a block under ``stack`` instead of the thread's own: the recomputation of a checkpoint."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack

    def __enter__(self) -> None:
        self.token = active.set(self.stack)

    def __exit__(self, *_: object) -> None:
        active.reset(self.token)


class TapRegistry:
    """The taps of this process: one for each place of a module, whoever wraps the module, so that what is done
    there is one program, in the order of the contexts. Installs the taps that open contexts need.

    What is installed follows from which contexts are open, and every step may be repeated. So an interrupt anywhere
    leaves nothing that the next opening or closing does not put right, nor does a finaliser that closes a context
    in the middle of another one's opening.
    """

    def __init__(self) -> None:
        self._lock = RLock()
        self._known: WeakValueDictionary[Any, Tap] = WeakValueDictionary()
        self._contexts: dict[Opened, None] = {}  # open, or not yet cleaned up
        self._installed: dict[Tap, None] = {}

    def shared(self, tap: Tap) -> Any:
        """The tap to use: the one that is known for this place, else this one."""
        with self._lock:
            return self._known.setdefault(tap.key, tap)

    def install(self, context: Opened) -> None:
        with self._lock:
            for other in [c for c in self._contexts if not c.is_open]:
                self.release(other)
            self._contexts[context] = None
            for tap in context.taps:
                if tap not in self._installed:
                    tap.install()
                    self._installed[tap] = None

    def release(self, context: Opened) -> None:
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
