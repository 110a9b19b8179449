"""Temporarily shadows attributes of one live object without writing to its ``__dict__``.

The object, usually a module, gets a class of its own: a subclass of its class whose descriptors answer for the shadowed
names. ``__dict__``, parameters, submodules and ``state_dict`` do not change. A copy made meanwhile (``deepcopy``,
pickle, the class's own ``__deepcopy__``) has the original class and none of our hooks; a replica (``DataParallel``) is
passed to the shadow as itself, never as the module it was copied from. Shadows of one name stack, and can be removed in
any order, even from beneath a class that another library has added meanwhile (``parametrize``, ``fully_shard``).

Installing and removing are idempotent: repeating them completes what an interrupt left unfinished.
"""

from __future__ import annotations

import copyreg
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import wraps
from threading import RLock
from typing import Any

_LOCK = RLock()
MARK = "mmhooks_tap"  # an attribute of the hooks that taps register, which copies omit
_HOOKS = {
    "_forward_hooks": ("_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    "_forward_pre_hooks": ("_forward_pre_hooks_with_kwargs",),
}


class Shadow:
    """A shadow of ``name``: reading the attribute returns ``get(module, below)``, with ``below`` the shadowed value."""

    def __init__(self, name: str, get: Callable[[Any, Any], Any]) -> None:
        self.name, self.get = name, get
        self._classes: dict[Any, type] = {}  # created once, since contexts may open and close at every batch

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_classes": {}}

    def __deepcopy__(self, memo: dict[int, Any]) -> Shadow:
        return Shadow(self.name, deepcopy(self.get, memo))  # the classes answer for the original's ``get``

    @property
    def used(self) -> bool:
        """Whether it was ever installed."""
        return bool(self._classes)

    def install(self, module: Any) -> None:
        """Shadows ``module.<name>``; does nothing if this shadow is installed already."""
        with _LOCK:
            base, below = type(module), ()
            if hasattr(base, "_mmhooks_shadows"):
                if any(self in shadows for _, shadows in _classes_with_shadows(base)):
                    return
                base, below = _base(base), vars(base).get("_mmhooks_shadows", ())
            object.__setattr__(module, "__class__", _shadowed(base, (*below, self)))

    def remove(self, module: Any) -> None:
        """Removes exactly this shadow, if installed."""
        with _LOCK:
            if type(module).__dict__.get("_mmhooks_shadows") == (self,):  # the common case
                object.__setattr__(module, "__class__", type(module)._mmhooks_base)
                return
            for kind, shadows in [*_classes_with_shadows(type(module))]:
                if self in shadows:
                    rest = tuple(s for s in shadows if s is not self)
                    _replace(module, kind, _shadowed(_base(kind), rest))


def own_forward(module: Any) -> Callable[..., Any]:
    """A module's ``forward`` without shadows: the one set on the object, else that of its class."""
    if "forward" in vars(module):
        return vars(module)["forward"]
    classes = (kind for kind in type(module).__mro__ if "_mmhooks_shadows" not in vars(kind))
    return next(vars(kind)["forward"] for kind in classes if "forward" in vars(kind)).__get__(module)


def _base(kind: type) -> type:
    """The class without shadows."""
    return vars(kind).get("_mmhooks_base", kind)


def _classes_with_shadows(kind: Any) -> Iterator[tuple[type, tuple[Shadow, ...]]]:
    """The classes with shadows, topmost first; several only if another library's class lies between them."""
    while hasattr(kind, "_mmhooks_shadows"):
        kind = next(k for k in kind.__mro__ if "_mmhooks_shadows" in k.__dict__)
        yield kind, kind._mmhooks_shadows
        kind = kind._mmhooks_base


def _replace(module: Any, old: type, new: type) -> None:
    if type(module) is old:
        object.__setattr__(module, "__class__", new)
        return
    for kind in type(module).__mro__:  # another library has put a per-module class on top
        if old in kind.__bases__:
            kind.__bases__ = tuple(new if base is old else base for base in kind.__bases__)


def _shadowed(base: type, shadows: tuple[Shadow, ...]) -> type:
    if not shadows:
        return base
    made, key = shadows[-1]._classes, (base, shadows)
    return made.get(key) or made.setdefault(key, _subclass(base, shadows))


def _subclass(base: type, shadows: tuple[Shadow, ...]) -> type:
    names = dict.fromkeys(s.name for s in shadows)
    ours = {name: _Descriptor(name, base, tuple(s.get for s in shadows if s.name == name)) for name in names}
    same = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    marks = {"_mmhooks_base": base, "_mmhooks_shadows": shadows}
    made = type(base)(base.__name__, (base,), {**same, **marks, **_copy_methods(base), **ours})
    # The base's __init_subclass__ may add attributes: transformers' layers wrap forward for checkpointing.
    if "forward" in vars(made) and "forward" not in ours:
        del made.forward
    for name, descriptor in ours.items():
        setattr(made, name, descriptor)
    return made


def _copy_methods(base: Any) -> dict[str, Any]:
    """Methods that create another object from a shadowed one; the copy has the class without shadows."""

    def reduce(self: Any, protocol: Any) -> Any:
        made = base.__reduce_ex__(self, protocol)
        if isinstance(made, str):
            return made
        make, args, *rest = made
        if rest and isinstance(rest[0], dict):
            rest[0] = _without_our_hooks(rest[0])
        args = tuple(_base(a) if isinstance(a, type) else a for a in args)
        if make is copyreg.__newobj__:  # type: ignore[attr-defined] - pickle compares its class with the object's
            return (copyreg._reconstructor, (args[0], object, None), *rest)  # type: ignore[attr-defined]
        return (make, args, *rest)

    @wraps(base.__init__)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:  # ``type(module)(...)``
        object.__setattr__(self, "__class__", base)
        base.__init__(self, *args, **kwargs)

    makers: dict[str, Any] = {"__reduce_ex__": reduce, "__init__": init}
    for name in ("__deepcopy__", "__copy__"):
        if hasattr(base, name):
            makers[name] = _without_shadow(getattr(base, name))
    return makers


def _without_shadow(copy: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(copy)
    def bare(self: Any, *memo: Any) -> Any:
        new = copy(self, *memo)
        if new is not self and type(new) is not _base(type(new)):
            object.__setattr__(new, "__class__", _base(type(new)))
        if new is not self and isinstance(getattr(new, "__dict__", None), dict):
            new.__dict__.update(_without_our_hooks(vars(new)))
        return new

    return bare


def _without_our_hooks(state: dict[str, Any]) -> dict[str, Any]:
    state = dict(state)
    for name, companions in _HOOKS.items():
        ours = [number for number, hook in state.get(name, {}).items() if hasattr(hook, MARK)]
        for table in (name, *companions) if ours else ():
            if table in state:
                state[table] = type(state[table])((k, v) for k, v in state[table].items() if k not in ours)
    return state


class _Descriptor:
    """A data descriptor, which takes precedence over an attribute in the instance's ``__dict__``."""

    def __init__(self, name: str, base: type, gets: tuple[Callable[..., Any], ...]) -> None:
        self.name, self.base, self.gets = name, base, gets

    def __get__(self, module: Any, owner: Any = None) -> Any:
        if module is None:
            return getattr(self.base, self.name)
        value = self._below(module)
        for get in self.gets:
            value = get(module, value)
        return value

    def _below(self, module: Any) -> Any:
        if self.name in module.__dict__:
            return module.__dict__[self.name]
        # Not super(): another thread may change the module's class in between.
        for kind in self.base.__mro__:
            if self.name in vars(kind):
                found = vars(kind)[self.name]
                bind = getattr(type(found), "__get__", None)
                return found if bind is None else bind(found, module, self.base)
        return module.__getattr__(self.name)  # parameters and buffers of nn.Module

    def __set__(self, module: Any, value: Any) -> None:
        module.__dict__[self.name] = value

    def __delete__(self, module: Any) -> None:
        del module.__dict__[self.name]
