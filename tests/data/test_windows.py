"""The order of windows: every row once, the same from the same numbers, gone on with from any batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmhooks.data.store.pair_runs import PairRuns
from mmhooks.data.windows import Windows, mixing
from mmhooks.errors import MMHooksError


def runs_of(counts: list[int]) -> PairRuns:
    return PairRuns(torch.tensor([0, *counts]).cumsum(0), None)


@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=40),
    size=st.integers(1, 8),
    seed=st.integers(0, 3),
    epoch=st.integers(0, 3),
)
@settings(max_examples=150, deadline=None)
def test_every_row_comes_once_and_only_the_last_batch_is_smaller(counts, size, seed, epoch):
    runs = runs_of(counts)
    windows = Windows(pairs=8, seed=seed)  # 8 pairs have at least 8 rows: a batch
    found = list(windows.batches(runs, size, epoch))
    assert torch.cat(found).sort().values.tolist() == list(range(sum(counts)))
    assert [len(b) for b in found[:-1]] == [size] * (len(found) - 1) and 0 < len(found[-1]) <= size
    again = list(windows.batches(runs, size, epoch))
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_another_seed_and_another_epoch_are_other_orders():
    runs = runs_of([4] * 50)
    orders = {
        tuple(torch.cat(list(Windows(10, seed).batches(runs, 20, epoch))).tolist())
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(orders) == 9


def test_pairs_in_their_order_stay_within_their_window():
    runs = runs_of([4] * 20)
    order = torch.cat(list(Windows(5, in_order=True).batches(runs, 20, 0)))
    assert (runs.pair_of(order) // 5).tolist() == sorted((runs.pair_of(order) // 5).tolist())


def test_positions_in_a_window_are_uniform():
    """A row of the first pair lands in each quarter of its window equally often: chi-square over 400 orders."""
    runs, hits = runs_of([10] * 8), torch.zeros(4)
    for seed in range(400):
        order = next(iter(Windows(8, seed).batches(runs, 80, 0)))
        hits[int((order == 3).nonzero()) // 20] += 1
    assert float(((hits - 100).square() / 100).sum()) < 16.3  # chi-square, 3 degrees, p .001


def test_mixing_is_counted_against_a_full_shuffle():
    """Of the batches of one window over all pairs: what drawing without replacement gives."""
    runs = runs_of([7] * 300)
    whole = mixing(Windows(300), runs, 100)
    drawn = [
        len((torch.randperm(2100, generator=torch.Generator().manual_seed(i))[:100] // 7).unique())
        for i in range(300)
    ]
    assert abs(whole.at_best - sum(drawn) / len(drawn)) < 0.5
    assert abs(whole.share - 1) < 0.02
    assert mixing(Windows(15), runs, 100).share < 0.35  # 15 pairs a window, few of the next: 27 of 87


def test_a_window_smaller_than_a_batch_is_refused():
    with pytest.raises(MMHooksError, match="expected windows of at least 64 rows, a batch, got 20"):
        list(Windows(5).batches(runs_of([4] * 20), 64, 0))
    with pytest.raises(MMHooksError, match="at least 1 pair"):
        Windows(0)
