"""Data-parallel training of one head: each process takes a part of every batch, and gradients are averaged.

Started with ``accelerate launch`` (or torchrun), on CPUs or one GPU each; free of cost in a single process. The averaged
gradient is that of the whole batch, so a run with two processes equals one with a single process up to the order of
summation.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mmhooks.errors import MMHooksError


class Processes:
    """The processes of a training run, seen from this one. ``device`` is where this one trains."""

    def __init__(self, head: nn.Module) -> None:
        self.device = next(head.parameters()).device
        self._accelerator: Any = None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import Accelerator

            self._accelerator = Accelerator()
            self.device = self._accelerator.device
        self.size = self._accelerator.num_processes if self._accelerator else 1
        self.rank = self._accelerator.process_index if self._accelerator else 0

    @staticmethod
    def is_first_process() -> bool:
        """Whether this is the first process, outside of a training run."""
        return os.environ.get("RANK", "0") == "0"

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and shows the bar."""
        return self.rank == 0

    def check_batch(self, batch: int) -> None:
        if batch % self.size:
            raise MMHooksError(
                f"expected a batch that {self.size} processes can split evenly, got {batch} pairs; choose batch_size= as "
                f"a multiple of {self.size}, such as {max(1, batch // self.size) * self.size}"
            )

    def part_of(self, rows: Int[Tensor, " b"]) -> Int[Tensor, " s"]:
        """The part of a batch that this process computes."""
        return rows.chunk(self.size)[self.rank] if self.size > 1 else rows

    def mean(self, x: Tensor) -> Tensor:
        """Average over the processes."""
        return x if self.size == 1 else self._accelerator.reduce(x.detach().clone(), "mean")

    def gather(self, rows: Float[Tensor, "b d"]) -> Float[Tensor, "_ d"]:
        """The rows of all processes, the same in each."""
        return rows if self.size == 1 else self._accelerator.gather(rows.contiguous())

    def any(self, flags: Bool[Tensor, " n"]) -> Bool[Tensor, " n"]:
        """True where it is in any process."""
        return flags if self.size == 1 else self._accelerator.reduce(flags.float(), "sum") > 0

    @torch.no_grad()
    def average_(self, tensors: Iterable[Tensor | None]) -> None:
        """Replaces each tensor by its mean over the processes."""
        if self.size > 1:
            for x in tensors:
                if x is not None and x.is_floating_point():
                    x.copy_(self.mean(x))

    @torch.no_grad()
    def broadcast_(self, head: nn.Module) -> None:
        """Copies the first process's weights to all others."""
        if self.size > 1:
            from accelerate.utils import broadcast

            for x in head.state_dict().values():
                x.copy_(broadcast(x.detach().clone(), from_process=0))

    def wait(self) -> None:
        if self.size > 1:
            self._accelerator.wait_for_everyone()
