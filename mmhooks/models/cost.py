"""What one call of a model costs: FLOPs, and peak bytes of activations, counted on the meta device without weights.

FLOPs are torch's own count (:class:`torch.utils.flop_counter.FlopCounterMode`: matrix products and convolutions, a
multiplication and an addition each one; elementwise arithmetic is not counted). On the meta device attention is not
fused, so its scores count as activations: an upper bound for a GPU, which fuses it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Cost:
    """What one call takes.

    Attributes:
        flops: of matrix products and convolutions, those of a backward pass included.
        activations: peak bytes of tensors that the call made, gradients included.
        weights: bytes of parameters and buffers, read at least once in a call.
        inputs: bytes of other tensors that are read whole, such as a cache of keys and values.
        operators: that compute, views apart: each is at least one kernel to launch.
    """

    flops: int
    activations: int
    weights: int
    inputs: int = 0
    operators: int = 0

    @property
    def memory(self) -> int:
        """Bytes that are held at the peak."""
        return self.weights + self.inputs + self.activations

    @property
    def traffic(self) -> int:
        """Bytes that are read at the least."""
        return self.weights + self.inputs


class PeakMemory(TorchDispatchMode):
    """While open, adds up the storages of new tensors, views apart, and keeps the largest sum as ``peak``; counts the
    ``operators`` that are no views.

    >>> import torch
    >>> with PeakMemory() as memory:
    ...     x = torch.zeros(1000, device="meta"); y = (x + 1) * 2
    >>> memory.peak  # x, x + 1 and y, of 4,000 bytes each
    12000
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.operators = 0
        self._known: dict[int, weakref.finalize] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        # Storages of inputs are older than the call: only those that an operator makes are counted.
        given = {_key(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        self.operators += not getattr(func, "is_view", False)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and _key(tensor) not in given:
                self._add(tensor)
        return out

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = _key(tensor)
        if key in self._known:  # a view of something made earlier
            return
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        self._known[key] = weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.pop(key, None)
        self.live -= size


def cost_of(call: Callable[[], Any], *modules: nn.Module, inputs: int = 0) -> Cost:
    """Counts what ``call()`` takes; ``modules`` are those whose weights it reads.

    >>> import torch
    >>> layer = nn.Linear(16, 4, bias=False, device="meta")
    >>> cost_of(lambda: layer(torch.zeros(8, 16, device="meta")), layer).flops == 2 * 8 * 16 * 4
    True
    """
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with counter, PeakMemory() as memory:
        made = call()
    peak = memory.peak
    del made  # what the call returns was held at its end
    return Cost(counter.get_total_flops(), peak, weight_bytes(*modules), inputs, memory.operators)


def weight_bytes(*modules: nn.Module) -> int:
    """Bytes of all different parameters and buffers."""
    tensors = [t for m in modules for t in (*m.parameters(), *m.buffers())]
    return sum(t.nbytes for t in {id(t): t for t in tensors}.values())


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
