"""The archetypal SAE: atoms in the hull of training vectors, up to the slack that delta allows."""

from __future__ import annotations

import pytest
import torch
from scipy.optimize import nnls

from mmhooks.errors import MMHooksError, ShapeMismatch
from mmhooks.heads import ArchetypalSAE, load_head_dir, reconstruction, train_head
from mmhooks.heads.training.sae_objective import SAEObjective

from .conftest import paired_clouds


def distance_to_hull(atom: torch.Tensor, points: torch.Tensor) -> float:
    """The distance of a vector to the convex hull of points, by non-negative least squares with a heavy row of ones."""
    heavy = 1e4
    table = torch.cat([points.T, heavy * torch.ones(1, len(points))]).double().numpy()
    target = torch.cat([atom, torch.tensor([heavy])]).double().numpy()
    weights, _ = nnls(table, target, maxiter=10_000)
    return float((torch.from_numpy(weights / weights.sum()).float() @ points - atom).norm())


@pytest.mark.parametrize("delta", [0.0, 0.2])
def test_trained_atoms_lie_in_the_hull_up_to_delta(delta, tmp_path) -> None:
    pairs, valid = paired_clouds(600), paired_clouds(200, seed=1)
    head = ArchetypalSAE(16, 24, 5, n_points=80, delta=delta)
    result = train_head(head, *pairs, epochs=15, batch_size=100, valid=valid, progress=False)
    assert result.last["valid_score"] < 0.8 * result.history[0]["valid_score"]
    slack = delta * float(head.points.norm(dim=1).mean())
    assert float(head.slack) == pytest.approx(slack)
    distances = [distance_to_hull(atom, head.points) for atom in head.W_dec.detach()]
    assert max(distances) <= slack + 1e-3
    if delta:
        assert max(distances) > 0.2 * slack  # the slack is used, so the bound is tested
    else:
        assert not head.relax.any()
    assert bool((head.mix >= 0).all())
    torch.testing.assert_close(head.mix.sum(1), torch.ones(24))
    moved = (head.mix.detach() > 1e-3).sum(1)
    assert int(moved.max()) > 1  # atoms became mixtures
    torch.testing.assert_close(head.W_dec, head.dictionary().detach())
    rows = torch.nn.functional.normalize(torch.cat(pairs), dim=1)
    assert (
        float(torch.cdist(head.points.double(), rows.double()).min(dim=1).values.max()) < 1e-5
    )  # points are training vectors
    assert reconstruction(head, *valid).l0 <= 5
    back = load_head_dir(head.save(tmp_path / "h"))
    x = valid[0]
    assert torch.equal(back(x), head(x)) and back.id == head.id


def test_projection_by_hand() -> None:
    head = ArchetypalSAE(4, 3, 2, n_points=5, delta=0.5)
    head.set_points(torch.randn(5, 4, generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        head.mix.copy_(torch.tensor([[2.0, 2, 0, 0, -7], [-1, -1, -1, -1, -1], [0, 0, 3, 0, 0]]))
        head.relax.fill_(10.0)
        head.relax[1] = 0.01
    head.project_()
    want = torch.tensor([[0.5, 0.5, 0, 0, 0], [0.2] * 5, [0, 0, 1.0, 0, 0]])
    torch.testing.assert_close(head.mix.detach(), want)
    slack = 0.5 * head.points.norm(dim=1).mean()
    lengths = head.relax.norm(dim=1).detach()
    torch.testing.assert_close(lengths, torch.stack([slack, torch.tensor(0.02), slack]))
    torch.testing.assert_close(head.W_dec, head.mix.detach() @ head.points + head.relax.detach())


def test_what_does_not_fit_is_refused() -> None:
    head = ArchetypalSAE(16, 24, 5)
    with pytest.raises(MMHooksError, match=r"no points yet.*set_points"):
        head.encode(torch.randn(2, 16))
    with pytest.raises(
        ShapeMismatch, match=r"expected \[24, 16\], got \[20, 16\]; build the head with n_points=20"
    ):
        head.set_points(torch.randn(20, 16))
    pairs = paired_clouds(60)
    for options in (
        SAEObjective(init="data"),
        SAEObjective(centre="modality"),
        SAEObjective(resample_every=2),
    ):
        with pytest.raises(MMHooksError, match="archetypal head"):
            train_head(head, *pairs, epochs=1, objective=options, progress=False)
