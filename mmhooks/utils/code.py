"""Inspects Python code for digests: where it comes from, which globals it reads, what its source defines."""

from __future__ import annotations

import dis
import os
import site
import sys
import sysconfig
import types
from functools import cached_property
from typing import Any

# What Python or a decorator adds to a class, beyond what its source defines.
_ADDED = frozenset(vars(type("Empty", (), {}))) | {
    *("__qualname__", "__annotations__", "__annotate__", "__annotate_func__", "__hash__", "__slots__"),
    *("__firstlineno__", "__static_attributes__", "__abstractmethods__", "_abc_impl", "__parameters__"),
    *("__dataclass_fields__", "__dataclass_params__", "__match_args__", "__orig_bases__", "__slotnames__"),
}
_WRITTEN_IN_C = (
    types.MemberDescriptorType,
    types.GetSetDescriptorType,
    types.MethodDescriptorType,
    types.ClassMethodDescriptorType,
    types.WrapperDescriptorType,
    types.BuiltinFunctionType,
)
_LIBRARIES = tuple(
    f"{folder}{os.sep}"
    for folder in {
        *(sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib", "platstdlib")),
        *site.getsitepackages(),
    }
)
_OWN = __name__.partition(".")[0]


def full_name(thing: Any) -> str:
    """``module.qualified.name``."""
    return f"{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', '')}"


def is_library(module: str | None) -> bool:
    """Whether a module belongs to an installed package, to Python itself, or to mmhooks."""
    if not module or module == "__main__":
        return False
    package = module.partition(".")[0]
    if package == _OWN or package in sys.builtin_module_names:
        return True
    for name in (module, package):  # parts of C extensions have no file of their own
        source = getattr(sys.modules.get(name), "__file__", None)
        if source is not None:
            return source.startswith(_LIBRARIES)
    return False


def written_in(kind: type) -> dict[str, Any]:
    """The attributes defined in the body of a class, sorted by name, without the descriptors around them."""
    return {k: _plain_part(v) for k, v in sorted(vars(kind).items()) if k not in _ADDED}


def _plain_part(part: Any) -> Any:
    """The source-level value of one class attribute, without the descriptor around it."""
    if isinstance(part, (staticmethod, classmethod)):
        return part.__func__
    if isinstance(part, property):
        return (part.fget, part.fset)
    if isinstance(part, cached_property):
        return part.func
    return None if isinstance(part, _WRITTEN_IN_C) else part


def resolves_by_name(function: types.FunctionType) -> bool:
    """Whether looking up the function's qualified name gives this function, so that the name identifies it."""
    thing: Any = sys.modules.get(function.__module__)
    for part in function.__qualname__.split("."):
        thing = getattr(thing, part, None)
    return thing is function


def globals_read(code: types.CodeType) -> set[str]:
    """Names of the globals that code reads, nested functions included."""
    names = {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    for part in code.co_consts:
        if isinstance(part, types.CodeType):
            names |= globals_read(part)
    return names
