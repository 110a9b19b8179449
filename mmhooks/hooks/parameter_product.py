"""A tap for a product ``x @ parameter`` that no module owns, such as a tower's last projection.

The tower's own code reads a proxy that multiplies like the parameter and exposes the product; all other code reads the
parameter itself.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from mmhooks.hooks.dispatch import programs_at
from mmhooks.hooks.shadow import Shadow
from mmhooks.hooks.taps import ShadowTap


class ParameterProduct(ShadowTap):
    """Tap of ``x @ parameter`` without a module of its own: leaf ``in`` is ``x``, leaf ``out`` the product.

    While installed, the module's own methods read a proxy that multiplies like the parameter. All other code reads the
    parameter itself, since a product computed by the user is not the tower's. ``state_dict`` and ``parameters()`` do
    not change, and the module's own code runs unmodified.
    """

    leaves = ("in", "out")

    def __init__(self, module: nn.Module, name: str) -> None:
        self.name = name
        super().__init__(module, Shadow(name, self._read))

    @property
    def key(self) -> Hashable:
        return (type(self), id(self.owner), self.name)

    def _read(self, module: nn.Module, parameter: Any) -> Any:
        if module is not self.owner or programs_at(self) is None:
            return parameter
        # Compiled code has no frames to inspect; there, products computed by hooks inside the tower count as its own.
        own = is_compiling() or _read_by_own_method(module)
        return _ParameterProxy(self, parameter) if own else parameter


def _read_by_own_method(module: nn.Module) -> bool:
    """Whether the attribute is being read by one of the module's own methods."""
    frame = sys._getframe(1)
    while frame is not None and _is_internal(frame.f_code.co_filename):
        frame = frame.f_back  # type: ignore[assignment]
    if frame is None or not frame.f_code.co_argcount:
        return False
    code = frame.f_code
    if frame.f_locals.get(code.co_varnames[0]) is not module:
        return False
    names = code.co_qualname.rpartition(".")
    if any(kind.__qualname__ == names[0] for kind in type(module).__mro__):
        return True
    instance_method = vars(module).get(code.co_name)  # a method of this instance alone
    return getattr(getattr(instance_method, "__func__", instance_method), "__code__", None) is code


_OURS = (__file__, sys.modules[Shadow.__module__].__file__ or "")


def _is_internal(file: str) -> bool:
    """Whether a frame lies between the reader and this module: our own frames and those of run-time type checks."""
    return file in _OURS or "jaxtyping" in file or file.startswith("<@beartype")


class _ParameterProxy:
    """Stands in for the parameter of a :class:`ParameterProduct` in its module's code."""

    def __init__(self, tap: ParameterProduct, parameter: Any) -> None:
        self._tap, self._parameter = tap, parameter

    def __getattr__(self, name: str) -> Any:
        return getattr(self._parameter, name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.Tensor.__matmul__, torch.Tensor.matmul, torch.matmul) and isinstance(args[1], cls):
            x, factor = args[0], args[1]
            programs = programs_at(factor._tap)
            if programs is None:
                return x @ factor._parameter
            if "in" in programs:
                x = programs["in"](x)
            product = x @ factor._parameter
            return programs["out"](product) if "out" in programs else product
        plain = [a._parameter if isinstance(a, cls) else a for a in args]
        return func(*plain, **{k: v._parameter if isinstance(v, cls) else v for k, v in kwargs.items()})


def _delegated(name: str) -> Callable[..., Any]:
    def operator(self: _ParameterProxy, *args: Any) -> Any:
        return getattr(self._parameter, name)(*args)

    return operator


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul"):
    for _operator in (f"__{_name}__", f"__r{_name}__"):
        if hasattr(Tensor, _operator):
            setattr(_ParameterProxy, _operator, _delegated(_operator))
for _name in (
    "neg",
    "abs",
    "invert",
    "getitem",
    "len",
    "iter",
    "bool",
    "float",
    "int",
    "lt",
    "le",
    "gt",
    "ge",
):
    setattr(_ParameterProxy, f"__{_name}__", _delegated(f"__{_name}__"))
