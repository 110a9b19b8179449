"""Who sees which edits: the stack of open contexts, bound to the thread or task that opened them.

A handle on a module fires for every thread. Its body asks :func:`programs_at`, which looks into a
``contextvars`` variable: in a thread or task that opened no context there is nothing, and the tensor passes.
"""

from __future__ import annotations

from contextvars import ContextVar
from threading import RLock
from typing import TYPE_CHECKING, Any

from mmhooks.hooks.program import compile_programs

if TYPE_CHECKING:
    from mmhooks.hooks.context import HookContext
    from mmhooks.hooks.shadow import Remove
    from mmhooks.hooks.taps import Tap


class Stack:
    """Open contexts, outermost first, and the merged program of every tap that they use."""

    __slots__ = ("contexts", "epoch", "table")

    def __init__(self, contexts: tuple[HookContext, ...], epoch: int) -> None:
        self.contexts, self.epoch = contexts, epoch
        self.table: dict[Any, Any] = compile_programs([op for c in contexts for op in c.ops])


class epoch:
    """Counts the contexts closed so far; a stack that is older checks whether one of its own was."""

    now = 0


_NOTHING = Stack((), 0)
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
        stack = Stack(still_open, epoch.now)
        active.set(stack)
    elif stack is not _NOTHING:
        stack.epoch = epoch.now
    return stack


def push(context: HookContext) -> None:
    stack = refreshed(active.get())
    active.set(Stack((*stack.contexts, context), epoch.now))


def pop(context: HookContext) -> None:
    """Takes a closed context out of the calling thread's stack, wherever in the stack it is."""
    epoch.now += 1
    stack = active.get()
    if context in stack.contexts:
        rest = tuple(c for c in stack.contexts if c is not context and c.is_open)
        active.set(Stack(rest, epoch.now) if rest else _NOTHING)


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


class Board:
    """The taps installed on one model, each with the number of open contexts that need it."""

    def __init__(self) -> None:
        self._lock = RLock()
        self._installed: dict[Tap, tuple[int, Remove]] = {}

    def acquire(self, tap: Tap) -> None:
        with self._lock:
            count, remove = self._installed.get(tap) or (0, None)
            self._installed[tap] = (count + 1, remove or tap.install())

    def release(self, tap: Tap) -> None:
        with self._lock:
            count, remove = self._installed.pop(tap)
            if count > 1:
                self._installed[tap] = (count - 1, remove)
            else:
                remove()

    def __len__(self) -> int:
        return len(self._installed)

    def __deepcopy__(self, memo: Any) -> Board:
        return Board()  # a copy of a model has no open contexts
