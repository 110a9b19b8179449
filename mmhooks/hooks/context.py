"""The one context: opens, owns what it installed, closes, and says what never fired."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, MutableMapping
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from weakref import ref

from mmhooks.errors import HookDidNotFire, MMHooksError, MMHooksWarning
from mmhooks.hooks import dispatch
from mmhooks.hooks.compile import compile_programs
from mmhooks.hooks.program import Binding, Op
from mmhooks.hooks.taps import Tap


class HookContext:
    """``with model.hooks(...)``. Resolves its sites on entry, then installs the taps it needs: all of them or none.

    Closing removes exactly these, in whatever order contexts close, and also after an exception. It raises
    :class:`~mmhooks.errors.HookDidNotFire` for edits and hooks that ran nowhere, unless an exception is on its
    way or ``strict`` is false.

    An interrupt may come at any point. Closing first ends what the context does and then removes what it installed;
    each part is done again where it was interrupted, and what is left even so is removed when the next context
    opens. A context that is dropped without being closed closes then, like a file.
    """

    _opened: dispatch.Opened | None = None
    _is_clean = False

    def __init__(
        self,
        plan: Callable[[], tuple[list[Op], list[Binding]]],
        *,
        strict: bool,
        around: Callable[[], Iterable[Tap]] = tuple,
    ) -> None:
        self._plan, self._strict, self._around = plan, strict, around

    @property
    def is_open(self) -> bool:
        return self._opened is not None and self._opened.is_open

    def __enter__(self) -> Any:
        if self._opened is not None:
            raise MMHooksError("this context was entered before; call model.hooks(...) again for another one")
        try:
            around = self._around()
            # Tensors that a plan makes may be needed in grad mode, wherever the context was opened.
            with dispatch.outside_inference_mode():
                ops, bindings = self._plan()
            taps = (*around, *(op.target.site.tap for op in ops))
            self._opened = opened = dispatch.Opened(ops, bindings, taps)
            # Not __del__, which every context that was closed would run too: Python drops a Ctrl-C that comes in it.
            opened.watch = ref(self, partial(_dropped, opened))
            dispatch.registry.install(opened)
            dispatch.push(opened, compile_programs)
            return self._gives()
        except BaseException:
            self.close()
            raise

    def _gives(self) -> Any:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        finally:
            if not self._is_clean:  # an interrupt broke it off
                self.close()
        if error is None:
            self._closed()

    def _closed(self) -> None:
        """Without an exception on its way: what there is to say."""
        if self._strict and self._opened is not None:
            silent = [b for b in self._opened.bindings if not b.fired]
            if silent:
                raise HookDidNotFire("; ".join(_complaint(b) for b in silent))

    def close(self) -> None:
        """Ends the context and removes what it installed; may be called again."""
        opened = self._opened
        if opened is None:
            return
        _end(opened)
        self._is_clean = True


def _end(opened: dispatch.Opened) -> None:
    try:
        dispatch.shut(opened)
    finally:
        dispatch.registry.release(opened)
    opened.watch = None


def _dropped(opened: dispatch.Opened, _: Any) -> None:
    _end(opened)
    warnings.warn(
        "a context of mmhooks was dropped while it was open, and is closed now; keep it in a variable, or use it in a "
        "with statement",
        ResourceWarning,
        stacklevel=2,
    )


Cache = TypeVar("Cache")


class CacheContext(HookContext, Generic[Cache]):
    """A context that gives the cache it fills; the shapes of its sites go to ``shapes``."""

    if TYPE_CHECKING:

        def __enter__(self) -> Cache: ...

    def __init__(
        self, cache: Cache, shapes: MutableMapping[str, tuple[int, ...]], *args: Any, **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self._cache: Any = cache
        self._shapes = shapes

    def _gives(self) -> Any:
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
                f"{names} ran more than once inside this cache, which holds the last value of each (of generate(): its "
                "last step). Open one cache for each run, or collect the values with fwd_hooks=; strict=False is silent",
                MMHooksWarning,
                stacklevel=3,
            )


def _complaint(binding: Binding) -> str:
    sites = ", ".join(binding.sites[:4]) + (
        f" and {len(binding.sites) - 4} more" if len(binding.sites) > 4 else ""
    )
    return f"{binding.label} fired at none of its sites ({sites}): {binding.hint}; strict=False allows that"
