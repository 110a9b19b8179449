"""The Matching-Pursuit SAE against a loop over rows and steps."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from mmhooks.heads import MatchingPursuitSAE, reconstruction, train_head
from mmhooks.heads.sae.topk import TopKSAE
from mmhooks.heads.training.sae_objective import SAEObjective

from .conftest import paired_clouds


def pursued(head: MatchingPursuitSAE, x: torch.Tensor) -> tuple[torch.Tensor, list[list[float]]]:
    """Features of each row, by subtracting one atom at a time from its residual; and the residuals' lengths."""
    features, lengths = torch.zeros(len(x), head.n_features, dtype=x.dtype), []
    atoms, bias = head.W_dec.detach(), head.b_pre.detach()
    for row in range(len(x)):
        left = x[row] - bias
        lengths.append([float(left.norm())])
        for _ in range(head.k):
            products = [float(left @ atom) for atom in atoms]
            best = max(range(len(products)), key=products.__getitem__)
            if products[best] <= 0:
                continue
            features[row, best] += products[best]
            left = left - products[best] * atoms[best]
            lengths[-1].append(float(left.norm()))
    return features, lengths


@pytest.mark.parametrize("k", [1, 5, 24])
def test_features_equal_the_loop(k) -> None:
    head = MatchingPursuitSAE(16, 24, k, normalize_input=False, seed=2).double()
    with torch.no_grad():
        head.b_pre.copy_(torch.randn(16))
    x = paired_clouds(30)[0].double()
    want, lengths = pursued(head, x)
    torch.testing.assert_close(head.encode(x).detach(), want)
    assert int((want > 0).sum(1).max()) <= k
    assert all(a >= b for row in lengths for a, b in pairwise(row))
    last = torch.tensor([row[-1] for row in lengths], dtype=torch.float64)
    torch.testing.assert_close((x - head(x)).norm(dim=1).detach(), last)
    if k == 24:
        assert bool((want > 0).sum(1).max() < 24)  # some atom was chosen twice: its parts add up
    assert set(dict(head.named_parameters())) == {"W_dec", "b_pre"}


def test_both_ways_to_get_the_products_agree_and_so_do_their_gradients(monkeypatch) -> None:
    head, x = (
        MatchingPursuitSAE(16, 24, 5, normalize_input=False, seed=2).double(),
        paired_clouds(30)[0].double(),
    )
    found = []
    for largest in (4096, 0):
        monkeypatch.setattr("mmhooks.heads.sae.matching_pursuit.LARGEST_TABLE", largest)
        f = head.encode(x)
        (grad,) = torch.autograd.grad(head.decode(f).square().sum(), head.W_dec)
        found.append((f.detach(), grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_where_no_atom_points_along_the_residual_nothing_is_active() -> None:
    head = MatchingPursuitSAE(2, 2, 2, normalize_input=False)
    with torch.no_grad():
        head.W_dec.copy_(torch.eye(2))
    assert torch.equal(
        head.encode(torch.tensor([[-1.0, -2.0], [3.0, -1.0]])), torch.tensor([[0.0, 0.0], [3.0, 0.0]])
    )


def test_training_keeps_unit_atoms_and_beats_topk() -> None:
    pairs, valid = paired_clouds(600), paired_clouds(200, seed=1)
    found = {}
    for kind in (TopKSAE, MatchingPursuitSAE):
        head = kind(16, 48, 5)
        result = train_head(
            head, *pairs, epochs=20, batch_size=100, valid=valid, progress=False,
            objective=SAEObjective(resample_every=5),
        )  # fmt: skip
        found[kind] = result.last["valid_score"]
        assert found[kind] < 0.7 * result.history[0]["valid_score"]
        torch.testing.assert_close(head.W_dec.norm(dim=1), torch.ones(48))
        assert reconstruction(head, *valid).l0 <= 5
    assert found[MatchingPursuitSAE] < 0.9 * found[TopKSAE]
