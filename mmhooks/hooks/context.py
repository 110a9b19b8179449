"""The hook context: installs taps on entry, removes them on exit, and reports edits and hooks that never fired."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, MutableMapping
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from weakref import ref

from mmhooks.errors import HookDidNotFire, MMHooksError, MMHooksWarning
from mmhooks.hooks import dispatch
from mmhooks.hooks.between_sites import forget_inboxes
from mmhooks.hooks.compile import compile_programs, taps_of
from mmhooks.hooks.program import Binding, Op
from mmhooks.hooks.taps import Tap


class HookContext:
    """``with model.hooks(...)``. Resolves its sites on entry, then installs the taps it needs, all or none.

    Closing removes exactly these, in any order of contexts and also after an exception. It raises
    :class:`~mmhooks.errors.HookDidNotFire` for edits and hooks that ran at none of their sites, unless an exception is
    propagating or ``strict`` is false.

    An interrupt may arrive at any point. Closing first deactivates the context and then removes what it installed; an
    interrupted step is repeated, and anything left over is removed when the next context opens. A context that is
    garbage-collected without being closed is closed then, like a file.
    """

    _opened: dispatch.OpenContext | None = None
    _is_clean = False

    def __init__(
        self,
        plan: Callable[[], tuple[list[Op], list[Binding]]],
        *,
        strict: bool,
        extra_taps: Callable[[], Iterable[Tap]] = tuple,
    ) -> None:
        self._plan, self._strict, self._extra_taps = plan, strict, extra_taps

    @property
    def is_open(self) -> bool:
        return self._opened is not None and self._opened.is_open

    def __enter__(self) -> Any:
        if self._opened is not None:
            raise MMHooksError(
                "a context can be entered only once; call model.hooks(...) again for a new one"
            )
        try:
            extra_taps = self._extra_taps()
            # Tensors created by a plan may be needed in grad mode later, even if the context opens in inference mode.
            with dispatch.outside_inference_mode():
                ops, bindings = self._plan()
            taps = (*extra_taps, *(tap for op in ops for tap in taps_of(op)))
            self._opened = opened = dispatch.OpenContext(ops, bindings, taps)
            # Not __del__, which would also run for closed contexts: Python swallows a Ctrl-C raised in it.
            opened.watch = ref(self, partial(_close_dropped, opened))
            dispatch.registry.install(opened)
            dispatch.push(opened, compile_programs)
            return self._entered()
        except BaseException:
            self.close()
            raise

    def _entered(self) -> Any:
        """What ``with ... as`` binds."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        finally:
            if not self._is_clean:  # an interrupt stopped it halfway
                self.close()
        if error is None:
            self._closed()

    def _closed(self) -> None:
        """Checks after closing, run only if no exception is propagating."""
        if self._strict and self._opened is not None:
            silent = [b for b in self._opened.bindings if not b.fired]
            if silent:
                raise HookDidNotFire("; ".join(_complaint(b) for b in silent))

    def close(self) -> None:
        """Closes the context and removes what it installed; may be called repeatedly."""
        opened = self._opened
        if opened is None:
            return
        _end(opened)
        self._is_clean = True


def _end(opened: dispatch.OpenContext) -> None:
    try:
        dispatch.close_context(opened)
    finally:
        dispatch.registry.release(opened)
    forget_inboxes()
    opened.watch = None


def _close_dropped(opened: dispatch.OpenContext, _: Any) -> None:
    _end(opened)
    warnings.warn(
        "an open mmhooks context was garbage-collected and is closed now; keep it in a variable, or use it in a with "
        "statement",
        ResourceWarning,
        stacklevel=2,
    )


Cache = TypeVar("Cache")


class CacheContext(HookContext, Generic[Cache]):
    """A context that returns the cache it fills, and records the shapes of its sites in ``shapes``."""

    if TYPE_CHECKING:

        def __enter__(self) -> Cache: ...

    def __init__(
        self, cache: Cache, shapes: MutableMapping[str, tuple[int, ...]], *args: Any, **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self._cache: Any = cache
        self._shapes = shapes

    def _entered(self) -> Any:
        return self._cache

    def _closed(self) -> None:
        super()._closed()
        self._shapes.update(self._cache.shapes)
        repeated = self._cache.repeated
        if self._strict and repeated:
            names = ", ".join([*repeated][:4]) + (
                f" and {len(repeated) - 4} more" if len(repeated) > 4 else ""
            )
            warnings.warn(
                f"{names} ran more than once inside this cache, which holds only the last value of each (for generate(), "
                "the last step). Open one cache per run, or collect the values with fwd_hooks=; strict=False silences "
                "this",
                MMHooksWarning,
                stacklevel=3,
            )


def _complaint(binding: Binding) -> str:
    sites = ", ".join(binding.sites[:4]) + (
        f" and {len(binding.sites) - 4} more" if len(binding.sites) > 4 else ""
    )
    return f"{binding.label} fired at none of its sites ({sites}): {binding.hint}; strict=False allows that"
