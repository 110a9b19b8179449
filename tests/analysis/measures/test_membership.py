"""Membership against resamples of the pairs themselves, scored by mm.mds."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings

import mmhooks as mm
from mmhooks.analysis.measures.membership import GroupMembership, group_labels, over_seeds
from mmhooks.data.sparse_rows import SparseRows
from mmhooks.errors import MMHooksError, NotFinite, ShapeMismatch
from mmhooks.heads import TopKSAE

from .loops import close
from .streams import N_FEATURES, ROWS, fed, streams

FAMILIES = torch.arange(ROWS) // 3


def naive_probability(image, text, families, rule, draws, seed=0):
    """Repeats every pair as often as its family was drawn and scores the repeated pairs."""
    counts = torch.zeros(3, image.shape[1])
    weights = {int(f): np.random.default_rng([seed, int(f)]).poisson(1.0, draws) for f in families.unique()}
    for draw in range(draws):
        rows = [i for i, f in enumerate(families.tolist()) for _ in range(weights[f][draw])]
        if not rows:
            continue
        found = mm.mds(image[rows], text[rows])
        if rule == "sigma":
            for number, group in enumerate(found.groups):
                counts[number] += group.mask
        else:
            counts += torch.stack([found.R > 2 / 3, found.R < 1 / 3, (found.R >= 1 / 3) & (found.R <= 2 / 3)])
    return counts / draws


@pytest.mark.parametrize("rule", ["sigma", "thirds"])
def test_equals_scoring_the_resampled_pairs(rule):
    generator = torch.Generator().manual_seed(1)
    image, text = (torch.randn(ROWS, N_FEATURES, generator=generator) for _ in range(2))
    image[:, 0] += 2
    text[:, 1] += 2
    image[:, 2] = text[:, 2] = -1  # dead
    image[1:, 3] = text[1:, 3] = -1  # fires in one family only: dead in some resamples
    image[0, 3] = 1
    found = mm.membership(image, text, families=FAMILIES, rule=rule, draws=40)
    close(found.probability, naive_probability(image, text, FAMILIES, rule, 40))
    assert found.assigned[2] == -1 and math.isnan(found.low[2]) and not found.probability[:, 2].any()
    assert 0 < float(found.probability[:, 3].sum()) < 1
    assert (found.n_pairs, found.n_families) == (ROWS, 8)
    whole = mm.mds(image, text)
    close(found.R, whole.R)
    if rule == "sigma":
        assert [list((found.assigned == g).nonzero().flatten()) for g in range(3)] == [
            list(g) for g in whole.groups
        ]
    known = ~found.R.isnan()
    assert bool((found.low[known] <= found.high[known]).all())


@given(streams())
@settings(max_examples=25, deadline=None)
def test_batches_and_sparse_rows_change_nothing(stream):
    image, text, _, bounds, sparse = stream
    metric = fed(lambda: GroupMembership(N_FEATURES, draws=20), bounds, image, text, FAMILIES, sparse=sparse)
    whole = mm.membership(image.dense(), text.dense(), families=FAMILIES, draws=20)
    found = metric.result()
    close(found.probability, whole.probability)
    close(found.R, whole.R, 1e-9)
    assert found.n_families == 8


def test_a_family_of_copies_counts_once():
    # Feature 0 is an image feature in one family of 30 copies, and a text feature in 6 families of its own.
    image = torch.tensor([[1.0]] * 30 + [[0.0]] * 6)
    text = 1 - image
    apart = mm.membership(image, text, families=range(36), rule="thirds", draws=400)
    together = mm.membership(image, text, families=[0] * 30 + list(range(1, 7)), rule="thirds", draws=400)
    assert list(apart.groups(0.95)[0]) == [0]
    # The one family is not drawn in exp(-1) of the resamples; where it is, its copies decide.
    assert float(together.probability[0]) == pytest.approx(1 - math.exp(-1), abs=0.08)
    assert float(together.probability[1]) == pytest.approx(math.exp(-1), abs=0.08)
    assert list(together.undecided(0.9)) == [0] and not any(together.groups(0.9))
    assert together.table()[0]["assigned"] == 1 and together.table()[1]["p ≥ 0.51"] == 0


def test_a_store_is_read_once_and_equals_its_latents():
    generator = torch.Generator().manual_seed(0)
    sae = TopKSAE(8, 16, 3)
    x, y = (torch.nn.functional.normalize(torch.randn(24, 8, generator=generator), dim=1) for _ in range(2))

    class Site:
        def __init__(self, rows):
            self.rows, self.shape, self.is_sparse = rows, rows.shape, False

        def __len__(self):
            return len(self.rows)

        def __getitem__(self, which):
            return self.rows[which]

    class Pairs:
        sites = ("image.embed", "text.embed")

        def __len__(self):
            return 24

        def __getitem__(self, site):
            return Site(x if site == "image.embed" else y)

    found = mm.membership(Pairs(), head=sae, families=range(24), draws=30)
    direct = mm.membership(sae.encode(x).detach(), sae.encode(y).detach(), families=range(24), draws=30)
    assert torch.equal(found.probability, direct.probability) and found.head == sae.id


def test_partners_in_other_seeds_are_averaged_and_strangers_count_nothing():
    image = torch.tensor([[1.0, 0.0, 1.0]] * 12)
    own = mm.membership(image, 1 - image, families=range(12), rule="thirds", draws=30)
    turned = mm.membership(1 - image, image, families=range(12), rule="thirds", draws=30)
    one, other = TopKSAE(8, 3, 1, seed=0), TopKSAE(8, 3, 1, seed=1)
    with torch.no_grad():
        other.W_dec.copy_(one.W_dec[[1, 0, 2]])
        other.W_dec[2] *= -1  # feature 2 has no partner
    found = over_seeds(own, [(turned, mm.stability(one, other))])
    # Feature 0 (image) meets the other head's 1, which is of images there too; 1 meets 0, of texts there.
    assert found.probability.T.tolist() == [[1, 0, 0], [0, 1, 0], [0.5, 0, 0]]
    assert found.partners.tolist() == [1, 1, 0] and found.heads == 2
    assert [list(g) for g in found.groups(0.9)] == [[0], [1], []] and list(found.undecided(0.9)) == [2]
    with pytest.raises(ShapeMismatch, match="at least one other head"):
        over_seeds(own, [])
    with pytest.raises(ShapeMismatch, match=r"stability\(own head, other head\)"):
        over_seeds(own, [(turned, mm.stability(one, TopKSAE(8, 2, 1)))])
    by_sigma = mm.membership(image, 1 - image, families=range(12), draws=30)
    with pytest.raises(ShapeMismatch, match="expected groups by 'thirds' over 12 pairs, got 'sigma'"):
        over_seeds(own, [(by_sigma, mm.stability(one, other))])


def test_labels_of_flat_and_of_dead_scores():
    flat = torch.tensor([[0.5, 0.5, torch.nan], [0.1, 0.9, 0.5]])
    assert group_labels(flat, "sigma").tolist() == [[2, 2, -1], [1, 0, 2]]


def test_refusals_say_what_they_expected():
    x = torch.rand(4, 3)
    with pytest.raises(ShapeMismatch, match="one family per pair, got 4 pairs and 3 labels"):
        mm.membership(x, x, families=range(3))
    with pytest.raises(ShapeMismatch, match="both sides"):
        mm.membership(x, families=range(4))
    with pytest.raises(MMHooksError, match="at least one resample, got 0"):
        mm.membership(x, x, families=range(4), draws=0)
    found = mm.membership(x, x, families=range(4), draws=10)
    for wrong in (0.5, 1.1):
        with pytest.raises(MMHooksError, match="above .5 and at most 1"):
            found.groups(wrong)
    metric = GroupMembership(3, draws=5)
    bad = SparseRows(torch.tensor([[1.0, math.nan]]), torch.tensor([[0, 2]]), 3)
    with pytest.raises(NotFinite, match="row 0, feature 2"):
        metric.update(bad, bad, torch.tensor([0]))
    with pytest.raises(ShapeMismatch, match="number from 0 on for each of 1 pairs"):
        metric.update(x[:1], x[:1], torch.tensor([-1]))
    assert int(metric.n_pairs) == 0 and not metric.counts.any()
