"""Temporary evaluation mode, restored module by module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from weakref import WeakKeyDictionary

from torch import nn

_LOCK = Lock()
# How many open blocks hold a module in evaluation mode, and its mode before the first of them. Blocks of several
# threads overlap in any order, so the mode is restored by the last block to end, not by the one that began first.
_HELD: WeakKeyDictionary[nn.Module, tuple[int, bool]] = WeakKeyDictionary()


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Puts ``modules`` and all their submodules into evaluation mode for a block, and restores each one's mode after it.

    Dropout, patch dropout and batch statistics would make results random, and running a model over data would change
    its batch statistics. Only the flags are set, since ``eval()`` of some adapters merges weights. Modes are restored
    after exceptions too; a mode set inside the block does not outlive it.

    >>> model = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
    >>> with evaluating(model):
    ...     [m.training for m in model.modules()]
    [False, False, False]
    >>> [m.training for m in model.modules()]
    [True, True, False]
    """
    held = list(dict.fromkeys(m for module in modules for m in module.modules()))
    with _LOCK:
        for module in held:
            count, before = _HELD.get(module, (0, module.training))
            _HELD[module] = (count + 1, before)
            module.training = False
    try:
        yield
    finally:
        with _LOCK:
            for module in held:
                count, before = _HELD.pop(module)
                if count > 1:
                    _HELD[module] = (count - 1, before)
                else:
                    module.training = before
