"""The row order of shuffled batches: runs of rows in random order, and random rows within a window of runs.

A window is read completely before the next one begins, so a store far larger than memory is read once and in large
pieces. Everything is a function of the seed and the epoch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import blake2b
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

WINDOW, RUN = 16_384, 2048
Run = tuple[int, int]


def generator(seed: int, epoch: int) -> np.random.Generator:
    """An independent generator for each seed and epoch."""
    mixed = blake2b(f"{seed}/{epoch}".encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(mixed, "big"))


def windows(cuts: Sequence[int], size: int, rng: np.random.Generator, *, run: int = RUN) -> list[list[Run]]:
    """Runs of rows in random order, grouped into windows of at least ``size`` rows.

    Args:
        cuts: first rows of shards, and the number of rows; a shard of more than ``run`` rows is split into several runs.

    >>> sorted(windows([0, 2, 4], 2, generator(0, 0)))
    [[(0, 2)], [(2, 4)]]
    """
    runs = [
        (start, min(start + run, end)) for begin, end in pairwise(cuts) for start in range(begin, end, run)
    ]
    found: list[list[Run]] = []
    held = size
    for i in rng.permutation(len(runs)).tolist():
        if held >= size:
            found.append([])
            held = 0
        found[-1].append(runs[i])
        held += runs[i][1] - runs[i][0]
    return found


class Mixer:
    """Draws random batches from the rows of runs, uniformly over all ways to split them into batches.

    Within a batch the rows of a run are adjacent, so that they are gathered shard by shard in one pass: the number of
    rows from each run is drawn first (multivariate hypergeometric), then which of them, by shuffling the run.
    """

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        # torch shuffles several times faster than numpy, but only numpy has the hypergeometric distribution.
        self._shuffle = torch.Generator().manual_seed(int(rng.integers(2**62)))
        self._rows: list[Tensor] = []  # what is left of each run, shuffled

    def add(self, runs: Sequence[Run]) -> None:
        for begin, end in runs:
            self._rows.append(torch.randperm(end - begin, generator=self._shuffle) + begin)

    def __len__(self) -> int:
        return sum(map(len, self._rows))

    def hold_back(self, size: int) -> list[Tensor]:
        """Removes ``size`` random rows of the run added last (and of those before it, if it has fewer).

        Of one run, not of all: otherwise pieces of many runs would be carried from window to window, each gathered
        separately.
        """
        held: list[Tensor] = []
        while size:
            rows = self._rows.pop()
            kept = max(0, len(rows) - size)
            held.append(rows[kept:])
            size -= len(rows) - kept
            if kept:
                self._rows.append(rows[:kept])
        return held

    def put_back(self, held: Sequence[Tensor]) -> None:
        self._rows.extend(held)

    def deal(self, size: int) -> tuple[Int[Tensor, " b"], list[int]]:
        """``size`` of the remaining rows, and how many of them are from each run."""
        left = [len(rows) for rows in self._rows]
        counts = left if size == sum(left) else self._rng.multivariate_hypergeometric(left, size).tolist()
        dealt = [rows[:count] for rows, count in zip(self._rows, counts, strict=True) if count]
        self._rows = [rows[n:] for rows, n in zip(self._rows, counts, strict=True) if n < len(rows)]
        return torch.cat(dealt), [len(rows) for rows in dealt]


def batches(
    plan: Sequence[Sequence[Run]], size: int, rng: np.random.Generator, *, drop_last: bool
) -> Iterator[tuple[int, Int[Tensor, " b"], list[int]]]:
    """``(window, rows, number of rows per run)`` for every batch; a window's remainder goes into the next window."""
    mixer = Mixer(rng)
    held: list[Tensor] = []
    for number, runs in enumerate(plan):
        mixer.put_back(held)
        mixer.add(runs)
        held = mixer.hold_back(len(mixer) % size)
        for _ in range(len(mixer) // size):
            yield number, *mixer.deal(size)
    mixer.put_back(held)
    if len(mixer) and not drop_last:
        yield len(plan) - 1, *mixer.deal(len(mixer))
