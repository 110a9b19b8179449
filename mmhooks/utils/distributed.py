"""Coordination of the processes that ``torchrun`` or ``accelerate launch`` starts for one job."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from typing import Any

from torch import distributed

from mmhooks.errors import MMHooksError, StoreError

# Ranks wait for the slowest one, which may finish days after the first.
_TIMEOUT = timedelta(days=14)


class Ranks:
    """This process's rank, the world size, and synchronisation; free of cost in a single process.

    Uses the existing process group. If the environment announces several ranks and there is none, creates a gloo
    group that lives until the process ends: a second group would clash with the addresses of the first.
    """

    def __init__(self) -> None:
        available = distributed.is_available()
        if available and not distributed.is_initialized() and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            distributed.init_process_group("gloo", timeout=_TIMEOUT)
            atexit.register(distributed.destroy_process_group)
        self.rank, self.world = rank_and_world()

    def barrier(self) -> None:
        if self.world > 1:
            distributed.barrier(group=_group())

    def first(self, act: Callable[[], Any]) -> Any:
        """Runs ``act`` on rank 0 while the others wait; every rank returns its result or raises its error."""
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
    """A gloo group of all ranks: a GPU group cannot transfer Python objects."""
    return distributed.new_group(backend="gloo", timeout=_TIMEOUT)


def rank_and_world() -> tuple[int, int]:
    """Rank of this process and the number of processes."""
    grouped = distributed.is_available() and distributed.is_initialized()
    return (distributed.get_rank(), distributed.get_world_size()) if grouped else (0, 1)
