"""Matched random sets, against their definition counted by hand."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2_contingency, chisquare

from mmhooks.analysis.statistics import controls
from mmhooks.analysis.statistics.controls import (
    NoControl,
    activation_mass,
    edit_gram,
    size_matched,
    weight_matched,
)
from mmhooks.errors import NotFinite, ShapeMismatch
from mmhooks.hooks.features import FeatureSet


def skewed(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)).mul(1.5).exp()


def test_two_hundred_sets_by_default():
    assert len(size_matched(FeatureSet([1, 2], 30))) == 200


def test_sets_have_the_size_and_the_mass_of_the_group_and_nothing_of_it():
    mass = skewed(400)
    group = FeatureSet(mass.argsort(descending=True)[5:200:4], 400, head="h")  # heavier than average
    made = weight_matched(group, mass, draws=40)
    goal = float(mass[group.indices].double().sum())
    ratios = [float(mass[s.indices].double().sum()) / goal for s in made.sets]
    assert all(len(s) == len(group) and not set(s) & set(group) and s.head == "h" for s in made.sets)
    assert min(ratios) == pytest.approx(made.ratio.low) and max(ratios) == pytest.approx(made.ratio.high)
    assert max(abs(r - 1) for r in ratios) <= 0.05
    unmatched = size_matched(group, draws=40, disjoint=True)
    loose = [float(mass[s.indices].double().sum()) / goal for s in unmatched]
    assert min(loose) < 0.5 and max(loose) > 2  # of equal size only
    pairs = [(a, b) for a in made.sets for b in made.sets if a is not b]
    naive = sum(len(set(a) & set(b)) for a, b in pairs) / len(pairs) / len(group)
    assert made.overlap == pytest.approx(naive) and made.overlap < 0.5 and made.pool == 400 - len(group)


def test_sets_have_the_concentration_of_the_group():
    """Fifty equal features and one giant with forty-nine dwarfs may weigh the same: strata tell them apart."""
    mass = torch.cat([torch.full((300,), 1.0), torch.full((6,), 40.0)])
    group = FeatureSet([0, *range(1, 40), 300], 306)
    assert all(int((mass[s.indices] > 10).sum()) == 1 for s in weight_matched(group, mass, draws=20).sets)


def test_the_norm_of_the_edit_is_matched():
    generator = torch.Generator().manual_seed(1)
    latents = torch.rand(60, 120, generator=generator) * skewed(120)
    directions = torch.randn(120, 16, generator=generator)
    group = FeatureSet(range(0, 60, 3), 120)

    def norm(s: FeatureSet) -> float:
        return float((latents[:, s.indices] @ directions[s.indices]).square().sum(1).mean().sqrt())

    made = weight_matched(group, edit_gram(latents, directions), what="norm of the edit", draws=20)
    got = [norm(s) / norm(group) for s in made.sets]
    assert max(abs(r - 1) for r in got) <= 0.05
    assert made.ratio.value == pytest.approx(sum(got) / 20, rel=1e-4)
    loose = [norm(s) / norm(group) for s in size_matched(group, draws=20, disjoint=True)]
    assert max(abs(r - 1) for r in loose) > 0.1


def test_a_pool_that_cannot_match_is_said_so():
    mass = torch.cat([torch.full((10,), 100.0), torch.ones(90)])
    with pytest.raises(NoControl, match=r"within 5 % of its 1000, got 1 to 1 % .*say what it removes"):
        weight_matched(FeatureSet(range(10), 100), mass, draws=3)
    with pytest.raises(NoControl, match="nothing to match"):
        weight_matched(FeatureSet([1], 100), torch.zeros(100))
    with pytest.raises(ShapeMismatch, match="expected at least 60 features"):
        weight_matched(FeatureSet(range(60), 100), mass)


def stuck(seed: int) -> tuple[FeatureSet, torch.Tensor]:
    """A pair of fives whose only matches are other fives: from most starts two exchanges at once would be needed."""
    light = 1 + 0.01 * torch.rand(20, generator=torch.Generator().manual_seed(seed))
    return FeatureSet([0, 1], 48), torch.cat([torch.full((8,), 5.0), light, 9.6 + light])


def test_stuck_draws_are_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    group, mass = stuck(0)
    made = weight_matched(group, mass, draws=60)
    assert (
        all(mass[s.indices].tolist() == [5.0, 5.0] for s in made.sets)
        and made.ratio.low == made.ratio.high == 1
    )
    monkeypatch.setattr(controls, "TRIES", 1)
    with pytest.raises(NoControl, match="got 1[01][0-9] to 1[01][0-9] % in 1 tries"):
        weight_matched(group, mass, draws=60)  # what single draws did


@settings(max_examples=25, deadline=None)
@given(size=st.integers(1, 12), spread=st.floats(0.2, 3), seed=st.integers(0, 2**20))
def test_a_planted_match_is_always_found(size: int, spread: float, seed: int) -> None:
    """Every feature of the group has a twin in the pool, among others of any weight."""
    generator = torch.Generator().manual_seed(seed)
    twins = (spread * torch.randn(size, generator=generator)).exp()
    others = (spread * torch.randn(30, generator=generator)).exp() * 10 ** float(
        torch.randn(1, generator=generator)
    )
    mass = torch.cat([twins, twins, others])
    made = weight_matched(FeatureSet(range(size), len(mass)), mass, draws=5, seed=seed)
    goal = float(twins.double().sum())
    for s in made.sets:
        assert len(s) == size and min(s) >= size
        assert abs(float(mass[s.indices].double().sum()) / goal - 1) <= 0.05


@settings(max_examples=4, deadline=None)
@given(size=st.integers(1, 8), times=st.floats(1.2, 50), seed=st.integers(0, 2**20))
def test_a_group_beyond_the_reach_of_the_pool_is_refused(size: int, times: float, seed: int) -> None:
    """Lighter than the lightest set, or heavier than the heaviest one; the message has what was reached."""
    pool = torch.rand(20, generator=torch.Generator().manual_seed(seed)) + 0.5
    order = pool.sort().values
    for goal in (order[:size].sum() / times, order[-size:].sum() * times):
        mass = torch.cat([torch.full((size,), float(goal) / size), pool])
        with pytest.raises(NoControl) as fault:
            weight_matched(FeatureSet(range(size), len(mass)), mass, draws=2)
        low, high = (int(x) for x in re.findall(r"got (\d+) to (\d+) %", str(fault.value))[0])
        nearest = 100 * float((order[:size] if goal < order[:size].sum() else order[-size:]).sum() / goal)
        assert low - 1 <= nearest <= high + 1 and not 95 <= nearest <= 105


def test_redrawing_prefers_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets are distributed as single draws that fit; features of equal weight appear equally often."""
    group, mass = stuck(1)
    mass[8:14] = torch.tensor(
        [4.0, 4.0, 4.0, 6.0, 6.0, 6.0]
    )  # two ways to match: two fives, or one of each of these
    redrawn = weight_matched(group, mass, draws=300)
    counts = torch.stack([torch.bincount(torch.tensor(list(s)), minlength=48) for s in redrawn.sets]).sum(0)
    monkeypatch.setattr(controls, "TRIES", 1)
    single, fits = torch.zeros(48), 0
    for seed in range(1, 201):
        try:
            (one,) = weight_matched(group, mass, draws=1, seed=seed).sets
        except NoControl:
            continue
        single[list(one)] += 1
        fits += 1
    assert 20 < fits < 180  # many single draws are stuck, and many are not
    seen = slice(2, 14)
    assert counts[seen].sum() == 600 and single[seen].sum() == 2 * fits
    kinds = [torch.stack([c[2:8].sum(), c[8:11].sum(), c[11:14].sum()]) for c in (counts, single)]
    assert chi2_contingency(torch.stack(kinds).numpy()).pvalue > 1e-3
    assert chisquare(counts[2:8].numpy()).pvalue > 1e-3  # six fives


def test_wrong_weights_are_refused():
    group = FeatureSet([1], 10)
    with pytest.raises(ShapeMismatch, match=r"expected weights of shape \(10,\)"):
        weight_matched(group, torch.ones(9))
    with pytest.raises(ShapeMismatch, match="at least 0"):
        weight_matched(group, -torch.ones(10))
    with pytest.raises(NotFinite, match="1 of 10 weights"):
        weight_matched(group, torch.ones(10).index_fill(0, torch.tensor([3]), torch.nan))


def test_draws_are_seeded_and_differ():
    group, mass = FeatureSet(range(8), 80), skewed(80)
    one, same, other = (weight_matched(group, mass, draws=6, seed=s, tolerance=0.3).sets for s in (0, 0, 1))
    assert one == same and one != other and len(set(one)) == 6


def test_mass_counts_what_zeroing_removes():
    assert activation_mass(torch.tensor([[1.0, -2.0], [0.0, 1.0]])).tolist() == [1.0, 3.0]
