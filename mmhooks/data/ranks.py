"""Several processes on one job, as ``torchrun`` and ``accelerate launch`` start them."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from torch import distributed

from mmhooks.errors import MMHooksError, StoreError

# Ranks wait for the slowest: days may pass between the first and the last to end.
_PATIENCE = timedelta(days=14)


class Ranks:
    """Which of how many processes this is, and what they wait for; alone, none of it costs anything.

    Uses the process group that is there; else makes one (gloo) where the environment names other ranks, and
    takes it down again.
    """

    def __init__(self) -> None:
        self._own = False
        self._group: Any = None

    def __enter__(self) -> Ranks:
        if (
            distributed.is_available()
            and not distributed.is_initialized()
            and int(os.environ.get("WORLD_SIZE", 1)) > 1
        ):
            distributed.init_process_group("gloo", timeout=_PATIENCE)
            self._own = True
        if distributed.is_available() and distributed.is_initialized():
            self.rank, self.world = distributed.get_rank(), distributed.get_world_size()
            if self.world > 1:
                self._group = distributed.new_group(backend="gloo", timeout=_PATIENCE)
        else:
            self.rank, self.world = 0, 1
        return self

    def __exit__(self, *_: object) -> None:
        if self._own:
            distributed.destroy_process_group()

    def barrier(self) -> None:
        if self.world > 1:
            distributed.barrier(group=self._group)

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
        distributed.broadcast_object_list(outcome, src=0, group=self._group)
        if outcome[1] is not None:
            raise fault or StoreError(f"rank 0: {outcome[1]}")
        return outcome[0]
