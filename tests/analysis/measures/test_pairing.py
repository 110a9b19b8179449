"""Pairing against real shuffles and scipy; false discoveries on unpaired sides at their nominal rate."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import fisher_exact, pearsonr

import mmhooks as mm
from mmhooks.data.sparse_rows import SparseRows
from mmhooks.errors import NotFinite, ShapeMismatch


def sides(seed=0, n=120, k=6):
    generator = torch.Generator().manual_seed(seed)
    a, b = (
        torch.rand(n, k, generator=generator) * (torch.rand(n, k, generator=generator) < 0.3)
        for _ in range(2)
    )
    b[:, 0] = torch.where(torch.rand(n, generator=generator) < 0.6, a[:, 0], b[:, 0])  # paired
    a[:, 4], b[:, 5] = 0, 0
    return a, b


def test_it_is_fishers_exact_test_and_pearsons_r():
    a, b = sides()
    found = mm.pairing(a, b)
    for k in range(4):
        one, other = (a[:, k] > 0).numpy(), (b[:, k] > 0).numpy()
        table = [[(one & other).sum(), (one & ~other).sum()], [(~one & other).sum(), (~one & ~other).sum()]]
        assert found.p[k].item() == pytest.approx(fisher_exact(table, "greater").pvalue)
        assert found.lift[k].item() == pytest.approx((one & other).mean() / (one.mean() * other.mean()))
        assert found.correlation[k].item() == pytest.approx(pearsonr(a[:, k], b[:, k]).statistic, abs=1e-6)
    assert found.p[4:].isnan().all() and found.paired().tolist() == [True] + [False] * 5


def test_p_is_the_share_of_shuffles_that_fire_together_as_often():
    a, b = sides(seed=3)
    found, rng = mm.pairing(a, b), np.random.default_rng(0)
    together = ((a > 0) & (b > 0)).sum(0)
    hits, draws = torch.zeros(6), 4000
    for _ in range(draws):
        hits += ((a > 0) & (b[torch.from_numpy(rng.permutation(len(b)))] > 0)).sum(0) >= together
    assert torch.allclose((hits / draws)[:4].double(), found.p[:4], atol=0.03)


def test_features_that_always_fire_are_judged_by_their_correlation():
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(80, 2, generator=generator) + 1
    b = torch.rand(80, 2, generator=generator) + 1
    b[:, 0] = a[:, 0] + 0.1 * b[:, 0]
    found = mm.pairing(a, b)
    assert found.lift.tolist() == [1.0, 1.0]
    for k in range(2):
        assert found.p[k].item() == pytest.approx(
            pearsonr(a[:, k], b[:, k], alternative="greater").pvalue, abs=1e-6
        )


def test_sparse_store_and_families_agree_with_dense():
    a, b = sides()
    values, indices = a.topk(6, dim=1)
    rows = SparseRows(values, indices, 6)
    other = SparseRows(*b.topk(6, dim=1), 6)
    assert torch.equal(mm.pairing(rows, other).p.nan_to_num(-1), mm.pairing(a, b).p.nan_to_num(-1))
    families = torch.arange(120) // 3
    found = mm.pairing(a, b, families=families, seed=1)
    assert found.n_pairs == 40
    doubled = mm.pairing(a.repeat(5, 1), b.repeat(5, 1), families=torch.arange(120).repeat(5))
    assert torch.equal(
        doubled.lift.nan_to_num(-1), mm.pairing(a, b).lift.nan_to_num(-1)
    )  # copies add nothing


def test_copies_of_pairs_make_false_discoveries_unless_families_are_given():
    generator, alone, by_family = torch.Generator().manual_seed(5), 0, 0
    families = torch.arange(40).repeat_interleave(8)
    for _ in range(60):
        a, b = (
            (torch.rand(40, 8, generator=generator) < 0.4).float().repeat_interleave(8, 0) for _ in range(2)
        )
        alone += int((mm.pairing(a, b).p < 0.05).sum())
        by_family += int((mm.pairing(a, b, families=families).p < 0.05).sum())
    assert by_family / 480 < 0.07 < 0.15 < alone / 480


def test_bad_input_is_refused():
    a, b = sides()
    with pytest.raises(ShapeMismatch, match="at least 2 pairs of different families, got 1"):
        mm.pairing(a, b, families=torch.zeros(120, dtype=torch.long))
    with pytest.raises(ShapeMismatch, match="expected image and text latents, got only image"):
        mm.pairing(a)
    with pytest.raises(NotFinite):
        mm.pairing(a / 0, b)
