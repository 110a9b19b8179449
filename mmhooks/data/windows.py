"""The order in which rows reach a trainer that holds only some of them: windows of pairs, each shuffled as a whole.

Pairs come in random order (or in theirs, where a source can only be read from front to back) and are cut into windows. The
rows of a window are shuffled together and dealt as batches; those that do not fill the last batch are held for the next
window. Everything is a function of seed, epoch and window, so a run is resumed from the number of batches that it dealt, and
a stream and a store deal the same rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from mmhooks.data.store.pair_runs import PairRuns
from mmhooks.errors import MMHooksError


@dataclass(frozen=True)
class Windows:
    """How rows are shuffled.

    Attributes:
        pairs: how many pairs a window has.
        seed: of the order of the pairs and of the rows in their windows.
        in_order: whether pairs come in their own order.
    """

    pairs: int
    seed: int = 0
    in_order: bool = False

    def __post_init__(self) -> None:
        if self.pairs < 1:
            raise MMHooksError(f"windows: expected at least 1 pair in each, got {self.pairs}")

    def pair_order(self, count: int, epoch: int) -> Int[Tensor, " pairs"]:
        """The numbers of all pairs in the order of an epoch."""
        if self.in_order:
            return torch.arange(count)
        return torch.randperm(count, generator=self._generator(epoch, -1))

    def deal(self, epoch: int, window: int, held: int, own: int, size: int, *, last: bool) -> Dealt:
        """What becomes of a window's ``own`` rows and of the ``held`` ones, which come first in its table.

        Raises:
            MMHooksError: a window with fewer rows than a batch, unless it is the last.
        """
        if own < size and not last:
            raise MMHooksError(
                f"expected windows of at least {size} rows, a batch, got {own}; take a larger buffer or smaller batches"
            )
        generator = self._generator(epoch, window)
        order = torch.randperm(own, generator=generator) + held
        keep = 0 if last else (held + own) % size
        dealt = torch.cat([torch.arange(held), order[keep:]])
        return Dealt(dealt[torch.randperm(len(dealt), generator=generator)], order[:keep])

    def batches(
        self, runs: PairRuns, size: int, epoch: int, *, drop_last: bool = False
    ) -> Iterator[Int[Tensor, " b"]]:
        """The rows of each batch, of a table whose pairs are ``runs``."""
        pairs = self.pair_order(len(runs), epoch).split(self.pairs)
        held = torch.arange(0)
        for window, chosen in enumerate(pairs):
            own = runs.rows_of(chosen)
            last = window == len(pairs) - 1
            table = torch.cat([held, own])
            dealt = self.deal(epoch, window, len(held), len(own), size, last=last)
            yield from whole_batches(table[dealt.order], size, drop_last=drop_last)
            held = table[dealt.held]

    def _generator(self, epoch: int, window: int) -> torch.Generator:
        mixed = blake2b(f"{self.seed}/{epoch}/{window}".encode(), digest_size=7).digest()
        return torch.Generator().manual_seed(int.from_bytes(mixed, "big"))


class Dealt(NamedTuple):
    """Rows of a window's table: in the order of its batches, and those held for the next window."""

    order: Int[Tensor, " dealt"]
    held: Int[Tensor, " held"]


def whole_batches(order: Int[Tensor, " n"], size: int, *, drop_last: bool) -> Iterator[Int[Tensor, " b"]]:
    """``order`` in parts of ``size``; only a last window's is no multiple of it."""
    for part in order.split(size):
        if len(part) == size or (not drop_last and len(part)):
            yield part


@dataclass(frozen=True)
class Mixing:
    """How well an order mixes: how many different pairs a batch holds.

    Attributes:
        pairs_a_batch: mean over the batches of an epoch.
        at_best: what an order would give that shuffles all rows together.
    """

    pairs_a_batch: float
    at_best: float

    @property
    def share(self) -> float:
        """1: as many as in rows shuffled together."""
        return self.pairs_a_batch / self.at_best


def mixing(windows: Windows, runs: PairRuns, size: int, *, epoch: int = 0) -> Mixing:
    """Counts the pairs in the batches that an order deals; nothing is read or run.

    >>> runs = PairRuns(torch.arange(0, 1001, 10), None)  # 100 pairs of 10 tokens
    >>> mixing(Windows(pairs=100), runs, 100).share > 0.95, mixing(Windows(pairs=10), runs, 100).share < 0.2
    (True, True)
    """
    found = [len(runs.pair_of(rows).unique()) for rows in windows.batches(runs, size, epoch, drop_last=True)]
    if not found:
        raise MMHooksError(
            f"expected at least one batch of {size} rows, got {int(runs.starts[-1])} rows in all"
        )
    # Of a pair with c of n rows none is among size: (n - c choose size) / (n choose size).
    n, counts = runs.starts[-1].double(), runs.counts.double()
    log_none = (
        torch.lgamma(n - counts + 1) + torch.lgamma(n - size + 1)
        - torch.lgamma((n - counts - size + 1).clamp_min(1)) - torch.lgamma(n + 1)
    )  # fmt: skip
    none = torch.where(counts + size > n, torch.zeros_like(log_none), log_none.exp())
    return Mixing(sum(found) / len(found), float((1 - none).sum()))
