"""Several processes that train one head: each takes a share of every batch, gradients are averaged.

Started with ``accelerate launch`` (or torchrun), on CPUs or a GPU each; alone, nothing here costs anything. The
averaged gradient is that of the whole batch, so a run with two processes follows the run with one up to the order
in which numbers are added.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from mmhooks.errors import MMHooksError


class Team:
    """This process among its peers. ``device`` is where it trains."""

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
    def leads_here() -> bool:
        """Whether this process is the first of its peers, asked outside a training."""
        return os.environ.get("RANK", "0") == "0"

    @property
    def leads(self) -> bool:
        """Whether this process writes files and shows the bar."""
        return self.rank == 0

    def check_batch(self, batch: int) -> None:
        if batch % self.size:
            raise MMHooksError(
                f"a batch of {batch} pairs cannot be shared evenly by {self.size} processes; choose batch_size= as a "
                f"multiple of {self.size}, such as {max(1, batch // self.size) * self.size}"
            )

    def share(self, rows: Int[Tensor, " b"]) -> Int[Tensor, " s"]:
        """The part of a batch that this process computes."""
        return rows.chunk(self.size)[self.rank] if self.size > 1 else rows

    def mean(self, x: Tensor) -> Tensor:
        """Average over the processes."""
        return x if self.size == 1 else self._accelerator.reduce(x.detach().clone(), "mean")

    def any(self, flags: Bool[Tensor, " n"]) -> Bool[Tensor, " n"]:
        """True where any process says so."""
        return flags if self.size == 1 else self._accelerator.reduce(flags.float(), "sum") > 0

    @torch.no_grad()
    def average_(self, tensors: Iterable[Tensor | None]) -> None:
        """Replaces each tensor by its average over the processes."""
        if self.size > 1:
            for x in tensors:
                if x is not None and x.is_floating_point():
                    x.copy_(self.mean(x))

    @torch.no_grad()
    def agree_(self, head: nn.Module) -> None:
        """Everyone takes the first process's weights."""
        if self.size > 1:
            from accelerate.utils import broadcast

            for x in head.state_dict().values():
                x.copy_(broadcast(x.detach().clone(), from_process=0))

    def wait(self) -> None:
        if self.size > 1:
            self._accelerator.wait_for_everyone()
