"""Several processes on one job, as ``torchrun`` and ``accelerate launch`` start them."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from typing import Any

from torch import distributed

from mmhooks.errors import MMHooksError, StoreError

# Ranks wait for the slowest: days may pass between the first and the last to end.
_PATIENCE = timedelta(days=14)


class Ranks:
    """Which of how many processes this is, and what they wait for; alone, none of it costs anything.

    Uses the process group that is there; where the environment names other ranks and there is none, makes
    one (gloo), which stays until the process ends: a second one would meet the addresses of the first.
    """

    def __init__(self) -> None:
        there = distributed.is_available()
        if there and not distributed.is_initialized() and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            distributed.init_process_group("gloo", timeout=_PATIENCE)
            atexit.register(distributed.destroy_process_group)
        self.rank, self.world = processes()

    def barrier(self) -> None:
        if self.world > 1:
            distributed.barrier(group=_group())

    def first(self, act: Callable[[], Any]) -> Any:
        """Rank 0 acts while the others wait; all get what it returns, or raise what it raised."""
        if self.world == 1:
            return act()
        result: Any = None
        fault: MMHooksError | None = None
        if self.rank == 0:
            try:
                result = act()
            except MMHooksError as raised:
                fault = raised
        outcome = [result, None if fault is None else str(fault)]
        distributed.broadcast_object_list(outcome, src=0, group=_group())
        if outcome[1] is not None:
            raise fault or StoreError(f"rank 0: {outcome[1]}")
        return outcome[0]


@cache
def _group() -> Any:
    """All ranks, by way of the network: a group for GPUs cannot carry objects of the CPU."""
    return distributed.new_group(backend="gloo", timeout=_PATIENCE)


def processes() -> tuple[int, int]:
    """Rank of this process, and how many work together."""
    together = distributed.is_available() and distributed.is_initialized()
    return (distributed.get_rank(), distributed.get_world_size()) if together else (0, 1)
