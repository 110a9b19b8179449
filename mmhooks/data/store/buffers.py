"""Reusable memory for batches: fresh pages cost three times as much as filling them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from math import prod

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

Allocate = Callable[[Sequence[int], torch.dtype], Tensor]


def allocate(shape: Sequence[int], dtype: torch.dtype) -> Shaped[Tensor, "..."]:
    return torch.empty(*shape, dtype=dtype)


class Buffers:
    """Allocates uninitialised tensors, reusing memory that no tensor refers to any more.

    >>> buffers = Buffers()
    >>> first = buffers.empty((2, 3), torch.float32); place = first.data_ptr()
    >>> buffers.empty((2, 3), torch.float32).data_ptr() == place
    False
    >>> del first
    >>> buffers.empty((2, 3), torch.float32).data_ptr() == place
    True
    """

    def __init__(self, keep: int = 8) -> None:
        self._keep = keep
        self._held: list[np.ndarray] = []

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Shaped[Tensor, "..."]:
        size = prod(shape) * dtype.itemsize
        if size == 0:
            return allocate(shape, dtype)
        for i in range(len(self._held)):
            # Two references, the list and the argument of getrefcount: no tensor holds it.
            if self._held[i].nbytes == size and sys.getrefcount(self._held[i]) == 2:
                return self._view(self._held[i], shape, dtype)
        memory = np.empty(size, np.uint8)
        if len(self._held) < self._keep:
            self._held.append(memory)
        return self._view(memory, shape, dtype)

    @staticmethod
    def _view(memory: np.ndarray, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.frombuffer(memory, dtype=dtype).view(*shape)
