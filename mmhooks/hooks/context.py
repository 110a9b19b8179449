"""The one context: opens, owns what it installed, closes, and says what never fired."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import TracebackType

from mmhooks.errors import HookDidNotFire, MMHooksError
from mmhooks.hooks import dispatch
from mmhooks.hooks.program import Binding, Op
from mmhooks.hooks.taps import Tap


class HookContext:
    """``with model.hooks(...)``. Resolves its sites on entry, then installs the taps it needs.

    Closing removes exactly these, in whatever order contexts close, and also after an exception. It raises
    :class:`~mmhooks.errors.HookDidNotFire` for edits and hooks that ran nowhere, unless an exception is on its
    way or ``strict`` is false.
    """

    def __init__(
        self,
        board: dispatch.Board,
        plan: Callable[[], tuple[list[Op], list[Binding]]],
        *,
        strict: bool,
        around: Callable[[], Iterable[Tap]] = tuple,
    ) -> None:
        self._board, self._plan, self._strict, self._around = board, plan, strict, around
        self.ops: list[Op] = []
        self.bindings: list[Binding] = []
        self.is_open = False
        self._taps: list[Tap] = []

    def __enter__(self) -> HookContext:
        if self.is_open or self.ops:
            raise MMHooksError("this context was entered before; call model.hooks(...) again for another one")
        self.ops, self.bindings = self._plan()
        try:
            for tap in dict.fromkeys((*self._around(), *(op.target.site.tap for op in self.ops))):
                self._board.acquire(tap)
                self._taps.append(tap)
            self.is_open = True
            dispatch.push(self)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        if error is None and self._strict:
            silent = [b for b in self.bindings if not b.fired]
            if silent:
                raise HookDidNotFire("; ".join(_complaint(b) for b in silent))

    def close(self) -> None:
        """Removes what this context installed; a second call does nothing."""
        if self.is_open:
            self.is_open = False
            dispatch.pop(self)
        for binding in self.bindings:
            binding.live = False
        while self._taps:
            self._board.release(self._taps.pop())


def _complaint(binding: Binding) -> str:
    sites = ", ".join(binding.sites[:4]) + (
        f" and {len(binding.sites) - 4} more" if len(binding.sites) > 4 else ""
    )
    return f"{binding.label} fired at none of its sites ({sites}): {binding.hint}; strict=False allows that"
