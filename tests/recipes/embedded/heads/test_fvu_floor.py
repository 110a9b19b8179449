"""The FVU floor of the SAE of mini: least squares, the pursuit, and the bounds."""

from __future__ import annotations

import itertools

import pytest
import torch
from embedded.heads import fvu_floor
from scipy.optimize import nnls
from torch.nn.functional import normalize

from mmhooks.heads import TopKSAE, reconstruction


def test_best_values_of_chosen_atoms_are_those_of_scipy() -> None:
    g = torch.Generator().manual_seed(0)
    atoms, x = normalize(torch.randn(12, 8, generator=g), dim=1), torch.randn(20, 8, generator=g)
    chosen = torch.stack([torch.randperm(12, generator=g)[:5] for _ in x])
    found = fvu_floor.explained(x, atoms, chosen, sweeps=400)
    for row, places, got in zip(x, chosen, found, strict=True):
        _, rest = nnls(atoms[places].T.double().numpy(), row.double().numpy())
        assert float((row - got).norm()) == pytest.approx(rest, abs=1e-3)


def test_pursuit_of_one_atom_is_the_best_one_and_more_never_hurt() -> None:
    g = torch.Generator().manual_seed(1)
    atoms, x = normalize(torch.randn(12, 8, generator=g), dim=1), torch.randn(20, 8, generator=g)
    error = [(x - fvu_floor.pursuit(x, atoms, k)).square().sum(1) for k in (1, 2, 4, 8)]
    by_hand = x.square().sum(1) - (x @ atoms.T).clamp_min(0).amax(1).square()
    torch.testing.assert_close(error[0], by_hand, rtol=1e-4, atol=1e-5)
    for fewer, more in itertools.pairwise(error):
        assert bool((more <= fewer + 1e-4).all())


def test_pursuit_finds_a_sparse_vector_again() -> None:
    atoms = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(2))).Q
    codes = torch.zeros(5, 16)
    codes[:, 3], codes[:, 7], codes[:, 11] = 1.0, 2.0, 0.5
    torch.testing.assert_close(fvu_floor.pursuit(codes @ atoms, atoms, 3), codes @ atoms, atol=1e-5, rtol=0)


def test_bounds_are_ordered_and_start_at_fidelity() -> None:
    x = normalize(torch.randn(200, 16, generator=torch.Generator().manual_seed(3)), dim=1)
    sae = TopKSAE(16, 64, 6)
    found = fvu_floor.bounds(sae, x)
    assert found["head"] == pytest.approx(reconstruction(sae, x).fvu, rel=1e-4)
    assert found["pursuit"] < found["own"] < found["head"]
