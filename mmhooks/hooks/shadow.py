"""Attributes of one live module, shadowed for a while without writing into the module.

The module (or other object) gets a class of its own, a subclass of its class whose descriptors answer for the
shadowed names.
``__dict__``, parameters, submodules and ``state_dict`` stay as they are. A copy made meanwhile (``deepcopy``,
pickle) is of the original class; a replica (``DataParallel``) is passed to the shadow as itself, never as the
module that it was copied from. Shadows of one name stack, and are taken off in any order.
"""

from __future__ import annotations

import copyreg
from collections.abc import Callable
from copy import deepcopy
from threading import RLock
from typing import Any

Remove = Callable[[], None]
_LOCK = RLock()


class Shadow:
    """One shadow of ``name``: reading the attribute gives ``get(module, below)``, ``below`` what was there before."""

    def __init__(self, name: str, get: Callable[[Any, Any], Any]) -> None:
        self.name, self.get = name, get
        self._classes: dict[Any, type] = {}  # made once: contexts come and go by the batch

    def __deepcopy__(self, memo: dict[int, Any]) -> Shadow:
        return Shadow(self.name, deepcopy(self.get, memo))  # the classes answer for the original's ``get``

    def cast(self, module: Any) -> Remove:
        """Shadows ``module.<name>``; returns the function that takes exactly this shadow off."""
        with _LOCK:
            _put(module, (*_shadows(module), self))

        def remove() -> None:
            with _LOCK:
                rest = list(_shadows(module))
                rest.remove(self)  # one of them, where the module is under this shadow several times
                _put(module, tuple(rest))

        return remove


def _shadows(module: Any) -> tuple[Shadow, ...]:
    return type(module).__dict__.get("_mmhooks_shadows", ())


def _put(module: Any, shadows: tuple[Shadow, ...]) -> None:
    base = type(module).__dict__.get("_mmhooks_base", type(module))
    if shadows:
        made, key = shadows[-1]._classes, (base, shadows)
        base = made[key] if key in made else made.setdefault(key, _subclass(base, shadows))
    object.__setattr__(module, "__class__", base)


def _subclass(base: type, shadows: tuple[Shadow, ...]) -> type:
    names = dict.fromkeys(s.name for s in shadows)
    ours = {name: _Descriptor(name, base, tuple(s.get for s in shadows if s.name == name)) for name in names}
    same = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    marks = {"_mmhooks_base": base, "_mmhooks_shadows": shadows}
    made = type(base)(base.__name__, (base,), {**same, **marks, **ours, "__reduce_ex__": _reduce})
    # The base's __init_subclass__ may have put things in: transformers' layers wrap forward for checkpointing.
    if "forward" in vars(made) and "forward" not in ours:
        del made.forward
    for name, descriptor in ours.items():
        descriptor.owner = made
        setattr(made, name, descriptor)
    return made


def _reduce(self: Any, protocol: Any) -> Any:
    """Copies and pickles are of the class that the module has without shadows."""
    own, base = type(self), type(self)._mmhooks_base
    make, args, *rest = super(own, self).__reduce_ex__(protocol)
    if make is copyreg.__newobj__:  # type: ignore[attr-defined] - pickle compares its class with the object's
        return (copyreg._reconstructor, (base, object, None), *rest)  # type: ignore[attr-defined]
    return (make, tuple(base if a is own else a for a in args), *rest)


class _Descriptor:
    """A data descriptor, so that it answers even where the instance has the attribute itself."""

    owner: type

    def __init__(self, name: str, base: type, gets: tuple[Callable[..., Any], ...]) -> None:
        self.name, self.base, self.gets = name, base, gets

    def __get__(self, module: Any, owner: Any = None) -> Any:
        if module is None:
            return getattr(self.base, self.name)
        if self.name in module.__dict__:
            value = module.__dict__[self.name]
        elif hasattr(self.base, self.name):
            value = getattr(super(self.owner, module), self.name)
        else:
            value = module.__getattr__(self.name)  # where nn.Module keeps parameters and buffers
        for get in self.gets:
            value = get(module, value)
        return value

    def __set__(self, module: Any, value: Any) -> None:
        module.__dict__[self.name] = value

    def __delete__(self, module: Any) -> None:
        del module.__dict__[self.name]
