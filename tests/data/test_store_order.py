"""The order of shuffled batches: every row once, every split as likely, few pieces a batch."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mmhooks.data.store.order import Mixer, batches, generator, windows


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(1, 12), st.integers(0, 5))
@settings(deadline=None)
def test_the_mixer_deals_every_row_once(lengths, size, seed):
    mixer, edges = Mixer(generator(seed, 0)), np.cumsum([0, *lengths]).tolist()
    mixer.add(list(pairwise(edges)))
    dealt = []
    while len(mixer):
        rows, counts = mixer.deal(min(size, len(mixer)))
        assert sum(counts) == len(rows)
        for part in rows.split(counts):  # each stretch lies in one run
            assert len({int(np.searchsorted(edges, r, side="right")) for r in part.tolist()}) == 1
        dealt += rows.tolist()
    assert sorted(dealt) == list(range(sum(lengths)))


@given(st.integers(0, 50), st.sampled_from([3, 7, 10]))
@settings(deadline=None)
def test_rows_that_a_window_leaves_over_are_of_one_run(seed, size):
    """Ten rows a run, a shorter one last, three runs a window: a batch is of at most these and the run left over."""
    cuts, rng = [*range(0, 91, 10), 94], generator(seed, 0)
    plan, seen = windows(cuts, 30, rng), []
    for number, rows, counts in batches(plan, size, rng, drop_last=False):
        begins = {cuts[int(np.searchsorted(cuts, row, side="right")) - 1] for row in rows.tolist()}
        assert len(begins - {begin for begin, _ in plan[number]}) <= 1 + (len(plan[number]) == 1)
        assert len(counts) <= len(begins) + 1  # the run held back may come in two pieces
        seen += rows.tolist()
    assert sorted(seen) == list(range(94))


def test_every_split_into_batches_is_equally_likely():
    """Two runs of two rows, batches of two: each of the six first batches in a sixth of all draws."""
    counts = {}
    for seed in range(3000):
        mixer = Mixer(generator(seed, 0))
        mixer.add([(0, 2), (2, 4)])
        first = tuple(sorted(mixer.deal(2)[0].tolist()))
        counts[first] = counts.get(first, 0) + 1
    assert len(counts) == 6
    chi2 = sum((n - 500) ** 2 / 500 for n in counts.values())
    assert chi2 < 20.5, counts  # 99.9 % quantile at 5 degrees of freedom
