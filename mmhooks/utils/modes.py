"""Evaluation mode for the length of a block, put back module by module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from weakref import WeakKeyDictionary

from torch import nn

_LOCK = Lock()
# How many open blocks hold a module in evaluation mode, and the mode that it had before the first of them. Blocks of
# several threads overlap in any order, so the last one to end puts the mode back, not the one that was there first.
_HELD: WeakKeyDictionary[nn.Module, tuple[int, bool]] = WeakKeyDictionary()


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Everything below ``modules`` is in evaluation mode inside the block, and each in its own mode after it.

    Dropout, patch dropout and batch statistics would make results random, and running a model over data would change
    its batch statistics. Only the flags are set: ``eval()`` of some adapters merges weights. Modes come back after
    exceptions too. A mode that is set inside the block does not outlive it.

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
